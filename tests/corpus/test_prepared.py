import json
import time

import numpy as np
import pandas as pd
import pytest

from nnunet_ssl.corpus.modalities import MODALITIES, is_derived, is_not_of_the_brain, modality_of
from nnunet_ssl.corpus.prepared import open_corpus, summarize
from nnunet_ssl.errors import UserError


def manifest_rows(sessions):
    """`sessions`: {(subject, session): [stem, ...]} -> the rows of a prepared manifest."""
    rows = []
    for (subject, session), stems in sessions.items():
        for stem in stems:
            name, _, repeat = stem.partition("_")
            rows.append(
                {
                    "scan_id": f"A__{subject}__{session}__{stem}",
                    "dataset": "A",
                    "subject": f"A/{subject}",
                    "session": f"A/{subject}/{session}",
                    "modality": "unknown" if name == "scan" else name,
                    "repeat": repeat or 1,
                    "age": "41.5" if subject == "sub_1" else "",
                    "sex": "F",
                    "shape": "20,24,28",
                    "bbox": "1,19,2,22,3,25",
                }
            )
    return rows


@pytest.fixture
def write_store(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))

    def write(rows):
        folder = tmp_path / "Dataset500_FOMO60K"
        folder.mkdir(exist_ok=True)
        pd.DataFrame(rows).to_csv(folder / "manifest.tsv", sep="\t", index=False)
        (folder / "nnUNetSSLPlans.json").write_text(json.dumps({"preprocessing": {"spacing": [1.0, 1.0, 1.0]}}))
        return folder

    return write


@pytest.fixture
def corpus(write_store):
    write_store(
        manifest_rows(
            {
                ("sub_1", "ses_1"): ["t1", "t1_2", "flair"],
                ("sub_1", "ses_2"): ["t1", "t1_2"],  # a repeat is not a second modality
                ("sub_2", "ses_1"): ["t2", "scan_1"],  # nor is an unknown scan
                ("sub_3", "ses_1"): ["dwi", "adc", "scan_1"],
                ("sub_4", "ses_1"): ["scan_1", "scan_2"],
            }
        )
    )
    return open_corpus(500)


def names(corpus, rows):
    return [corpus.scans["scan_id"][row].split("__", 1)[1] for row in rows]


def test_manifest_columns_arrive_as_numbers(corpus):
    first = corpus.scans.iloc[0]
    assert (first.size_x, first.size_y, first.size_z) == (20, 24, 28)
    assert (first.x0, first.x1, first.y0, first.y1, first.z0, first.z1) == (1, 19, 2, 22, 3, 25)
    assert first.age == 41.5
    assert np.isnan(corpus.scans["age"].iloc[-1])
    assert corpus.spacing == (1.0, 1.0, 1.0)
    assert corpus.path(2) == corpus.folder / "A__sub_1__ses_1__flair.b2nd"


def test_pairs_need_two_different_known_modalities(corpus):
    assert names(corpus, corpus.paired_scans()) == [
        "sub_1__ses_1__t1", "sub_1__ses_1__t1_2", "sub_1__ses_1__flair", "sub_3__ses_1__dwi", "sub_3__ses_1__adc",
    ]  # fmt: skip


def test_every_scan_is_paired_or_unpaired(corpus):
    paired, unpaired = corpus.paired_scans(), corpus.unpaired_scans()
    assert sorted([*paired, *unpaired]) == list(range(len(corpus)))
    assert names(corpus, unpaired) == [
        "sub_1__ses_2__t1", "sub_1__ses_2__t1_2", "sub_2__ses_1__t2", "sub_2__ses_1__scan_1",
        "sub_3__ses_1__scan_1", "sub_4__ses_1__scan_1", "sub_4__ses_1__scan_2",
    ]  # fmt: skip


def test_a_corpus_without_pairs_has_no_paired_scans(write_store):
    write_store(manifest_rows({("sub_1", "ses_1"): ["t1"], ("sub_2", "ses_1"): ["scan_1"]}))
    corpus = open_corpus("Dataset500_FOMO60K")
    assert len(corpus.paired_scans()) == 0
    assert list(corpus.unpaired_scans()) == [0, 1]


def test_split_keeps_a_subject_on_one_side(corpus):
    training, validation = corpus.split(0.25, seed=3)
    assert set(training.scans["subject"]) | set(validation.scans["subject"]) == set(corpus.scans["subject"])
    assert not set(training.scans["subject"]) & set(validation.scans["subject"])
    assert validation.scans["subject"].nunique() == 1
    assert list(training.scans.index) == list(range(len(training)))
    numbers = corpus.scans.set_index("scan_id")["subject_index"]
    assert all(numbers[scan.scan_id] == scan.subject_index for scan in training.scans.itertuples())


