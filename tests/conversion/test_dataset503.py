import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunet_ssl.conversion.fcd_bonn import INFO, find_cases, prepare
from nnunet_ssl.errors import UserError

SHAPE, T1_SHAPE = (20, 36, 30), (30, 44, 40)
FLAIR_AFFINE = np.array([[-3.0, 0, 0, 28.5], [0, 2.0, 0, -35], [0, 0, 2.0, -29], [0, 0, 0, 1]])  # LAS
T1_AFFINE = np.array([[0, 0, -2.0, 40], [2.0, 0, 0, -31], [0, -2.0, 0, 40], [0, 0, 0, 1]])  # anterior, inferior, left
COLUMNS = ["participant_id", "group", "sex", "age_epilepsyonset", "age_scan", "hemisphere", "lobe", "split"]
PEOPLE = {  # subject -> group, split, T1 stem, FLAIR stem, ROI stem
    "00001": ("fcd", "train", "acq-sag111_T1w", "acq-tse3dvfl_FLAIR", "acq-tse3dvfl_FLAIR_roi"),
    "00003": ("fcd", "test", "acq-iso08_T1w", "acq-T2sel_FLAIR", "acq-T2sel_FLAIR_roi"),
    "00048": ("fcd", "train", "acq-iso08_T1w", "acq-T2sel_FLAIR", "acq-32ch10_FLAIR_roi"),
    "00060": ("fcd", "train", "acq-sag111VNS_T1w", "acq-corhipp4mm_FLAIR", "acq-corhipp4mm_FLAIR_roi"),
    "00101": ("hc", "train", "acq-iso08_T1w", "acq-T2sel_FLAIR", None),
    "00102": ("hc", "train", "acq-iso08_T1w", "acq-T2sel_FLAIR", None),
    "00103": ("hc", "train", "acq-iso08_T1w", "acq-T2sel_FLAIR", None),
}


def roi(number):
    mask = np.zeros(SHAPE, bool)
    mask[8:11, 15 : 18 + number % 3, 12:15] = True
    mask[3, 18, 14] = True
    return mask


def write_subject(tools, root, subject, *, files_only=False):
    _, _, t1, flair, roi_stem = PEOPLE[subject]
    anat = root / f"sub-{subject}" / "anat"
    number = int(subject)
    if files_only:
        images = np.ones((4, 4, 4), np.int16), np.ones((4, 4, 4), np.int16), np.ones((4, 4, 4), np.uint8)
    else:
        images = (
            tools.draw_head(SHAPE, FLAIR_AFFINE, (400, 300, 100), seed=number).astype(np.int16),
            tools.draw_head(T1_SHAPE, T1_AFFINE, (250, 350, 90), seed=number).astype(np.int16),
            (roi(number) * 255).astype(np.float64),
        )
    tools.write_nifti(anat / f"sub-{subject}_{flair}.nii.gz", images[0], FLAIR_AFFINE)
    tools.write_nifti(anat / f"sub-{subject}_{t1}.nii.gz", images[1], T1_AFFINE)
    if roi_stem:
        tools.write_nifti(anat / f"sub-{subject}_{roi_stem}.nii.gz", images[2], FLAIR_AFFINE, qform=0, sform=2)


def write_table(root, people=PEOPLE, more=()):
    rows = ["\t".join(COLUMNS)]
    for subject in sorted(people, reverse=True):  # shuffled
        group, split = people[subject][:2]
        patient = ("F", "8", "31", "L", "FL") if group == "fcd" else ("M", "n/a", "n/a", "n/a", "n/a")
        rows.append("\t".join([f"sub-{subject}", group, *patient, split]))
    text = "\r\n".join([*rows, *more]) + "\r\n"
    (root / "participants.tsv").write_bytes(b"\xef\xbb\xbf" + text.encode())


