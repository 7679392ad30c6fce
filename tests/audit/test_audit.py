"""The audit on corpora of phantoms: what one head leaves in two data sets is found, and nothing else."""

import json
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from nnunet_ssl.audit.audit import audit
from nnunet_ssl.audit.cli import describe, main
from nnunet_ssl.audit.comparison import pairs_by_content
from nnunet_ssl.audit.fingerprints import Fingerprint
from nnunet_ssl.audit.scans import LabelledCase
from nnunet_ssl.corpus.indexing import EXCLUSIONS, read_exclusions, read_index, standing_exclusions, without
from nnunet_ssl.corpus.prepare import PreparationConfig, prepare_corpus
from nnunet_ssl.imaging.geometry import Volume, canonical, resample_onto, write_volume
from nnunet_ssl.phantom.acquisition import Quality, acquire
from nnunet_ssl.phantom.anatomy import build_anatomy, draw_person, mni_grid
from nnunet_ssl.weights.sharing import verdicts_of


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def index(folder, scans, **columns):
    """Write the manifest of a corpus: subject -> path of its scan."""
    raw = folder / "nnUNet_raw" / "Dataset500_Corpus"
    raw.mkdir()
    rows = [
        {"scan_id": f"{name}__t1", "dataset": "DS", "subject": f"DS/{name}", "session": f"DS/{name}/ses_1"}
        | {"modality": "t1", "repeat": "1", "age": "", "sex": "", "path": str(path)}
        | {key: values[name] for key, values in columns.items()}
        for name, path in scans.items()
    ]
    pd.DataFrame(rows).to_csv(raw / "manifest.tsv", sep="\t", index=False)
    (raw / "dataset.json").write_text("{}")
    return raw


def label(folder, cases, sources=None, name="Dataset501_Labelled"):
    """Write a labelled data set: case -> volume, or None for one whose image nobody opens."""
    raw = folder / "nnUNet_raw" / name
    (raw / "imagesTr").mkdir(parents=True)
    for case, volume in cases.items():
        path = raw / "imagesTr" / f"{case}_0000.nii.gz"
        path.touch() if volume is None else write_volume(path, volume)
        if case in (sources or {}):
            record = raw / "conversion" / "cases" / f"{case}.json"
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps({"made_from": None, "row": {"sources": sources[case]}}))
    description = {"channel_names": {"0": "t1"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(description))
    return raw


def scan(person, seed, *, stripped=False, noise=0.03, voxel_mm=2.5):
    anatomy = build_anatomy(person, mni_grid(voxel_mm))
    quality = Quality(noise=noise, bias=0.15, stripped=stripped)
    return Volume(acquire(anatomy, "t1", quality, np.random.default_rng(seed)), anatomy.grid.affine)


def another_edition(volume, stripped):
    """The same scan in another data set: stripped, moved, on another grid, in another order, with other numbers."""
    brain = canonical(volume).with_array(canonical(volume).array * (stripped.array > 0))
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, -0.08, 0.12), [4, -7, 3])
    grid = Volume.empty((70, 80, 70), nib.affines.from_matvec(np.diag([2.8] * 3), [-98, -130, -78]))
    moved = resample_onto(brain, grid, turn)
    array = moved.array[::-1].transpose(2, 0, 1) ** 0.9 * 7
    order = np.zeros((4, 4))
    order[0, 1], order[0, 3], order[1, 2], order[2, 0], order[3, 3] = -1, 69, 1, 1, 1
    return Volume(np.ascontiguousarray(array), moved.affine @ order)


