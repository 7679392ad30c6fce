import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from nnunet_ssl.corpus.indexing import index_corpus
from nnunet_ssl.corpus.layouts import detect_layout, find_scans
from nnunet_ssl.errors import UserError

SCRIPT = Path(__file__).parents[2] / "dataset_conversion" / "Dataset500_FOMO60K.py"


@pytest.fixture
def raw(tmp_path, monkeypatch):
    folder = tmp_path / "nnUNet_raw"
    monkeypatch.setenv("nnUNet_raw", str(folder))
    return folder


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def rows(scans, *columns):
    return [tuple(row) for row in scans[list(columns)].itertuples(index=False)]


@pytest.fixture
def layout_a(tmp_path):
    root = touch(
        tmp_path / "fomo-60k",
        "sub_1/ses_1/t1.nii.gz", "sub_1/ses_1/t1_2.nii.gz", "sub_1/ses_1/scan_1.nii.gz", "sub_1/ses_1/t2s.nii",
        "sub_1/ses_2/dwi_12.nii.gz", "sub_10/ses_1/t1c.nii.gz",
        "sub_1/ses_1/.t1.nii.gz", "sub_1/ses_1/notes.txt", "README.md",
    )  # fmt: skip
    (root / "participants.tsv").write_text(
        "dataset\tparticipant_id\tsession_id\tsex\tage\nOASIS\tsub_1\tses_1\tF\t31\nOASIS\tsub_1\tses_2\tF\tn/a\n"
    )
    return root


@pytest.fixture
def layout_b(tmp_path):
    root = touch(
        tmp_path / "FOMO60K",
        "PT001_OASIS1/sub_1/ses_1/t1.nii.gz", "PT001_OASIS1/sub_1/ses_1/flair.nii.gz",
        "PT002_IXI/sub_1/ses_1/t1.nii.gz", "PT002_IXI/sub_2/ses_1/pd.nii.gz",
    )  # fmt: skip
    (root / "participants.tsv").write_text(
        "dataset\tparticipant_id\tsession_id\tsex\tage\thandedness\n"
        "PT001_OASIS1\tsub_1\tses_1\tF\t74\tright\nPT002_IXI\tsub_1\tses_1\tM\t35.8\tn/a\n",
        encoding="utf-8-sig",
    )
    (root / "mapping.tsv").write_text(
        "dataset\tparticipant_id\tsession_id\tfilename\toriginal_path\n"
        "PT002_IXI\tsub_2\tses_1\tpd.nii.gz\tds004199/sub-00001/anat/x_PD.nii.gz\n"
    )
    (root / "mri_info.tsv").write_text(
        "dataset\tparticipant_id\tsession_id\tfilename\tModality\tMagneticFieldStrength\n"
        "PT001_OASIS1\tsub_1\tses_1\tflair.nii.gz\tMR\t1.5\n"
    )
    return root


@pytest.fixture
def bids(tmp_path):
    root = touch(
        tmp_path / "ds9",
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz", "sub-01/ses-a/anat/sub-01_ses-a_ce-gad_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w.nii.gz", "sub-01/ses-a/anat/sub-01_ses-a_part-phase_T2starw.nii.gz",
        "sub-01/ses-a/dwi/sub-01_ses-a_dwi.nii.gz", "sub-01/ses-a/func/sub-01_ses-a_task-rest_bold.nii.gz",
        "sub-02/anat/sub-02_FLAIR.nii.gz", "sub-02/anat/sub-02_FLAIR_roi.nii.gz",
        "derivatives/fs/sub-02/anat/sub-02_T1w.nii.gz",
    )  # fmt: skip
    (root / "participants.tsv").write_text("participant_id\tage\tsex\tgroup\nsub-02\t8\tm\tpatient\n")
    return root


