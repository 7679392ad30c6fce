import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import ndimage

from nnunet_ssl.conversion.atlas_v3 import find_cases, strata_of, zero_background
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.segmentations import LesionConfig, compare_folders
from nnunet_ssl.imaging.geometry import Volume
from nnunet_ssl.phantom.layouts import write_atlas3

T1, MASK = "space-orig_desc-brain_T1w", "space-orig_label-lesion_desc-T1lesion_mask"
COLUMNS = ["SESSION_ID", "ATLAS2_DATASET", "DAYS_POST_STROKE", "CHRONICITY", "SITE"]
OTHER_ORDER = [COLUMNS[1], COLUMNS[0], *COLUMNS[2:]]
OFF = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 60], [0, 0, 0, 1.0]])

# subject: orientation, type of image and mask, value of 1, days, chronicity, part of ATLAS v2
CASES = {
    "r001s001": ("RAS", "f8", "u1", 1, "471.0", "", "Training"),
    "r001s002": ("LAS", "f8", "f8", 1, "", "1.0", "Testing"),
    "r001s004": ("RAS", "f4", "u2", 1, "12.0", "", "Training"),
    "r029s001": ("RAS", "f8", "i2", 1, "181.5", "", ""),
    "r038s001": ("PSL", "f8", "i4", 1, "-3.0", "1", ""),
    "r039s001": ("RAS", "f4", "f4", 0.9999, "0.0", "", "Training"),
    "r040s007": ("RAS", "f4", "u1", 1, "soon", "", ""),
    "soop0468": ("PSR", "f8", "f4", 1, "3.0", "1", ""),
    "soop0910": ("LAS", "f8", "u1", 1, None, None, None),
}
EMPTY, BACKGROUND = "soop0910", {"r029s001": -4.0}


def head(tools, seed=0):
    """A stripped brain of 6 mm voxels, stored as RAS, float64, and a lesion in it."""
    affine = tools.affine_of((6.0, 6.0, 6.0), origin=(-66, -75, -60))
    brain = tools.draw_head((23, 26, 21), affine, (60, 90, 120), seed=seed, radius=(50, 60, 48))
    lesion = np.zeros(brain.shape, dtype=bool)
    x, y, z = np.random.default_rng(seed).integers(7, 13, 3)
    lesion[x : x + 3, y : y + 2, z : z + 2] = True
    return nib.Nifti1Image(brain, affine), nib.Nifti1Image(lesion.astype(np.uint8), affine)


def turned(image, orientation):
    codes = nib.orientations.axcodes2ornt
    return image.as_reoriented(nib.orientations.ornt_transform(codes("RAS"), codes(orientation)))


def anat(root, subject):
    site = "SOOP" if subject.startswith("soop") else subject[:4].upper()
    return root / site / f"sub-{subject}" / "ses-1" / "anat"


def source(root, subject, name):
    return anat(root, subject) / f"sub-{subject}_ses-1_{name}.nii.gz"


def write_case(tools, root, subject, mask_moved=None):
    orientation, image_type, mask_type, one, days, chronicity, atlas2 = CASES.get(subject, CASES["r001s001"])
    image, lesion = (turned(volume, orientation) for volume in head(tools, seed=sum(map(ord, subject))))
    data = image.get_fdata()
    data = np.where(data == 0, BACKGROUND.get(subject, 0), data).astype(image_type)
    tools.write_nifti(source(root, subject, T1), data, image.affine)
    label = (lesion.get_fdata() * one * (subject != EMPTY)).astype(mask_type)
    affine = lesion.affine if mask_moved is None else mask_moved @ lesion.affine
    tools.write_nifti(source(root, subject, MASK), label, affine)
    site = anat(root, subject).parents[2].name
    cells = dict(zip(COLUMNS, (f"sub-{subject}_ses-1", atlas2, days, chronicity, site)))
    columns = OTHER_ORDER if site == "SOOP" else COLUMNS
    lines = [columns, *([[cells[name] for name in columns]] if days is not None else [])]
    table = anat(root, subject) / f"sub-{subject}_ses-1_metadata.csv"
    table.write_text("".join(",".join(line) + "\n" for line in lines))


def write_release(tools, root):
    for subject in CASES:
        write_case(tools, root, subject)
    write_case(tools, root, "soop1532", mask_moved=OFF)  # by its header, outside of the brain
    write_case(tools, root, "r002s001")
    source(root, "r002s001", MASK).unlink()
    write_case(tools, root, "r003s001")
    broken = source(root, "r003s001", T1)
    broken.write_bytes(broken.read_bytes()[:2000])
    image = head(tools)[0]
    other = anat(root, "r001s001") / "sub-r001s001_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz"
    tools.write_nifti(other, image.get_fdata(), image.affine)
    (anat(root, "r001s001") / f"._sub-r001s001_ses-1_{T1}.nii.gz").write_bytes(b"\0\5\26\7")
    return root