@pytest.mark.slow
def test_a_scan_and_a_head_are_found_whatever_was_done_to_them_and_strangers_are_not(folders):
    people = [draw_person(np.random.default_rng(seed)) for seed in range(4)]
    scans = {f"sub_{number}": scan(person, number) for number, person in enumerate(people[:3])}
    for name, volume in scans.items():
        write_volume(folders / f"{name}.nii.gz", volume)
    raw = index(folders, {name: folders / f"{name}.nii.gz" for name in scans})
    label(
        folders,
        {
            "copy": another_edition(scans["sub_0"], scan(people[0], 0, stripped=True)),
            "revisit": scan(people[1].older(3), 11, stripped=True, noise=0.07, voxel_mm=2.2),
            "stranger": scan(people[3], 12),
        },
    )

    found = audit(500, 501)

    assert {(pair.case, pair.subject) for pair in found.pairs if pair.verdict != "alike"} == {
        ("copy", "DS/sub_0"),
        ("revisit", "DS/sub_1"),
    }
    by_case = {pair.case: pair for pair in found.pairs if pair.verdict != "alike"}
    assert by_case["copy"].verdict == "same scan"
    assert by_case["revisit"].verdict == "same head"
    assert found.still_in == ["DS/sub_0", "DS/sub_1"]
    assert read_exclusions(raw / EXCLUSIONS / "Dataset501_Labelled.txt") == ["DS/sub_0", "DS/sub_1"]

    prepare_corpus(500, PreparationConfig())
    manifest = folders / "nnUNet_preprocessed" / "Dataset500_Corpus" / "manifest.tsv"
    assert set(pd.read_csv(manifest, sep="\t")["subject"]) == {"DS/sub_2"}


def run(monkeypatch, *arguments):
    """Run the command; return its exit status."""
    monkeypatch.setattr("sys.argv", ["nnssl_audit", *arguments])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def test_a_telling_name_of_a_subject_is_found_in_the_paths_of_the_corpus(folders, monkeypatch, capsys):
    paths = {
        "sub_1": "in/sub-r001s007/anat/sub-r001s007_T1w.nii.gz",
        "sub_2": "in/sub-r001s008/anat/sub-r001s008_T1w.nii.gz",
    }
    index(folders, dict.fromkeys(paths, folders / "absent.nii.gz"), original_path=paths)
    label(folders, {"r001s007": None, "r009s001": None})

    assert run(monkeypatch, "-d", "500", "-t", "501", "--names_only") == 3
    assert "same name: r001s007 is sub_1__t1" in capsys.readouterr().out
    # The first audit wrote an exclusion, so a pre-training would not see the subject any more.
    assert run(monkeypatch, "-d", "500", "-t", "501", "--names_only") == 0


@pytest.mark.parametrize(
    "cases", [["sub-r001s007_ses-1", "sub-r001s007_ses-2"], ["sub-r001s007_ses-1", "sub-r001s008_ses-1"]]
)
def test_a_name_is_found_however_many_sessions_of_its_subject_are_labelled(folders, cases):
    paths = {"sub_1": "in/sub-r001s007/anat/sub-r001s007_T1w.nii.gz"}
    index(folders, dict.fromkeys(paths, folders / "absent.nii.gz"), original_path=paths)
    sources = {case: f"/data/server2024/{case.split('_')[0]}/{case}_T1w.nii.gz" for case in cases}
    label(folders, dict.fromkeys(cases), sources)

    found = audit(500, 501, content=False)

    assert [pair.case for pair in found.pairs] == [case for case in cases if "r001s007" in case]
    assert found.still_in == ["DS/sub_1"]


def test_what_a_store_still_holds_is_not_called_left_out(folders, monkeypatch):
    paths = {"sub_1": "in/sub-r001s007/anat/sub-r001s007_T1w.nii.gz"}
    raw = index(folders, dict.fromkeys(paths, folders / "absent.nii.gz"), original_path=paths)
    label(folders, {"r001s007": None})
    store = folders / "nnUNet_preprocessed" / raw.name
    store.mkdir()
    (store / "manifest.tsv").write_text((raw / "manifest.tsv").read_text())

    assert run(monkeypatch, "-d", "500", "-t", "501", "--names_only") == 3
    assert run(monkeypatch, "-d", "500", "-t", "501", "--names_only") == 3


@pytest.mark.parametrize("name", ["sub-01", "sub-1", "sub-patient1", "t1"])
def test_a_name_that_any_two_data_sets_share_says_nothing(folders, monkeypatch, name):
    paths = {"sub_1": f"in/disk2024/{name}/anat/{name}_T1w.nii.gz"}
    index(folders, dict.fromkeys(paths, folders / "absent.nii.gz"), original_path=paths)
    label(folders, {"case": None}, {"case": f"/data/disk2025/{name}/anat/{name}_T1w.nii.gz"})

    assert run(monkeypatch, "-d", "500", "-t", "501", "--names_only") == 0