def test_fomo_layout_a(layout_a):
    scans = find_scans(layout_a)
    assert rows(scans, "scan_id", "modality", "repeat") == [
        ("fomo-60k__sub_1__ses_1__scan_1", "unknown", 1),
        ("fomo-60k__sub_1__ses_1__t1", "t1", 1),
        ("fomo-60k__sub_1__ses_1__t1_2", "t1", 2),
        ("fomo-60k__sub_1__ses_1__t2s", "t2s", 1),
        ("fomo-60k__sub_1__ses_2__dwi_12", "dwi", 12),
        ("fomo-60k__sub_10__ses_1__t1c", "t1c", 1),
    ]
    assert set(scans["subject"]) == {"fomo-60k/sub_1", "fomo-60k/sub_10"}
    assert set(rows(scans, "session", "dataset", "age", "sex")) == {
        ("fomo-60k/sub_1/ses_1", "OASIS", "31", "F"),
        ("fomo-60k/sub_1/ses_2", "OASIS", "", "F"),
        ("fomo-60k/sub_10/ses_1", "fomo-60k", "", ""),
    }


def test_fomo_layout_b_keys_subjects_by_data_set(layout_b):
    scans = find_scans(layout_b)
    assert rows(scans, "dataset", "subject", "session", "modality", "age", "sex", "handedness") == [
        ("PT001_OASIS1", "PT001_OASIS1/sub_1", "PT001_OASIS1/sub_1/ses_1", "flair", "74", "F", "right"),
        ("PT001_OASIS1", "PT001_OASIS1/sub_1", "PT001_OASIS1/sub_1/ses_1", "t1", "74", "F", "right"),
        ("PT002_IXI", "PT002_IXI/sub_1", "PT002_IXI/sub_1/ses_1", "t1", "35.8", "M", ""),
        ("PT002_IXI", "PT002_IXI/sub_2", "PT002_IXI/sub_2/ses_1", "pd", "", "", ""),
    ]
    assert list(scans["MagneticFieldStrength"]) == ["1.5", "", "", ""]


def test_bids(bids):
    scans = find_scans(bids)
    assert set(rows(scans, "session", "modality", "repeat", "age")) == {
        ("ds9/sub-01/ses-a", "t1", 1, ""),
        ("ds9/sub-01/ses-a", "t1", 2, ""),
        ("ds9/sub-01/ses-a", "t1c", 1, ""),
        ("ds9/sub-01/ses-a", "unknown", 1, ""),
        ("ds9/sub-01/ses-a", "dwi", 1, ""),
        ("ds9/sub-02/ses-1", "flair", 1, "8"),
    }


def test_a_folder_of_bids_trees(bids):
    touch(bids.parent / "ds10", "sub-01/anat/sub-01_T2w.nii.gz")
    bids.rename(bids.parent / "all")
    (bids.parent / "trees").mkdir()
    for name in ("all", "ds10"):
        (bids.parent / name).rename(bids.parent / "trees" / name)
    scans = find_scans(bids.parent / "trees")
    assert set(scans["subject"]) == {"all/sub-01", "all/sub-02", "ds10/sub-01"}
    assert set(scans["group"]) == {"patient", ""}


def test_fomo300k_has_bids_trees_and_tables_for_all_of_them(raw, tmp_path):
    root = touch(
        tmp_path / "FOMO300K",
        "PT028_OASIS1/sub-1/ses-01/anat/sub-1_ses-01_run-1_T1w.nii.gz",
        "PT028_OASIS1/sub-1/ses-01/anat/sub-1_ses-01_T2w.nii.gz",
        "PT201_X/sub-1/ses-01/anat/sub-1_ses-01_T1w.nii.gz",
        "PT202_Y/sub-1/ses-01/anat/sub-1_ses-01_T1w.nii.gz",
    )  # fmt: skip
    (root / "participants.tsv").write_text(
        "dataset\tparticipant_id\tsession_id\tage\nPT028_OASIS1\tsub-1\tses-01\t70\nPT202_Y\tsub-1\tses-01\t5\n"
    )
    (root / "mri_info.tsv").write_text(
        "dataset\tparticipant_id\tsession_id\tfilename\tManufacturer\n"
        "PT028_OASIS1\tsub-1\tses-01\tsub-1/ses-01/anat/sub-1_ses-01_T2w.nii.gz\tGE\n"
    )
    (root / "mapping.tsv").write_text(
        "dataset\told_path\tnew_filename\tparticipant_id\tsession_id\n"
        "PT201_X\tds004199/sub-00003/anat\tsub-1_ses-01_T1w.nii.gz\tsub-1\tses-01\n"
    )
    _, scans = index_corpus(root, 500, "FOMO300K")
    assert rows(scans, "dataset", "modality", "age", "Manufacturer") == [
        ("PT028_OASIS1", "t2", "70", "GE"),
        ("PT028_OASIS1", "t1", "70", ""),
        ("PT202_Y", "t1", "5", ""),
    ], "X is left out: it comes from Bonn"