def test_split_depends_on_the_seed_and_not_on_the_order_of_rows(write_store):
    rows = manifest_rows({(f"sub_{i}", "ses_1"): ["t1"] for i in range(100)})
    write_store(rows)
    sides = [set(open_corpus(500).split(0.1, seed)[1].scans["subject"]) for seed in (0, 0, 1)]
    write_store(rows[::-1])
    assert sides[0] == sides[1] == set(open_corpus(500).split(0.1, 0)[1].scans["subject"])
    assert sides[0] != sides[2]
    assert len(sides[0]) == 10


@pytest.mark.parametrize("fraction", [0.0, 0.02, 1.0])
def test_split_leaves_a_subject_on_each_side_of_a_small_corpus(corpus, fraction):
    assert all(len(side) > 0 for side in corpus.split(fraction))


def test_a_single_subject_validates_itself_and_says_so(write_store, caplog):
    write_store(manifest_rows({("sub_1", "ses_1"): ["t1", "t2"]}))
    training, validation = open_corpus(500).split()
    assert len(training) == len(validation) == 2
    assert "single subject" in caplog.text


def test_summary_counts_the_sessions_each_objective_can_use(corpus):
    assert corpus.summary() == {
        "subjects": 4,
        "sessions": 5,
        "scans": 12,
        "scans_by_modality": {"t1": 4, "t2": 1, "flair": 1, "dwi": 1, "adc": 1, "unknown": 4},
        "sessions_mcl": 2,
        "sessions_cl": 2,
        "sessions_mim_only": 3,
    }
    assert json.dumps(corpus.summary()), "plain types only"
    assert summarize(corpus.split()[0].scans)["scans"] < 12


def test_unprepared_and_empty_corpora_are_told_apart(write_store):
    with pytest.raises(UserError, match="There is no data set 500"):
        open_corpus(500)
    folder = write_store(manifest_rows({("sub_1", "ses_1"): ["t1"]}))
    header = (folder / "manifest.tsv").read_text().splitlines()[0]
    (folder / "manifest.tsv").write_text(header + "\n")
    with pytest.raises(UserError, match=r"every scan failed.*failures\.tsv"):
        open_corpus(500)
    (folder / "manifest.tsv").unlink()
    with pytest.raises(UserError, match="nnssl_prepare -d 500"):
        open_corpus(500)


def test_sixty_thousand_scans_open_in_seconds(write_store):
    sessions = {(f"sub_{i}", "ses_1"): ["t1", "t2", "flair", "scan_1"] for i in range(15_000)}
    write_store(manifest_rows(sessions))
    start = time.perf_counter()
    corpus = open_corpus(500)
    training, _ = corpus.split()
    assert len(training.paired_scans()) == 3 * 14_700
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("name", "modality"),
    [("T1w", "t1"), ("T2-FLAIR", "flair"), ("T2*", "t2s"), ("t2starw", "t2s"), ("T1-Gd", "t1c"), ("PDw", "pd"),
     ("bold", "unknown"), ("", "unknown")],
)  # fmt: skip
def test_other_vocabularies_map_onto_ours(name, modality):
    assert modality_of(name) == modality


def test_the_vocabulary_maps_onto_itself():
    assert [modality_of(name) for name in MODALITIES] == list(MODALITIES)


@pytest.mark.parametrize(
    "stem",
    ["aparc", "sub-1_aparc+aseg", "sub-1_T1w_lesion", "sub-1_T1map_ROI1", "sub-1_T2w_seg", "sub-1_ses-2_FLAIR_roi",
     "sub-1_label-WM_probseg", "sub-1_label-L_desc-T1lesion_mask", "t1_brainmask", "sub-1_space-orig_dseg", "seg_1",
     "sub-1_desc-aparcaseg_dseg", "sub-1_T1w_label2", "sub-1_from-T1w_mode-image_warp"],
)  # fmt: skip
def test_label_maps_and_fields_are_told_by_their_names(stem):
    assert is_derived(stem)


@pytest.mark.parametrize(
    "stem",
    ["t1", "t1_2", "scan_1", "sub-1_T1w", "sub-lesion01_ses-mask_T1w", "sub-1_acq-seg_T1w", "sub-1_rec-label_FLAIR",
     "sub-1_T1map", "sub-1_run-2_dwi", "mp2rage", "sub-1_inv-2_MP2RAGE", "sub-1_acq-EPSeg_swi"],
)  # fmt: skip
def test_scans_are_no_label_maps_whatever_their_subject_is_called(stem):
    assert not is_derived(stem)


@pytest.mark.parametrize(
    "words", ["acq-spine_T1w", "acq-cspine_T2w", "bp-cord_T2w", "CSPINE", "LSPINE", "acq-Lumbar_T1w"]
)
def test_other_parts_of_the_body_are_told_by_name(words):
    assert is_not_of_the_brain(words)


@pytest.mark.parametrize("words", ["T1w", "acq-record_T1w", "HEAD", "BRAIN", "", "acq-mprage_rec-norm_T1w"])
def test_a_brain_is_a_brain(words):
    assert not is_not_of_the_brain(words)
