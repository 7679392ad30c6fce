import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunet_ssl.conversion.atlas_v2 import find_cases
from nnunet_ssl.errors import UserError

SHAPE = (24, 28, 22)
AFFINE = np.diag([1.0, 1, 1, 1])
AFFINE[:3, 3] = -98, -134, -72
T1, MASK = "space-MNI152NLin2009aSym_T1w", "space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask"
SHEARED = AFFINE * (1 + 1e-7)


def lesion(seed):
    mask = np.zeros(SHAPE)
    x, y, z = np.random.default_rng(seed).integers(4, 16, 3)
    mask[x : x + 4, y : y + 3, z : z + 2] = 1
    mask[1, 2, 3] = 1
    return mask


MASKS = {  # what the mask of each training case looks like
    "r001s001": lambda mask: mask.astype(np.uint8),
    "r001s002": lambda mask: mask.astype(np.float64),
    "r001s005": lambda mask: (mask * 255).astype(np.uint8),
    "r002s001": lambda mask: (mask * 255).astype(np.float64),
    "r002s003": lambda mask: (mask * 7).astype(np.uint16),
    "r004s001": lambda mask: (mask * 0.3).astype(np.float32),
    "r005s001": lambda mask: mask.astype(np.int16),
    "r009s001": lambda mask: mask.astype(np.int32),
    "r010s001": lambda mask: np.where(mask > 0, 2, -0.0).astype(np.float32),
    "r011s001": lambda mask: (mask * 0).astype(np.uint8),
}


def anat(root, subject):
    return root / f"sub-{subject}" / "ses-1" / "anat"


def write_case(tools, root, subject, mask=None, **header):
    image = np.random.default_rng(int(subject[1:4])).random(SHAPE).astype(np.float32) * 100
    folder = anat(root, subject)
    path = tools.write_nifti(folder / f"sub-{subject}_ses-1_{T1}.nii.gz", image, AFFINE, qform=0, sform=4)
    if mask is not None:
        tools.write_nifti(folder / f"sub-{subject}_ses-1_{MASK}.nii.gz", mask, **{"affine": AFFINE} | header)
    return path


def write_atlas(tools, root):
    """The published layout with every quirk."""
    for seed, (subject, cast) in enumerate(MASKS.items()):
        header = {"affine": SHEARED, "qform": 1, "sform": 0} if seed % 2 else {}
        write_case(tools, root / "Training" / subject[:4].upper(), subject, cast(lesion(seed)), **header)
        (root / "Training" / subject[:4].upper() / "dataset_description.json").write_text("{}")
    for subject in ("r003s001", "r003s004"):
        write_case(tools, root / "Testing" / "R003", subject)
    litter = anat(root / "Training" / "R001", "r001s001")
    (litter / ".DS_Store").write_bytes(b"\0")
    (litter / f"._sub-r001s001_ses-1_{T1}.nii.gz").write_bytes(b"\0\5\26\7")
    (root / "Training" / "._R001").write_bytes(b"\0")
    (root / "20211112_ATLAS_2.0_SupplementaryInfo.csv").write_text("a,b\n")
    (root / "20220425_ATLAS_2.0_MetaData.xlsx").write_bytes(b"PK")
    tools.write_nifti(root / "MNI152NLin2009aSym.nii.gz", np.ones(SHAPE, np.uint8), AFFINE)
    again = nib.load(anat(root / "Training" / "R001", "r001s002") / f"sub-r001s002_ses-1_{T1}.nii.gz")
    nib.save(again, anat(root / "Training" / "R001", "r001s002") / f"sub-r001s002_ses-1_{T1}.nii")
    broken = write_case(tools, root / "Training" / "R020", "r020s001", lesion(0).astype(np.uint8))
    broken.write_bytes(broken.read_bytes()[:3000])
    write_case(tools, root / "Training" / "R021", "r021s001")  # no mask
    dangling = anat(root / "Training" / "R022", "r022s001")
    dangling.mkdir(parents=True)
    for name in (T1, MASK):
        (dangling / f"sub-r022s001_ses-1_{name}.nii.gz").symlink_to("../../../.git/annex/objects/x/y/MD5E-s1--a.nii.gz")
    return root