def test_nnssl_collection_with_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENMIND", "/data/openmind")
    image = {"name": "a.nii.gz", "modality": "T1w", "image_path": "$OPENMIND/a.nii.gz", "associated_masks": {}}
    other = {"name": "b.nii.gz", "modality": "T2-FLAIR", "image_path": "images/b.nii.gz"}
    seg = {"name": "b_seg.nii.gz", "modality": "", "image_path": "/elsewhere/b_seg.nii.gz"}
    subject = {"subject_info": {"age": 30, "sex": None}, "sessions": {"s1": {"images": [image, other, seg]}}}
    collection = {
        "collection_index": 745,
        "collection_name": "OpenMind",
        "datasets": {"ds000001": {"subjects": {"sub-1": subject}}},
    }
    file = tmp_path / "pretrain_data.json"
    file.write_text(json.dumps(collection))
    for source in (file, tmp_path):
        scans = find_scans(source)
        assert set(rows(scans, "modality", "path", "age", "sex", "session")) == {
            ("t1", "/data/openmind/a.nii.gz", "30", "", "ds000001/sub-1/s1"),
            ("flair", str(tmp_path / "images/b.nii.gz"), "30", "", "ds000001/sub-1/s1"),
            ("unknown", "/elsewhere/b_seg.nii.gz", "30", "", "ds000001/sub-1/s1"),
        }
        assert not scans["scan_id"].str.endswith("_seg").any(), "nnU-Net would take it for a segmentation"
    monkeypatch.delenv("OPENMIND")
    with pytest.raises(UserError, match=r"\$OPENMIND.*not set"):
        find_scans(file)
    file.write_text('{"datasets": []}')
    with pytest.raises(UserError, match="not a collection as nnssl writes it"):
        find_scans(file)


def test_unknown_layouts_and_empty_folders_are_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of those known"):
        detect_layout(tmp_path / "empty")
    with pytest.raises(UserError, match=r"No \.nii"):
        find_scans(tmp_path / "empty", "bids")
    with pytest.raises(UserError, match="does not exist"):
        find_scans(tmp_path / "absent")


def test_twins_are_refused_until_one_of_them_is_excluded(raw, layout_a):
    touch(layout_a, "sub_1/ses_1/t1.nii")
    with pytest.raises(UserError, match=r"sub_1__ses_1__t1 stands for .*t1\.nii and .*t1\.nii\.gz"):
        index_corpus(layout_a, 500, "FOMO60K")
    _, scans = index_corpus(layout_a, 500, "FOMO60K", exclude=["*/sub_1/ses_1/t1.nii"])
    assert scans["path"].str.endswith("t1.nii.gz").sum() == 1


def test_spaces_and_capitals_in_names_are_read(raw, tmp_path):
    root = touch(tmp_path / "my data", "sub_1/ses_1/T1.NII.GZ", "SUB_2/SES_1/Flair_2.nii")
    _, scans = index_corpus(root, 500, "FOMO60K")
    assert rows(scans, "scan_id", "subject", "modality", "repeat") == [
        ("my_data__SUB_2__SES_1__Flair_2", "my data/SUB_2", "flair", 2),
        ("my_data__sub_1__ses_1__T1", "my data/sub_1", "t1", 1),
    ]


def test_a_path_with_dots_is_named_after_the_folder_it_means(layout_a):
    assert set(find_scans(layout_a / "sub_1" / "..")["subject"]) == {"fomo-60k/sub_1", "fomo-60k/sub_10"}


def test_a_table_without_data_sets_says_nothing_of_subjects_whose_numbers_repeat(layout_b, caplog):
    (layout_b / "participants.tsv").write_text("participant_id\tage\nsub_1\t70\n")
    assert set(find_scans(layout_b)["age"]) == {""}
    assert "participants.tsv is not used: it has no column dataset" in caplog.text