@pytest.fixture(scope="module")
def converted(tools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas3")
    root = write_release(tools, folder / "ATLAS3 Training_Raw")
    env = tools.environment(folder / "nnunet")
    done = tools.run_script(504, "-i", root, "-np", 1, "--folds", "centre", env=env)
    assert done.returncode == 0, done.stderr
    return root, env, folder / "nnunet" / "nnUNet_raw" / "Dataset504_ATLASv3", done


def output(folder, subject, kind):
    end = "_0000.nii.gz" if kind == "images" else ".nii.gz"
    return nib.load(folder / f"{kind}Tr" / f"sub-{subject}_ses-1{end}")


def test_every_case_has_its_image_and_exactly_its_lesion_in_the_stored_orientation(converted, tools):
    root, _, folder, _ = converted
    assert tools.check_geometry(folder, 1) == {f"sub-{subject}_ses-1" for subject in CASES}
    for subject, (orientation, *_) in CASES.items():
        image, label = (output(folder, subject, kind) for kind in ("images", "labels"))
        assert "".join(nib.aff2axcodes(image.affine)) == orientation
        np.testing.assert_array_equal(label.get_fdata(), nib.load(source(root, subject, MASK)).get_fdata() > 0)
        assert label.get_fdata().any() == (subject != EMPTY)
        if subject not in BACKGROUND:
            stored = nib.load(source(root, subject, T1)).get_fdata()
            np.testing.assert_array_equal(image.get_fdata(), stored.astype(np.float32))


def test_a_background_that_is_not_zero_becomes_zero_and_contrasts_stay(converted, tools):
    root, _, folder, _ = converted
    image = output(folder, "r029s001", "images").get_fdata()
    stored = nib.load(source(root, "r029s001", T1)).get_fdata()
    brain = stored != BACKGROUND["r029s001"]
    assert (image[~brain] == 0).all()
    np.testing.assert_allclose(image[brain], stored[brain] + 4, rtol=1e-6)
    assert crop_to_nonzero(stored[None])[0].shape[1:] == stored.shape
    assert crop_to_nonzero(image[None])[0].size < 0.8 * stored.size
    assert "background of about -4 was set to 0" in tools.report_of(folder)["sub-r029s001_ses-1"]["notes"]


def test_the_report_tells_what_the_tables_say_whatever_their_column_order(converted, tools):
    rows = tools.report_of(converted[2])
    read = {
        case[4:-6]: (row["group"], row["days_post_stroke"], row["chronicity"], row["atlas2"])
        for case, row in rows.items()
    }
    assert read == {
        "r001s001": ("R001", "471", "chronic", "training"),
        "r001s002": ("R001", "", "chronic", "testing"),
        "r001s004": ("R001", "12", "earlier", "training"),
        "r029s001": ("R029", "181.5", "chronic", ""),
        "r038s001": ("R038", "-3", "chronic", ""),
        "r039s001": ("R039", "0", "unknown", "training"),
        "r040s007": ("R040", "", "unknown", ""),
        "soop0468": ("SOOP", "3", "earlier", ""),
        "soop0910": ("SOOP", "", "unknown", ""),
    }
    notes = {case[4:-6]: row["notes"] for case, row in rows.items()}
    assert "no row" in notes["soop0910"] and "empty mask" in notes["soop0910"]
    assert "DAYS_POST_STROKE is 'soon', no number" in notes["r040s007"]
    assert "CHECK: CHRONICITY is 1, but the scan is of day 3" in notes["soop0468"]
    assert notes["r001s001"] == notes["r039s001"] == notes["r038s001"] == ""


def test_the_overlap_with_atlas_2_is_told(converted):
    # soop1532 and r003s001, which can't be converted, have r001s001's table
    assert "6 of 11 cases are in ATLAS v2.0 too, 5 of them in its training part" in converted[3].stdout


def test_what_is_left_out_is_listed_with_its_reason_and_tables_are_not(converted, tools):
    skipped = tools.skipped_in(converted[2])
    reasons = {what.split("/")[-1]: reason for what, reason in skipped.items()}
    assert reasons.pop("sub-r002s001_ses-1") == "without lesion mask"
    assert "can't be read" in reasons.pop("sub-r003s001_ses-1")
    assert "60 mm off" in reasons["sub-soop1532_ses-1"] and "voxel by voxel" in reasons.pop("sub-soop1532_ses-1")
    assert "native space" in reasons.pop("sub-r001s001_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz")
    assert reasons.pop(f"._sub-r001s001_ses-1_{T1}.nii.gz") == "hidden file"
    assert reasons.pop("sub-r002s001_ses-1_metadata.csv") == "not a NIfTI image"
    assert reasons == {}


def test_no_centre_is_in_training_and_validation(converted):
    _, env, _, _ = converted
    folds = json.loads(Path(env["nnUNet_preprocessed"], "Dataset504_ATLASv3", "splits_final.json").read_text())
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(f"sub-{name}_ses-1" for name in CASES)
    for fold in folds:
        centres = [{case[4:8] for case in fold[part]} for part in ("train", "val")]
        assert not centres[0] & centres[1]


def test_a_second_run_changes_nothing_and_a_corrected_release_only_what_it_corrects(converted, tools, tmp_path):
    root = shutil.copytree(converted[0], tmp_path / "release")
    env = tools.environment(tmp_path / "nnunet")
    assert tools.run_script(504, "-i", root, "-np", 1, env=env).returncode == 0
    images = tmp_path / "nnunet" / "nnUNet_raw" / "Dataset504_ATLASv3" / "imagesTr"
    before = tools.snapshot(images)
    assert tools.run_script(504, "-i", root, "-np", 1, env=env).returncode == 0
    assert tools.snapshot(images) == before
    table = anat(root, "r001s004") / "sub-r001s004_ses-1_metadata.csv"
    table.write_text(table.read_text().replace("12.0", "900.0"))
    write_case(tools, root, "soop1532")
    assert tools.run_script(504, "-i", root, "-np", 1, env=env).returncode == 0
    after = tools.snapshot(images)
    changed = {path.name[4:12] for path in after if after[path] != before.get(path)}
    assert changed == {"r001s004", "soop1532"}
    assert tools.report_of(images.parent)["sub-r001s004_ses-1"]["chronicity"] == "chronic"


def test_new_images_need_no_mask_and_no_table_and_get_the_same_background(converted, tools, tmp_path):
    new = tmp_path / "new"
    for subject in ("r029s001", "soop0468"):
        tools.write_nifti(new / f"{subject}.nii.gz", *loaded(source(converted[0], subject, T1)))
    env = tools.environment(tmp_path / "nnunet")
    done = tools.run_script(504, "-i", new, "--images_only", "-o", tmp_path / "out", "-np", 1, env=env)
    assert done.returncode == 0, done.stderr
    for subject in ("r029s001", "soop0468"):
        made = nib.load(tmp_path / "out" / f"{subject}_0000.nii.gz")
        np.testing.assert_array_equal(made.get_fdata(), output(converted[2], subject, "images").get_fdata())


def loaded(path):
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def volume(array):
    return Volume(array.astype(np.float32), np.diag([6.0, 6, 6, 1]))


def brain(tools):
    return head(tools)[0].get_fdata()


def test_ringing_around_zero_and_specks_become_zero_and_nothing_else_changes(tools):
    ringing = 0.1 * np.random.default_rng(0).standard_normal(brain(tools).shape)
    image = brain(tools) + ringing * (brain(tools) == 0)
    image[2, 3, 4] = image[20, 22, 18] = 30
    facts = {}
    cleaned = zero_background(volume(image), facts).array
    assert (cleaned[brain(tools) == 0] == 0).all()
    np.testing.assert_allclose(cleaned[brain(tools) > 0], brain(tools)[brain(tools) > 0], atol=0.05)
    assert "set to 0" in facts["notes"][0]


def test_dark_voxels_inside_the_brain_are_no_background(tools):
    image = np.where(brain(tools) == 0, -4.0, brain(tools))
    image[11:13, 12:14, 10:12] = -3.9
    cleaned = zero_background(volume(image), {}).array
    np.testing.assert_allclose(cleaned[11:13, 12:14, 10:12], 0.1, rtol=1e-4)


def test_a_background_of_zero_is_left_alone_and_a_head_with_its_skull_is_told(tools):
    facts = {}
    assert zero_background(volume(brain(tools)), facts).array.tobytes() == brain(tools).astype("f4").tobytes()
    assert facts == {}
    noisy = np.abs(brain(tools) + 6 * np.random.default_rng(0).standard_normal(brain(tools).shape))
    assert zero_background(volume(noisy), facts).array.tobytes() == noisy.astype("f4").tobytes()
    assert facts["notes"][0].startswith("CHECK: the background")


def test_a_mask_off_its_image_that_still_lies_in_the_brain_is_left_there_and_told(tools, tmp_path, env):
    moved = OFF.copy()
    moved[2, 3] = 12
    for subject in ("r001s001", "r001s002"):
        write_case(tools, tmp_path / "raw", subject, mask_moved=moved if subject == "r001s001" else None)
    assert tools.run_script(504, "-i", tmp_path / "raw", "-np", 1, env=env).returncode == 0
    folder = tmp_path / "nnunet" / "nnUNet_raw" / "Dataset504_ATLASv3"
    assert "CHECK" in tools.report_of(folder)["sub-r001s001_ses-1"]["notes"]
    assert tools.report_of(folder)["sub-r001s002_ses-1"]["notes"] == ""


def test_another_release_gets_told_what_was_expected(tools, tmp_path):
    image = head(tools)[0]
    name = "Training/R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz"
    tools.write_nifti(tmp_path / name, image.get_fdata(), image.affine)
    with pytest.raises(
        UserError, match=r"doesn't hold the raw ATLAS R3\.0\. Expected were files like R001/sub-r001s001"
    ):
        find_cases(tmp_path, images_only=False)


def test_two_releases_in_one_folder_are_refused(tools, tmp_path):
    for release in ("ATLAS3_Training_Raw", "corrected"):
        write_case(tools, tmp_path / release, "r001s001")
    with pytest.raises(UserError, match=r"ATLAS3_Training_Raw/R001/.* and corrected/R001/"):
        find_cases(tmp_path, images_only=False)


def test_a_case_is_of_the_centre_that_its_name_says_and_another_table_is_told(tools, tmp_path):
    for subject in ("r001s001", "r001s002", "r001s004"):
        write_case(tools, tmp_path, subject)
    table = anat(tmp_path, "r001s002") / "sub-r001s002_ses-1_metadata.csv"
    table.write_text(table.read_text().replace(",R001", ",r001 "))
    table = anat(tmp_path, "r001s004") / "sub-r001s004_ses-1_metadata.csv"
    table.write_text(table.read_text().replace(",R001", ",R002"))
    cases, _ = find_cases(tmp_path, images_only=False)
    assert {case.group for case in cases} == {"R001"}
    assert [case.notes for case in cases] == [(), (), ("CHECK: its table is of the centre R002",)]


def test_strata_are_chronicity_and_size():
    rows = [{"case": f"c{i}", "label_ml": float(i // 2), "chronicity": "chronic"} for i in range(10)]
    strata = strata_of([*rows, {"case": "x", "label_ml": 0.0, "chronicity": "unknown"}])
    assert len({strata[f"c{i}"] for i in range(10)}) == 5
    assert strata["c0"] == strata["c1"] != strata["x"]


def export_labels_as_predictions(env, out):
    """Export the preprocessed labels as if a network had predicted them, by nnU-Net's own function."""
    folder = Path(env["nnUNet_preprocessed"]) / "Dataset504_ATLASv3"
    plans = PlansManager(str(folder / "nnUNetPlans.json"))
    out.mkdir()
    shutil.copy(folder / "nnUNetPlans.json", out / "plans.json")
    dataset = nnUNetDatasetBlosc2(str(folder / "nnUNetPlans_3d_fullres"))
    for case in dataset.identifiers:
        _, label, _, properties = dataset.load_case(case)
        lesion = ndimage.gaussian_filter((label[0] > 0).astype(np.float32), 0.5)
        logits = torch.from_numpy(np.stack([np.zeros_like(lesion), 20 * lesion - 10]))
        configuration = plans.get_configuration("3d_fullres")
        described = str(folder / "dataset.json")
        export_prediction_from_logits(
            logits, properties, configuration, plans, described, str(out / case), save_probabilities=True
        )


@pytest.mark.slow
def test_a_synthetic_release_goes_through_nnunets_checks_and_its_exported_maps_score_as_they_should(tools, tmp_path):
    root = write_atlas3(tmp_path / "ATLAS3_Training_Raw", n_cases=10, voxel_mm=5.0)
    env = tools.environment(tmp_path / "nnunet")
    assert tools.run_script(504, "-i", root, "-np", 1, "--folds", "centre", env=env).returncode == 0
    names = {f"{path.name}_ses-1" for path in root.glob("*/sub-*")} - {"sub-soop1532_ses-1"}
    assert tools.plan_and_preprocess(504, env) == names
    export_labels_as_predictions(env, tmp_path / "predicted")
    labels = Path(env["nnUNet_raw"]) / "Dataset504_ATLASv3" / "labelsTr"
    cases = compare_folders(labels, tmp_path / "predicted", LesionConfig(preset="isles26")).set_index("case")
    assert set(cases.index) == names
    full = cases[cases["reference_lesions"] > 0]
    assert len(full) == 7 and {"PSR", "PSL", "LAS"} <= {
        row["orientation"] for row in tools.report_of(labels.parent).values()
    }
    assert (full["dice"] > 0.7).all() and (full["pr_auc"] > 0.8).all()
    assert (cases.loc[["sub-soop0910_ses-1", "sub-r053s016_ses-1"], "matched_dice"] == 1).all()