@pytest.fixture(scope="module")
def converted(tools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    root = write_atlas(tools, folder / "my data" / "ATLAS 2")
    env = tools.environment(folder / "nn unet")
    done = tools.run_script(501, "-i", root, "-np", 1, "--folds", "cohort", env=env)
    assert done.returncode == 0, done.stderr
    return root, env, folder / "nn unet" / "nnUNet_raw" / "Dataset501_ATLASv2", done


def test_every_case_has_its_image_and_exactly_its_lesion(converted, tools):
    root, _, folder, _ = converted
    names = {f"sub-{subject}_ses-1" for subject in (*MASKS, "r003s001", "r003s004")}
    assert tools.check_geometry(folder, 1) == names
    for seed, subject in enumerate(MASKS):
        label = nib.load(folder / "labelsTr" / f"sub-{subject}_ses-1.nii.gz").get_fdata()
        np.testing.assert_array_equal(label, lesion(seed) * (subject != "r011s001"))
        source = nib.load(anat(root / "Training" / subject[:4].upper(), subject) / f"sub-{subject}_ses-1_{T1}.nii.gz")
        image = nib.load(folder / "imagesTr" / f"sub-{subject}_ses-1_0000.nii.gz")
        np.testing.assert_array_equal(image.get_fdata(), source.get_fdata())
        np.testing.assert_allclose(image.affine, source.affine)


def test_test_cases_lie_in_images_ts_without_labels(converted):
    _, _, folder, _ = converted
    assert sorted(path.name for path in (folder / "imagesTs").iterdir()) == [
        "sub-r003s001_ses-1_0000.nii.gz",
        "sub-r003s004_ses-1_0000.nii.gz",
    ]
    assert not (folder / "labelsTs").exists()


def test_dataset_json_describes_the_data_set(converted):
    _, _, folder, _ = converted
    described = json.loads((folder / "dataset.json").read_text())
    assert described["channel_names"] == {"0": "T1"}
    assert described["labels"] == {"background": 0, "lesion": 1}
    assert described["numTraining"] == len(MASKS)
    assert described["file_ending"] == ".nii.gz"
    assert described["overwrite_image_reader_writer"] == "NibabelIOWithReorient"


def test_what_was_left_out_is_listed_with_the_reason(converted, tools):
    _, _, folder, done = converted
    skipped = tools.skipped_in(folder)
    r1 = "Training/R001"
    assert skipped[f"{r1}/sub-r001s001/ses-1/anat/.DS_Store"] == "hidden file"
    assert skipped[f"{r1}/sub-r001s001/ses-1/anat/._sub-r001s001_ses-1_{T1}.nii.gz"] == "hidden file"
    assert skipped["20220425_ATLAS_2.0_MetaData.xlsx"] == "not a NIfTI image"
    assert skipped["MNI152NLin2009aSym.nii.gz"] == "not a T1 or a lesion mask by its name"
    assert skipped[f"{r1}/sub-r001s002/ses-1/anat/sub-r001s002_ses-1_{T1}.nii"] == "the same image is there compressed"
    assert "git-annex link" in skipped[f"Training/R022/sub-r022s001/ses-1/anat/sub-r022s001_ses-1_{T1}.nii.gz"]
    assert skipped["sub-r021s001_ses-1"] == "a training case without lesion mask"
    assert "can't be read" in skipped["sub-r020s001_ses-1"]
    for reason in set(skipped.values()):
        assert reason in done.stdout
    assert "Traceback" not in done.stderr


def test_the_report_counts_the_lesions_voxels_and_notes_the_empty_mask(converted, tools):
    _, _, folder, done = converted
    report = tools.report_of(folder)
    for seed, subject in enumerate(MASKS):
        row = report[f"sub-{subject}_ses-1"]
        count = 0 if subject == "r011s001" else int(lesion(seed).sum())
        assert int(row["mask_voxels"]) == int(row["label_voxels"]) == count
        assert row["group"] == subject[:4].upper()
    assert report["sub-r011s001_ses-1"]["notes"] == "empty mask"
    assert list((folder / "conversion").glob("contact_sheet_*.png"))
    assert "Note on sub-r011s001_ses-1: empty mask" in done.stdout


def test_cohort_folds_never_part_a_cohort_and_lie_where_nnunet_looks(converted):
    _, env, folder, _ = converted
    used = json.loads(Path(env["nnUNet_preprocessed"], folder.name, "splits_final.json").read_text())
    assert len(used) == 5
    held_out = [case for fold in used for case in fold["val"]]
    assert sorted(held_out) == sorted(f"sub-{subject}_ses-1" for subject in MASKS)
    for fold in used:
        assert not {case[:8] for case in fold["train"]} & {case[:8] for case in fold["val"]}


def test_the_last_lines_say_that_pretraining_saw_no_skull_and_how_to_strip(converted):
    lines = converted[3].stdout.strip().splitlines()[-2:]
    assert "still have their skull" in lines[0] and "--skull_strip hd-bet" in lines[1]


def test_a_second_run_does_nothing(converted, tools):
    root, env, folder, _ = converted
    before = tools.snapshot(folder.parents[1])
    done = tools.run_script(501, "-i", root, "-np", 1, "--folds", "cohort", env=env)
    assert done.returncode == 0 and "13 cases; 12 are already converted." in done.stdout  # a broken one
    assert tools.snapshot(folder.parents[1]) == before


def test_the_rearranged_variant_is_found_by_looking(tools, tmp_path):
    for part in ("train", "test"):
        root = tmp_path / "data" / part / "derivatives" / "ATLAS"
        for number in (1, 2):
            subject = f"r0{'12'[part == 'test']}1s00{number}"
            write_case(tools, root, subject, lesion(number).astype(np.uint8) if part == "train" else None)
    cases, skipped = find_cases(tmp_path, images_only=False)
    assert {(case.id, case.part, case.labelled) for case in cases} == {
        ("sub-r011s001_ses-1", "Tr", True),
        ("sub-r011s002_ses-1", "Tr", True),
        ("sub-r021s001_ses-1", "Ts", False),
        ("sub-r021s002_ses-1", "Ts", False),
    }
    assert skipped == []


def test_new_images_are_taken_by_any_name_but_other_contrasts_are_not(tools, tmp_path):
    folder = tmp_path / "new"
    for name in ("sub-01/anat/sub-01_FLAIR", "sub-01/anat/sub-01_T1w", "patient 7", "case9_0000", "sub-02_T2w"):
        tools.write_nifti(folder / f"{name}.nii.gz", np.ones(SHAPE, np.float32), AFFINE)
    cases, skipped = find_cases(folder, images_only=True)
    assert {case.id: case.images["t1"].name for case in cases} == {
        "sub-01": "sub-01_T1w.nii.gz",
        "patient_7": "patient 7.nii.gz",
        "case9": "case9_0000.nii.gz",
    }
    assert {item.what for item in skipped} == {"sub-01/anat/sub-01_FLAIR.nii.gz", "sub-02_T2w.nii.gz"}


def test_new_images_named_alike_are_all_taken(tools, tmp_path):
    for name in ("sub_1/ses_1/t1", "sub_1/ses_2/t1", "sub_2/ses_1/t1"):
        tools.write_nifti(tmp_path / f"{name}.nii.gz", np.ones(SHAPE, np.float32), AFFINE)
    cases, skipped = find_cases(tmp_path, images_only=True)
    assert [case.id for case in cases] == ["sub_1_ses_1", "sub_1_ses_2", "sub_2_ses_1"] and skipped == []


def test_one_subjects_name_in_two_folders_is_refused(tools, tmp_path):
    for site in ("siteA", "siteB"):
        tools.write_nifti(tmp_path / site / "sub-01" / "sub-01_T1w.nii.gz", np.ones(SHAPE, np.float32), AFFINE)
    with pytest.raises(UserError, match=r"siteA/sub-01/sub-01_T1w\.nii\.gz and siteB/sub-01/.*two patients"):
        find_cases(tmp_path, images_only=True)


def test_another_data_set_gets_told_what_was_expected_and_found(tools, tmp_path):
    tools.write_nifti(tmp_path / "sub-00001" / "anat" / "sub-00001_T1w.nii.gz", np.ones(SHAPE, np.float32))
    with pytest.raises(UserError, match=r"doesn't hold ATLAS.*Training/R001.*found: 1 NIfTI images such as sub-00001"):
        find_cases(tmp_path, images_only=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "ATLAS_R2.0_encrypted.tar.gz").touch()
    with pytest.raises(UserError, match=r"archive ATLAS_R2.0_encrypted.tar.gz: unpack it first"):
        find_cases(tmp_path / "empty", images_only=False)


@pytest.mark.slow
def test_nnunet_plans_and_preprocesses_it_with_its_integrity_check(converted, tools):
    assert tools.plan_and_preprocess(501, converted[1]) == {f"sub-{subject}_ses-1" for subject in MASKS}