def test_empty_foreign_and_broken_tables(layout_b):
    (layout_b / "mapping.tsv").write_text("")
    (layout_b / "participants.tsv").write_bytes(b"dataset\tparticipant_id\tgroup\nPT002_IXI\tsub_1\tM\xfcnchen\n")
    assert "M�nchen" in set(find_scans(layout_b)["group"])
    (layout_b / "participants.tsv").write_text("dataset\tparticipant_id\nPT002_IXI\tsub_1\t1\t2\nx\n1\t2\t3\t4\t5\n")
    with pytest.raises(UserError, match=r"participants\.tsv is no table of tab-separated values"):
        find_scans(layout_b)


def test_dangling_links_are_indexed_so_that_preparation_can_report_them(bids):
    (bids / "sub-02/anat/sub-02_T1w.nii.gz").symlink_to("../../.git/annex/objects/x")
    assert "t1" in set(find_scans(bids).query("subject == 'ds9/sub-02'")["modality"])


def test_subjects_of_the_bonn_test_set_are_left_out_and_named(raw, layout_b, tmp_path, caplog):
    touch(layout_b, "PT002_IXI/sub_2/ses_1/t1.nii.gz")  # no table speaks of this scan, but its subject is Bonn's
    _, scans = index_corpus(layout_b, 500, "FOMO60K")
    assert set(scans["subject"]) == {"PT001_OASIS1/sub_1", "PT002_IXI/sub_1"}
    assert "1 subjects of ds004199 (Bonn FCD-II" in caplog.text
    described = touch(tmp_path / "bonn", "sub-1/anat/sub-1_T1w.nii.gz")
    (described / "dataset_description.json").write_text('{"DatasetDOI": "doi:10.18112/openneuro.ds004199.v1.0.5"}')
    with pytest.raises(UserError, match="nothing is left"):
        index_corpus(described, 501, "Described")
    named = touch(tmp_path / "named", "PT014_Bonn/sub_1/ses_1/t1.nii.gz", "PT015_X/sub_1/ses_1/t1.nii.gz")
    assert set(index_corpus(named, 502, "Named")[1]["dataset"]) == {"PT015_X"}


def test_exclusions_by_data_set_subject_session_scan_and_wildcard(raw, layout_a, caplog):
    index = lambda *names: index_corpus(layout_a, 500, "FOMO60K", exclude=names)[1]  # noqa: E731
    everything = len(index())
    assert len(index("OASIS")) == everything - 5
    assert len(index("fomo-60k/sub_1")) == everything - 5
    assert len(index("fomo-60k/sub_1/ses_2")) == everything - 1
    assert len(index("*__scan_*", "fomo-60k__sub_10__ses_1__t1c")) == everything - 2
    assert len(index("fomo-60k/sub_99")) == everything
    assert "'fomo-60k/sub_99' matches no" in caplog.text


def test_an_id_belongs_to_one_data_set(raw, layout_a):
    index_corpus(layout_a, 500, "FOMO60K")
    with pytest.raises(UserError, match="belongs to Dataset500_FOMO60K"):
        index_corpus(layout_a, 500, "Other")


def test_the_command_writes_a_manifest_and_prints_what_the_objectives_can_use(raw, layout_a, tmp_path):
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("# a comment\n\nfomo-60k/sub_10  # and another\n")
    done = subprocess.run(
        [sys.executable, SCRIPT, "-i", layout_a, "--exclude", exclude], capture_output=True, text=True, check=True
    )
    assert "1 subjects, 2 sessions, 5 scans (t1 2, t2s 1, dwi 1, unknown 1)" in done.stdout
    assert "MCL (two modalities): 1; for CL (the same): 1; for MIM only: 1" in done.stdout
    folder = raw / "Dataset500_FOMO60K"
    manifest = pd.read_csv(folder / "manifest.tsv", sep="\t")
    assert len(manifest) == 5
    assert all(os.path.isfile(path) for path in manifest["path"])  # noqa: PTH113
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 5