@pytest.fixture(scope="module")
def fcd(tools, tmp_path_factory):
    root = tmp_path_factory.mktemp("fcd") / "ds004199 clone"
    for subject in PEOPLE:
        write_subject(tools, root, subject)
    anat = root / "sub-00001" / "anat"
    (anat / "._sub-00001_acq-sag111_T1w.nii.gz").write_bytes(b"\0\5\26\7")
    (anat / "sub-00001_acq-sag111_T1w.json").write_text("{}")
    annex = root / ".git" / "annex" / "objects"
    annex.mkdir(parents=True)
    tools.write_nifti(annex / "stray.nii.gz", np.ones((4, 4, 4), np.float32))
    for stem in ("acq-iso08_T1w", "acq-T2sel_FLAIR"):
        link = root / "sub-00104" / "anat" / f"sub-00104_{stem}.nii.gz"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../.git/annex/objects/Xq/5K/MD5E-s1--{stem}.nii.gz")
    tools.write_nifti(root / "sub-00999" / "anat" / "sub-00999_T1w.nii.gz", np.ones((4, 4, 4), np.float32))
    write_table(root, PEOPLE | {"00104": ("hc", "train")})
    (root / "participants.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def converted(tools, fcd, tmp_path_factory):
    base = tmp_path_factory.mktemp("fcd_out")
    env = tools.environment(base)
    done = tools.run_script(503, "-i", fcd, "-np", 2, env=env)
    assert done.returncode == 0, done.stderr
    return env, base / "nnUNet_raw" / "Dataset503_FCDBonn", done


def test_both_channels_lie_on_flairs_grid_and_every_roi_voxel_is_kept(converted, fcd, tools):
    _, folder, _ = converted
    assert tools.check_geometry(folder, 2) == {f"sub-{subject}" for subject in PEOPLE}
    for subject, (group, split, _, flair, _) in PEOPLE.items():
        part = {"train": "Tr", "test": "Ts"}[split]
        label = nib.load(folder / f"labels{part}" / f"sub-{subject}.nii.gz").get_fdata()
        np.testing.assert_array_equal(label, roi(int(subject)) if group == "fcd" else np.zeros(SHAPE))
        image = nib.load(folder / f"images{part}" / f"sub-{subject}_0000.nii.gz")
        source = nib.load(fcd / f"sub-{subject}" / "anat" / f"sub-{subject}_{flair}.nii.gz")
        np.testing.assert_array_equal(image.get_fdata(), source.get_fdata())


def test_the_official_test_patients_go_to_images_ts_and_labels_ts(converted):
    _, folder, _ = converted
    assert sorted(path.name for path in (folder / "imagesTs").iterdir()) == [
        "sub-00003_0000.nii.gz",
        "sub-00003_0001.nii.gz",
    ]
    assert [path.name for path in (folder / "labelsTs").iterdir()] == ["sub-00003.nii.gz"]
    described = json.loads((folder / "dataset.json").read_text())
    assert described["numTraining"] == 6 and described["channel_names"] == {"0": "FLAIR", "1": "T1"}


def test_t1_lies_where_the_head_lies_in_flair(converted, tools):
    _, folder, _ = converted
    for subject in PEOPLE:
        part = "Ts" if PEOPLE[subject][1] == "test" else "Tr"
        t1 = nib.load(folder / f"images{part}" / f"sub-{subject}_0001.nii.gz").get_fdata()
        truth = tools.draw_head(SHAPE, FLAIR_AFFINE, (250, 350, 90), seed=int(subject))
        fit = np.corrcoef(t1.ravel(), truth.ravel())[0, 1]
        assert fit > 0.9
        for axis in range(3):
            for step in (-1, 1):
                assert np.corrcoef(np.roll(t1, step, axis).ravel(), truth.ravel())[0, 1] < fit


def test_the_report_tells_the_mismatched_roi_and_what_was_left_out(converted, tools):
    _, folder, done = converted
    report, skipped = tools.report_of(folder), tools.skipped_in(folder)
    assert report["sub-00048"]["notes"] == "ROI named after another scan: sub-00048_acq-32ch10_FLAIR_roi.nii.gz"
    assert report["sub-00101"]["mask_alignment"] == "healthy control" and report["sub-00101"]["notes"] == ""
    assert {row["group"] for row in report.values()} == {"fcd", "hc"}
    assert skipped["sub-00104"] == "no readable flair and no t1 image"
    assert "datalad get" in skipped["sub-00104/anat/sub-00104_acq-T2sel_FLAIR.nii.gz"]
    assert skipped["sub-00999"] == "not in participants.tsv"
    assert not any("stray" in what for what in skipped)
    assert "git-annex link" in done.stdout


def test_every_fold_holds_out_patients_and_controls_alike(converted):
    env, folder, _ = converted
    folds = json.loads(Path(env["nnUNet_preprocessed"], folder.name, "splits_final.json").read_text())
    assert len(folds) == 3  # three patients, three controls
    for fold in folds:
        groups = sorted(PEOPLE[case.removeprefix("sub-")][0] for case in fold["val"])
        assert groups == ["fcd", "hc"]
        assert not set(fold["val"]) & set(fold["train"])


@pytest.mark.slow
def test_no_controls_drops_them_and_a_later_run_brings_them_back(converted, fcd, tools):
    env, folder, _ = converted
    done = tools.run_script(503, "-i", fcd, "--no_controls", "-np", 1, env=env)
    assert done.returncode == 0 and "4 cases; 4 are already converted" in done.stdout, done.stderr
    patients = {f"sub-{subject}" for subject, person in PEOPLE.items() if person[0] == "fcd"}
    assert tools.check_geometry(folder, 2) == patients
    assert tools.skipped_in(folder)["sub-00101"] == "healthy control (--no_controls)"
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 3
    again = tools.run_script(503, "-i", fcd, "-np", 2, env=env)
    assert again.returncode == 0 and "7 cases; 4 are already converted" in again.stdout
    assert tools.check_geometry(folder, 2) == {f"sub-{subject}" for subject in PEOPLE}


def listing(tools, root, people=PEOPLE, **options):
    for subject in people:
        write_subject(tools, root, subject, files_only=True)
    write_table(root, people)
    options = {"channels": ("flair", "t1"), "images_only": False, "controls": True} | options
    return find_cases(root, **options)


def test_the_roi_is_never_taken_for_the_image(tools, tmp_path):
    cases, _ = listing(tools, tmp_path)
    for case in cases:
        assert not any("roi" in path.name for path in case.images.values())
        assert all("roi" in path.name for path in case.masks)


def test_the_flair_that_the_roi_names_is_chosen_of_several(tools, tmp_path):
    anat = tmp_path / "sub-00001" / "anat"
    tools.write_nifti(anat / "sub-00001_acq-T2sel_FLAIR.nii.gz", np.ones((4, 4, 4), np.int16))
    cases, skipped = listing(tools, tmp_path)
    assert cases[0].images["flair"].name == "sub-00001_acq-tse3dvfl_FLAIR.nii.gz"
    assert [item.what for item in skipped if item.what != "participants.tsv"] == [
        "sub-00001/anat/sub-00001_acq-T2sel_FLAIR.nii.gz"
    ]


def test_a_patient_whose_roi_is_missing_is_left_out_not_taken_for_healthy(tools, tmp_path):
    listing(tools, tmp_path)
    (tmp_path / "sub-00003" / "anat" / "sub-00003_acq-T2sel_FLAIR_roi.nii.gz").unlink()
    cases, skipped = find_cases(tmp_path, ("flair", "t1"), images_only=False, controls=True)
    assert "sub-00003" not in {case.id for case in cases}
    assert "without readable ROI" in next(item.reason for item in skipped if item.what == "sub-00003")


def test_with_allow_missing_a_patients_flair_or_a_controls_t1_is_enough(tools, tmp_path):
    listing(tools, tmp_path)
    for gone in ("00001/*/*T1w", "00101/*/*FLAIR", "00003/*/*_FLAIR"):  # patient, control, patient
        next(tmp_path.glob(f"sub-{gone}.nii.gz")).unlink()
    cases, skipped = find_cases(tmp_path, ("flair", "t1"), images_only=False, controls=True, allow_missing=True)
    images = {case.id: list(case.images) for case in cases}
    assert images["sub-00001"] == ["flair"] and images["sub-00101"] == ["t1"]
    reasons = {item.what: item.reason for item in skipped}
    assert reasons["sub-00003"] == "no readable flair image, on whose grid its mask lies"
    prepared = prepare(next(case for case in cases if case.id == "sub-00101"))
    assert list(prepared.channels) == ["t1"]
    cases, _ = find_cases(tmp_path, ("flair", "t1"), images_only=True, controls=True, allow_missing=True)
    assert {case.id: list(case.images) for case in cases}["sub-00003"] == ["t1"], "a new patient has no mask"


def test_flair_alone_needs_no_t1_and_new_patients_no_table(tools, tmp_path):
    listing(tools, tmp_path)
    for path in [*tmp_path.glob("*/anat/*T1w.nii.gz"), tmp_path / "participants.tsv"]:
        path.unlink()
    cases, _ = find_cases(tmp_path, ("flair",), images_only=True, controls=True)
    assert len(cases) == len(PEOPLE) and not any(case.labelled for case in cases)
    with pytest.raises(UserError, match=r"no case that can be prepared.*no readable t1 image"):
        find_cases(tmp_path, ("flair", "t1"), images_only=True, controls=True)
    assert INFO.numbers == {("flair", "t1"): 503, ("flair",): 516, ("t1",): 517}


@pytest.mark.parametrize("name", ["{}/scan_{}", "sub_{}/ses_1/{}", "{}/anat/{}"])
def test_patients_whose_files_are_named_alike_are_never_mixed(name, tools, tmp_path):
    kinds = ("flair", "t1")
    files = {patient: {kind: tmp_path / f"{name.format(patient, kind)}.nii.gz" for kind in kinds} for patient in "ABC"}
    for paths in files.values():
        for path in paths.values():
            tools.write_nifti(path, np.ones((4, 4, 4), np.float32))
    files["A"]["t1"].unlink()
    cases, skipped = find_cases(tmp_path, ("flair", "t1"), images_only=True, controls=True)
    assert [case.images for case in cases] == [files["B"], files["C"]]
    assert len({case.id for case in cases}) == 2
    assert [item.reason for item in skipped] == ["no readable t1 image"]


def test_a_clone_without_its_data_is_told_to_fetch_them(tools, tmp_path):
    write_table(tmp_path)
    for subject in PEOPLE:
        link = tmp_path / f"sub-{subject}" / "anat" / f"sub-{subject}_T1w.nii.gz"
        link.parent.mkdir(parents=True)
        link.symlink_to("../../.git/annex/objects/Xq/5K/MD5E-s1--x.nii.gz")
    with pytest.raises(UserError, match=r"All 7 images.*git-annex links without content.*datalad get"):
        find_cases(tmp_path, ("flair", "t1"), images_only=False, controls=True)


def test_the_table_is_asked_for_when_it_is_missing_or_another(tools, tmp_path):
    write_subject(tools, tmp_path, "00001", files_only=True)
    with pytest.raises(UserError, match=r"no participants\.tsv"):
        find_cases(tmp_path, ("flair",), images_only=False, controls=True)
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-00001\t3\n")
    with pytest.raises(UserError, match="lacks the columns group, split"):
        find_cases(tmp_path, ("flair",), images_only=False, controls=True)


@pytest.mark.slow
def test_nnunet_plans_and_preprocesses_it_with_its_integrity_check(converted, tools):
    training = {f"sub-{subject}" for subject, person in PEOPLE.items() if person[1] == "train"}
    assert tools.plan_and_preprocess(503, converted[0]) == training


@pytest.mark.parametrize("written", ["{}", "{:d}", "sub-{:d}", "sub_{:03d}", "SUB-{:05d}"])
def test_rows_find_their_subjects_though_prefix_and_padding_differ(written, tools, tmp_path, caplog):
    expected, _ = listing(tools, tmp_path)
    lines = [f"{written.format(int(name))}\t{person[0]}\t{person[1]}" for name, person in PEOPLE.items()]
    (tmp_path / "participants.tsv").write_text("\n".join(["participant_id\tgroup\tsplit", *lines, "77\thc\ttrain"]))
    cases, skipped = find_cases(tmp_path, ("flair", "t1"), images_only=False, controls=True)
    assert cases == expected and len(cases) == len(PEOPLE)
    assert "1 of 8 rows speak of nothing here, such as 77" in caplog.text
    assert [item.what for item in skipped if "no readable flair" in item.reason] == ["77"]


def test_an_ambiguous_row_is_nobodys_and_a_table_that_contradicts_itself_is_refused(tools, tmp_path):
    listing(tools, tmp_path)
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tgroup\tsplit\n101\thc\ttrain\n0101\thc\ttest\n3\tfcd\ttrain\n"
    )
    cases, skipped = find_cases(tmp_path, ("flair", "t1"), images_only=False, controls=True)
    assert [case.id for case in cases] == ["sub-00003"]
    assert {item.what: item.reason for item in skipped}["sub-00101"] == "not in participants.tsv"
    (tmp_path / "participants.tsv").write_text("participant_id\tgroup\tsplit\n3\thc\ttrain\n3\tfcd\ttrain\n")
    with pytest.raises(UserError, match="contradicts itself"):
        find_cases(tmp_path, ("flair", "t1"), images_only=False, controls=True)