def test_a_folder_that_two_corpora_lie_in_is_no_name_of_a_subject(folders, monkeypatch):
    paths = {f"sub_{number}": f"server2024/sub-{number}/t1.nii.gz" for number in range(3)}
    index(folders, dict.fromkeys(paths, folders / "absent.nii.gz"), original_path=paths)
    label(folders, {"a": None, "b": None}, {"a": "/server2024/x/1.nii.gz", "b": "/server2024/x/2.nii.gz"})

    assert run(monkeypatch, "-d", "500", "-t", "501", "--names_only") == 0


def test_a_subject_of_soop_is_known_by_its_number_in_isles26(folders):
    paths = {"sub_1": "SOOP/sub-468/anat/sub-468_T1w.nii.gz", "sub_2": "SOOP/sub-469/anat/sub-469_T1w.nii.gz"}
    other = dict.fromkeys(paths, "PT014_SOOP")
    index(folders, dict.fromkeys(paths, folders / "absent.nii.gz"), original_path=paths, dataset_doi=other)
    label(folders, {"soop0468": None, "r001s001": None}, name="Dataset504_ATLASv3")

    found = audit(500, 504, content=False)

    assert [(pair.case, pair.subject, pair.verdict) for pair in found.pairs] == [("soop0468", "DS/sub_1", "same name")]
    assert set(found.origins) == {"SOOP"}


def test_origins_that_both_name_are_told_although_no_subject_is_met(folders, monkeypatch, capsys):
    index(folders, {"sub_1": folders / "absent.nii.gz"}, dataset_doi={"sub_1": "doi:10.18112/openneuro.ds004889.v1"})
    label(folders, {"r001s001": None}, name="Dataset504_ATLASv3")

    assert run(monkeypatch, "-d", "500", "-t", "504", "--names_only") == 3
    assert "both have data of SOOP" in capsys.readouterr().out


def test_the_users_own_folders_are_no_origin(folders):
    index(folders, {"sub_1": folders / "bonn" / "absent.nii.gz"}, original_path={"sub_1": "sub-1/t1.nii.gz"})
    label(folders, {"a": None, "b": None}, {"a": "/bonn/ideas/one/a.nii.gz", "b": "/bonn/ideas/two/b.nii.gz"})

    assert audit(500, 501, content=False).origins == {}


def test_what_cannot_be_compared_is_told_and_spoils_nothing(folders):
    index(folders, {"sub_1": folders / "absent.nii.gz"})
    label(folders, {"broken": None})

    found = audit(500, 501)

    table = pd.read_csv(found.folder / "not_compared.tsv", sep="\t")
    assert len(table) == 2
    assert found.pairs == []
    assert found.verdict["corpus_scans_compared"] == 0


@pytest.mark.parametrize("content", [False, True], ids=["names only", "files are gone"])
def test_an_audit_that_sees_less_takes_no_exclusion_back(folders, content):
    raw = index(folders, dict.fromkeys(["sub_1", "sub_2"], folders / "absent.nii.gz"))
    label(folders, {"a": None})
    file = raw / EXCLUSIONS / "Dataset501_Labelled.txt"
    file.parent.mkdir()
    file.write_text("# an earlier audit compared the images\nDS/sub_1\nDS/gone\n")

    found = audit(500, 501, content=content)

    assert found.pairs == []
    assert verdicts_of(folders / "encoder.safetensors", raw.name) == [found.verdict], "model cards quote it"
    assert read_exclusions(file) == ["DS/sub_1"]
    assert found.verdict["subjects_to_exclude"] == 1
    assert found.still_in == []
    assert "1 more subjects were found by an earlier audit" in describe(found)

    store = folders / "nnUNet_preprocessed" / raw.name
    store.mkdir()
    (store / "manifest.tsv").write_text((raw / "manifest.tsv").read_text())
    assert audit(500, 501, content=content).still_in == ["DS/sub_1"]


def test_long_parts_of_an_audit_show_a_live_line_with_what_to_look_at(folders, capsys):
    index(folders, {"sub_1": folders / "absent.nii.gz"})
    label(folders, {"broken": None})

    audit(500, 501)

    lines = re.split("[\r\n]", capsys.readouterr().err)
    for name in ("Dataset500_Corpus", "Dataset501_Labelled"):
        line = next(one for one in reversed(lines) if one.startswith(f"Fingerprints of {name}: 100%"))
        assert "1/1" in line
        assert "not compared=1" in line