def test_the_command_explains_a_wrong_folder_in_one_line(raw, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "-i", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: The layout of")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_hundred_thousand_files_are_indexed_in_under_a_minute(raw, tmp_path):
    root = tmp_path / "FOMO300K"
    for dataset in range(10):
        for subject in range(2500):
            session = root / f"PT{dataset:03d}_X" / f"sub_{subject}" / "ses_1"
            session.mkdir(parents=True)
            for stem in ("t1", "t2", "flair", "scan_1"):
                (session / f"{stem}.nii.gz").touch()
    keys = [(f"PT{dataset:03d}_X", f"sub_{subject}") for dataset in range(10) for subject in range(2500)]
    table = "".join(f"{dataset}\t{subject}\tses_1\tF\t50\n" for dataset, subject in keys)
    (root / "participants.tsv").write_text("dataset\tparticipant_id\tsession_id\tsex\tage\n" + table)
    start = time.perf_counter()
    _, scans = index_corpus(root, 500, "FOMO300K")
    assert len(scans) == 100_000
    assert time.perf_counter() - start < 60


def test_label_maps_are_left_out_and_counted_with_an_example(bids, caplog):
    anat = "sub-02/anat/sub-02_{}.nii.gz"
    touch(bids, *(anat.format(name) for name in ("aparc", "T1w_lesion", "T1map_ROI1", "T2w_seg", "T1map")))
    caplog.set_level("INFO")
    found = {Path(path).name for path in find_scans(bids)["path"]}
    assert found.isdisjoint(Path(anat.format(name)).name for name in ("aparc", "T1w_lesion", "T1map_ROI1", "T2w_seg"))
    assert "sub-02_T1map.nii.gz" in found
    assert "Left out: 5 label maps" in caplog.text and "such as" in caplog.text, "these four and a roi"


def test_a_tree_of_label_maps_alone_is_an_error(tmp_path):
    touch(tmp_path / "ds", "sub-1/anat/sub-1_T1w_seg.nii.gz")
    with pytest.raises(UserError, match="only label maps"):
        find_scans(tmp_path / "ds")


def test_what_has_a_contrasts_suffix_and_another_look_is_unknown(tmp_path):
    stems = ("inv-1_MP2RAGE", "inv-2_MP2RAGE", "UNIT1", "acq-spine_T1w", "acq-mprage_T1w", "run-2_T1w")
    root = touch(tmp_path / "ds", *(f"sub-1/anat/sub-1_{stem}.nii.gz" for stem in stems))
    (root / "sub-1/anat/sub-1_run-2_T1w.json").write_text('{"BodyPartExamined": "CSPINE"}')
    (root / "sub-1/anat/sub-1_acq-mprage_T1w.json").write_text('{"BodyPartExamined": "HEAD"}')
    scans = find_scans(root)
    modality = {Path(scan.path).name[6:-7]: scan.modality for scan in scans.itertuples()}
    assert modality == dict.fromkeys(stems, "unknown") | {"UNIT1": "t1", "acq-mprage_T1w": "t1"}


@pytest.mark.parametrize("written", [("1", "2"), ("01", "02"), ("sub-1", "sub-2"), ("SUB_001", "sub_2"), (" 1 ", "2")])
def test_rows_find_their_subjects_though_prefix_and_padding_differ(bids, written, caplog):
    one, two = written
    (bids / "participants.tsv").write_text(f"participant_id\tage\tsex\n{two}\t8\tm\n{one}\t61\tf\n99\t4\tf\n")
    with caplog.at_level(logging.INFO):
        scans = find_scans(bids)
    assert set(rows(scans, "subject", "age", "sex")) == {("ds9/sub-01", "61", "f"), ("ds9/sub-02", "8", "m")}
    assert "1 of 3 rows speak of nothing here, such as 99" in caplog.text


def test_subjects_without_a_row_and_contradicting_rows_are_counted(bids, caplog):
    (bids / "participants.tsv").write_text("participant_id\tage\nsub-02\t8\nsub-02\t9\nsub-2\t10\n")
    assert set(rows(find_scans(bids), "subject", "age")) == {("ds9/sub-01", ""), ("ds9/sub-02", "8")}
    assert "1 of 3 rows speak of nothing here, such as sub-2; 1 subjects have no row, such as sub-01" in caplog.text
    assert "1 rows contradict an earlier one of the same name, which counts" in caplog.text


def test_sessions_and_data_sets_are_matched_with_their_subjects(layout_b, caplog):
    (layout_b / "participants.tsv").write_text(
        "dataset\tparticipant_id\tsession_id\tage\n"
        "PT001_OASIS1\t1\t01\t74\nPT002_IXI\t001\tses-1\t35\nPT002_IXI\tsub_2\t1\t36\n"
    )
    with caplog.at_level(logging.WARNING):
        scans = find_scans(layout_b).query("modality != 'flair'")
    assert rows(scans, "subject", "age") == [
        ("PT001_OASIS1/sub_1", "74"), ("PT002_IXI/sub_1", "35"), ("PT002_IXI/sub_2", "36")
    ]  # fmt: skip
    assert "participants.tsv" not in caplog.text


def test_a_table_that_matches_as_it_is_written_needs_no_word(bids, caplog):
    (bids / "participants.tsv").write_text("participant_id\tage\nsub-01\t61\nsub-02\t8\n")
    with caplog.at_level(logging.INFO):
        find_scans(bids)
    assert "participants.tsv" not in caplog.text


def test_images_where_the_layout_has_no_place_for_them_are_counted_and_listed(raw, bids, tmp_path, caplog):
    touch(
        bids,
        "sub-01/anat/sub-01_T1w.nii.gz", "sub-02/ses-2/sub-02_ses-2_T1w.nii.gz", "sub-02/ses-2/anat/x_T1w.nii",
        "extra/T1w.NII.GZ", "sub-01/loose.nii.gz", ".git/annex/objects/x.nii.gz", "sub-01/ses-a/anat/.hidden.nii.gz",
    )  # fmt: skip
    (bids / "zzz").symlink_to(bids / "sub-01")  # the same files once more
    folder, scans = index_corpus(bids, 500, "FOMO60K")
    unused = (folder / "unused.txt").read_text().splitlines()
    assert unused == [
        "derivatives/fs/sub-02/anat/sub-02_T1w.nii.gz",
        "extra/T1w.NII.GZ",
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/loose.nii.gz",
        "sub-01/ses-a/func/sub-01_ses-a_task-rest_bold.nii.gz",
        "sub-02/anat/sub-02_FLAIR.nii.gz",  # sub-02 has sessions now
        "sub-02/anat/sub-02_FLAIR_roi.nii.gz",
        "sub-02/ses-2/sub-02_ses-2_T1w.nii.gz",
    ]
    assert "8 NIfTI files were not used: 3 in sub-*/anat, such as sub-01/anat/sub-01_T1w.nii.gz; " in caplog.text
    everything = [path for path in bids.rglob("*.[nN]*") if not any(part.startswith(".") for part in path.parts)]
    images = {path.resolve() for path in everything if path.name.lower().endswith((".nii", ".nii.gz"))}
    assert images == {(bids / name).resolve() for name in unused} | {Path(path).resolve() for path in scans["path"]}


@pytest.mark.parametrize(("layout", "subject"), [("layout_a", "sub_1"), ("layout_b", "PT001_OASIS1/sub_1")])
def test_fomo_has_unused_images_too(raw, layout, subject, request, caplog):
    root = request.getfixturevalue(layout)
    folder, _ = index_corpus(root, 500, "FOMO60K")
    assert (folder / "unused.txt").read_text() == "" and "not used" not in caplog.text
    misplaced = [f"{subject}/t1.nii.gz", f"{subject}/ses_1/more/t1.nii.gz", "other/t1.nii.gz"]
    touch(root, *misplaced)
    folder, _ = index_corpus(root, 500, "FOMO60K")
    assert sorted((folder / "unused.txt").read_text().splitlines()) == sorted(misplaced)


def test_excluded_scans_are_not_called_unused_and_nnssls_list_is_what_is_meant(raw, layout_a, tmp_path):
    folder, _ = index_corpus(layout_a, 500, "FOMO60K", exclude=["fomo-60k/sub_1"])
    assert (folder / "unused.txt").read_text() == ""
    image = {"name": "t1.nii.gz", "modality": "T1w", "image_path": "sub_1/ses_1/t1.nii.gz"}
    subjects = {"s": {"sessions": {"1": {"images": [image]}}}}
    (layout_a / "pretrain_data.json").write_text(json.dumps({"datasets": {"d": {"subjects": subjects}}}))
    folder, _ = index_corpus(layout_a, 501, "Listed")
    assert (folder / "unused.txt").read_text() == ""