@pytest.mark.parametrize("processes", [1, 2])
def test_a_pair_that_could_not_be_looked_at_says_why(folders, processes, capsys):
    scans = read_index(index(folders, {"sub_1": folders / "absent.nii.gz"}))
    image = folders / "broken.nii.gz"
    image.write_bytes(b"no image")
    alike = Fingerprint(np.random.default_rng(0).integers(-99, 99, 13548).astype(np.int8), np.eye(4))
    case = LabelledCase(name="a", images=(image,), sources=())

    (pair,) = pairs_by_content(scans, [case], {scans["path"][0]: alike}, {str(image): alike}, processes)

    assert (pair.verdict, pair.subject) == ("alike", "DS/sub_1")
    assert "broken.nii.gz" in pair.reason
    assert "alike=1" in capsys.readouterr().err.rsplit("\r", 1)[-1], "the live line counts verdicts"


def test_a_head_that_is_two_subjects_is_found_as_both_however_many_scans_one_has(folders):
    names = ["again", *(f"often_{number}" for number in range(9))]
    rows = pd.DataFrame({"scan_id": names, "subject": [name.split("_")[0] for name in names]}).assign(path=names)
    alike = Fingerprint(np.random.default_rng(0).integers(-99, 99, 13548).astype(np.int8), np.eye(4))
    case = LabelledCase(name="a", images=(folders / "image.nii.gz",), sources=())

    pairs = pairs_by_content(rows, [case], dict.fromkeys(names, alike), {str(case.images[0]): alike})

    assert {pair.subject for pair in pairs} == {"again", "often"}


@pytest.mark.parametrize("value", [0.0, 5.0, np.nan])
def test_an_image_that_shows_nothing_is_told_and_not_compared(folders, value):
    grid = Volume.empty((40, 48, 40), np.diag([4.0, 4.0, 4.0, 1.0]))
    index(folders, {"sub_1": folders / "absent.nii.gz"})
    label(folders, {"empty": grid.with_array(np.full((40, 48, 40), value, np.float32))})

    found = audit(500, 501)

    assert found.verdict["labelled_images_compared"] == 0
    reasons = pd.read_csv(found.folder / "not_compared.tsv", sep="\t").set_index("path")["reason"]
    (reason,) = (text for path, text in reasons.items() if "empty" in path)
    assert reason == "the image is constant"


@pytest.mark.parametrize(
    ("corpus", "labelled", "words"), [("501", "500", "no corpus for pre-training"), ("500", "500", "no image in")]
)
def test_data_sets_of_the_wrong_kind_are_refused(folders, monkeypatch, corpus, labelled, words):
    index(folders, {"sub_1": folders / "absent.nii.gz"})
    label(folders, {"a": None})

    assert words in run(monkeypatch, "-d", corpus, "-t", labelled, "--names_only")


@pytest.mark.parametrize("subject", ["DS/sub_1", "DS [old]/sub*1", "DS/sub?"])
def test_exclusions_mean_the_subject_found_whatever_its_name_and_nobody_else(folders, subject):
    paths = {"sub_1": "in/sub-r001s007/t1.nii.gz", "sub_2": "in/sub-r001s008/t1.nii.gz"}
    raw = index(folders, dict.fromkeys(paths, folders / "absent.nii.gz"), original_path=paths)
    manifest = pd.read_csv(raw / "manifest.tsv", sep="\t", dtype=str, keep_default_na=False)
    manifest.replace({"subject": {"DS/sub_1": subject}}).to_csv(raw / "manifest.tsv", sep="\t", index=False)
    label(folders, {"r001s007": None})

    audit(500, 501, content=False)

    left = without(read_index(raw), standing_exclusions(raw))
    assert list(left["subject"]) == ["DS/sub_2"]


@pytest.mark.parametrize(
    ("weights", "status", "told"),
    [
        ("brainsegfounder-atlas", 3, "42,271 subjects"),
        ("brainsegfounder-ukb", 0, "nothing is known of it"),
        ("nnfoundation-cnn", 0, "not listed"),
    ],
)
def test_what_is_told_of_published_weights_is_told_with_its_source(folders, monkeypatch, capsys, weights, status, told):
    label(folders, {"r001s001": None}, name="Dataset501_ATLASv2")

    assert run(monkeypatch, "--weights", weights, "-t", "501") == status
    assert told in capsys.readouterr().out
