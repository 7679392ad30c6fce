import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from nnunet_ssl.conversion.dataset import Case
from nnunet_ssl.conversion.isles2022 import INFO, find_cases, prepare
from nnunet_ssl.errors import UserError

UNITS = {1: ("mm2/s", 1e-6), 2: ("1e-6 mm2/s", 1.0), 3: ("1e-3 mm2/s", 1e-3), 4: ("1e-6 mm2/s", 1.0)}
EMPTY = 3
SHAPE, FLAIR_SHAPE = (34, 40, 30), (110, 130, 14)
TILT = Rotation.from_euler("xyz", (8, -6, 4), degrees=True).as_matrix()


def motion(number):
    rng = np.random.default_rng(number)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", rng.uniform(-6, 6, 3), degrees=True).as_matrix()
    matrix[:3, 3] = rng.uniform(-6, 6, 3)
    return matrix


def centred(tools, shape, spacing, **options):
    affine = tools.affine_of(spacing, **options)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def stroke(number):
    mask = np.zeros(SHAPE, bool)
    if number != EMPTY:
        mask[12 : 16 + number, 15:20, 12:16] = True
        mask[20, 20, 20] = True
    return mask


def write_case(tools, number, dwi_path, adc_path, flair_path, mask_path):
    affine = centred(tools, SHAPE, (2, 2, 2 if number != 4 else 4.8), rotation=TILT, flips=(-1, 1, 1))  # LAS, oblique
    rng = np.random.default_rng(number)
    dwi = tools.draw_head(SHAPE, affine, (100, 80, 140), seed=number)
    adc = tools.draw_head(SHAPE, affine, (800, 750, 2500), seed=number)
    negative = rng.random(SHAPE) < 0.002
    dwi[negative], adc[negative] = -0.5, -3.0
    tools.write_nifti(dwi_path, dwi, affine, qform=2, sform=1)
    tools.write_nifti(adc_path, adc * UNITS[number][1], affine, qform=2, sform=1)
    tools.write_nifti(mask_path, stroke(number).astype(np.uint16), affine * (1 + 1e-7), qform=0, sform=2)
    flair_affine = centred(tools, FLAIR_SHAPE, (0.65, 0.65, 5.0))
    flair = tools.draw_head(FLAIR_SHAPE, flair_affine, (60, 90, 20), seed=number, motion=motion(number))
    tools.write_nifti(flair_path, flair.astype(np.float32), flair_affine)


def name(number):
    return f"sub-strokecase{number:04d}"


def published(root, number):
    session = root / name(number) / "ses-0001"
    stem = f"{name(number)}_ses-0001"
    return (
        session / "dwi" / f"{stem}_dwi.nii.gz",
        session / "dwi" / f"{stem}_adc.nii.gz",
        session / "anat" / f"{stem}_FLAIR.nii.gz",
        root / "derivatives" / name(number) / "ses-0001" / f"{stem}_msk.nii.gz",
    )


def older(root, number):
    session = root / "rawdata" / name(number) / "ses-0001"
    stem = f"{name(number)}_ses-0001"
    mask = root / "derivatives" / name(number) / "ses-0001" / f"{stem}_msk.nii.gz"
    return (*(session / f"{stem}_{kind}.nii.gz" for kind in ("dwi", "adc", "flair")), mask)


def renamed(root, number):
    *scans, mask = published(root, number)
    return (
        *(root / "images" / scan.relative_to(root) for scan in scans),
        root / "labels_derivatives" / mask.relative_to(root / "derivatives"),
    )


@pytest.fixture(scope="module")
def isles(tools, tmp_path_factory):
    root = tmp_path_factory.mktemp("isles") / "ISLES 2022"
    for number in UNITS:
        write_case(tools, number, *published(root, number))
    scans = root / name(1) / "ses-0001" / "dwi"
    (scans / f"._{name(1)}_ses-0001_dwi.nii.gz").write_bytes(b"\0\5\26\7")
    (scans / ".DS_Store").write_bytes(b"\0")
    (scans / f"{name(1)}_ses-0001_dwi.json").write_text("{}")
    nib.save(nib.load(scans / f"{name(1)}_ses-0001_dwi.nii.gz"), scans / f"{name(1)}_ses-0001_dwi.nii")
    (root / "participants.tsv").write_text("participant_id\n")
    without_flair = published(root, 9)
    for source, copy in zip(published(root, 1), without_flair):
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    without_flair[2].unlink()
    return root


@pytest.fixture(scope="module")
def converted(tools, isles, tmp_path_factory):
    base = tmp_path_factory.mktemp("isles_out")
    env = tools.environment(base)
    done = tools.run_script(502, "-i", isles, "-np", 2, env=env)
    assert done.returncode == 0, done.stderr
    return env, base / "nnUNet_raw" / "Dataset502_ISLES2022", done


def channel(folder, number, index):
    return nib.load(folder / "imagesTr" / f"{name(number)}_ses-0001_{index:04d}.nii.gz").get_fdata()


def test_channels_and_labels_share_dwis_grid_and_no_voxel_is_lost(converted, isles, tools):
    _, folder, _ = converted
    assert tools.check_geometry(folder, 3) == {f"{name(number)}_ses-0001" for number in UNITS}
    for number in UNITS:
        label = nib.load(folder / "labelsTr" / f"{name(number)}_ses-0001.nii.gz")
        np.testing.assert_array_equal(label.get_fdata(), stroke(number))
        np.testing.assert_allclose(label.affine, nib.load(published(isles, number)[0]).affine, atol=1e-5)


def test_dwi_is_as_scanned_but_for_negative_voxels(converted, isles):
    for number in UNITS:
        source = nib.load(published(isles, number)[0]).get_fdata()
        np.testing.assert_allclose(channel(converted[1], number, 0), np.maximum(source, 0), rtol=1e-6)


def test_adc_comes_in_one_unit_whatever_unit_it_had(converted, isles, tools):
    report = tools.report_of(converted[1])
    for number, (unit, factor) in UNITS.items():
        source = np.maximum(nib.load(published(isles, number)[1]).get_fdata(), 0) / factor
        np.testing.assert_allclose(channel(converted[1], number, 1), source, rtol=1e-4)
        assert report[f"{name(number)}_ses-0001"]["adc_unit_found"] == unit
        assert int(report[f"{name(number)}_ses-0001"]["negative_voxels"]) > 0


def test_flair_lies_on_dwi_within_a_millimetre(converted, tools):
    """The truth is the same head drawn on DWI's own grid; sharper images fit better, so resample the truth as well."""
    from scipy import ndimage

    report = tools.report_of(converted[1])
    for number in UNITS:
        row = report[f"{name(number)}_ses-0001"]
        assert row["flair_registration"] == "rigid"
        assert float(row["flair_information_after"]) > float(row["flair_information_before"])
        assert float(row["flair_overlap_after"]) > 0.9
        affine = nib.load(converted[1] / "imagesTr" / f"{name(number)}_ses-0001_0000.nii.gz").affine
        truth = tools.draw_head(SHAPE, affine, (60, 90, 20), seed=number)
        flair = channel(converted[1], number, 2)
        smooth = [ndimage.gaussian_filter(image, 1.2) for image in (truth, flair)]
        errors = {}
        for axis in range(3):
            for step in (-0.5, 0, 0.5):  # of 2 mm voxels
                moved = ndimage.shift(smooth[1], np.eye(3)[axis] * step, order=1)
                errors[axis, step] = np.square(moved - smooth[0])[4:-4, 4:-4, 4:-4].mean()
        for axis in range(3):
            assert min((-0.5, 0, 0.5), key=lambda step: errors[axis, step]) == 0, (number, errors)


def test_the_empty_mask_is_kept_and_noted_and_incomplete_sessions_are_listed(converted, tools):
    _, folder, done = converted
    assert tools.report_of(folder)[f"{name(EMPTY)}_ses-0001"]["notes"] == "empty mask"
    skipped = tools.skipped_in(folder)
    assert skipped[f"{name(9)}_ses-0001"] == "no flair image"
    assert skipped[f"{name(1)}/ses-0001/dwi/{name(1)}_ses-0001_dwi.nii"] == "the same image is there compressed"
    assert "look skull-stripped" in done.stdout


def test_more_workers_give_the_same_files(converted, isles, tools, tmp_path):
    root = tmp_path / "isles"
    for path in published(isles, 2):
        copy = root / path.relative_to(isles)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    done = tools.run_script(502, "-i", root, "--images_only", "-o", tmp_path / "out", "-np", 1, env=converted[0])
    assert done.returncode == 0, done.stderr
    for index in range(3):
        new = nib.load(tmp_path / "out" / f"{name(2)}_ses-0001_{index:04d}.nii.gz")
        np.testing.assert_array_equal(new.get_fdata(), channel(converted[1], 2, index))
    assert not list((tmp_path / "out").glob("*/*_msk*")) and not (tmp_path / "out" / "dataset.json").exists()
    assert f"nnUNetv2_predict -i {tmp_path / 'out'}" in done.stdout


@pytest.mark.parametrize("files", [published, older, renamed])
def test_every_layout_is_found_by_looking(files, tools, tmp_path):
    for number in (1, 2):
        for path in files(tmp_path, number):
            tools.write_nifti(path, np.ones((4, 4, 4), np.float32))
    cases, skipped = find_cases(tmp_path, ("dwi", "adc", "flair"), images_only=False)
    assert [case.id for case in cases] == [f"{name(1)}_ses-0001", f"{name(2)}_ses-0001"]
    assert skipped == []
    for case, number in zip(cases, (1, 2)):
        assert (*case.images.values(), *case.masks) == files(tmp_path, number)


@pytest.mark.parametrize("name", ["{}/scan_{}", "sub_{}/ses_1/{}", "{}/anat/{}"])
def test_patients_whose_files_are_named_alike_are_never_mixed(name, tools, tmp_path):
    kinds = ("dwi", "adc", "flair")
    files = {patient: {kind: tmp_path / f"{name.format(patient, kind)}.nii.gz" for kind in kinds} for patient in "ABC"}
    for paths in files.values():
        for path in paths.values():
            tools.write_nifti(path, np.ones((4, 4, 4), np.float32))
    files["A"]["adc"].unlink()
    cases, skipped = find_cases(tmp_path, ("dwi", "adc", "flair"), images_only=True)
    assert [case.images for case in cases] == [files["B"], files["C"]]
    assert len({case.id for case in cases}) == 2
    assert [item.reason for item in skipped] == ["no adc image"]


def test_each_choice_of_channels_has_its_own_number():
    assert INFO.numbers[("dwi", "adc", "flair")] == 502
    assert len(INFO.numbers) == len(set(INFO.numbers.values())) == 7


def test_one_channel_alone_goes_to_its_own_data_set_and_needs_no_other(tools, isles, converted):
    env, folder, _ = converted
    done = tools.run_script(502, "-i", isles, "--channels", "dwi", "-np", 1, env=env)
    assert done.returncode == 0, done.stderr
    single = folder.with_name("Dataset510_ISLES2022_DWI")
    assert tools.check_geometry(single, 1) == {f"{name(number)}_ses-0001" for number in (*UNITS, 9)}
    again = tools.run_script(502, "-i", isles, "--channels", "adc", "dwi", "--dry_run", "-d", 77, env=env)
    assert "Dataset077_ISLES2022_DWI_ADC" in again.stdout
    assert not folder.with_name("Dataset077_ISLES2022_DWI_ADC").exists()
    taken = tools.run_script(502, "-i", isles, "--channels", "adc", "-d", 502, env=env)
    assert taken.returncode == 1 and "belongs to Dataset502_ISLES2022" in taken.stderr


def test_a_flair_of_something_else_keeps_its_headers_place_and_is_flagged(tools, isles, env, tmp_path):
    root = tmp_path / "isles"
    shutil.copytree(isles / name(2), root / name(2))
    flair_path = published(root, 2)[2]
    noise = np.random.default_rng(0).random(FLAIR_SHAPE).astype(np.float32)
    tools.write_nifti(flair_path, noise, nib.load(flair_path).affine)
    done = tools.run_script(502, "-i", root, "--images_only", "-o", tmp_path / "out", "-np", 1, env=env)
    assert done.returncode == 0, done.stderr
    row = tools.report_of(tmp_path / "out")[f"{name(2)}_ses-0001"]
    assert row["flair_registration"] == "header"
    assert "CHECK: registration of flair rejected" in row["notes"] and "CHECK" in done.stdout


def test_tiny_volumes_pass(tools, env, tmp_path):
    rng = np.random.default_rng(0)
    for number in (1, 2):
        *scans, mask = published(tmp_path / "isles", number)
        for path, shape in zip(scans, [(6, 5, 4), (6, 5, 4), (11, 9, 3)]):
            tools.write_nifti(path, (rng.random(shape) * 900).astype(np.float32))
        tools.write_nifti(mask, (rng.random((6, 5, 4)) > 0.8).astype(np.float32))
    done = tools.run_script(502, "-i", tmp_path / "isles", "-np", 1, env=env)
    assert done.returncode == 0, done.stderr
    assert len(tools.check_geometry(tmp_path / "nnunet" / "nnUNet_raw" / "Dataset502_ISLES2022", 3)) == 2


def test_another_data_set_gets_told_what_was_expected_and_found(tools, tmp_path):
    tools.write_nifti(tmp_path / "Training" / "sub-r001s001_T1w.nii.gz", np.ones((4, 4, 4), np.float32))
    with pytest.raises(
        UserError, match=r"doesn't hold ISLES 2022.*derivatives.*found: 1 NIfTI images such as Training"
    ):
        find_cases(tmp_path, ("dwi",), images_only=False)


@pytest.mark.slow
def test_nnunet_plans_and_preprocesses_it_with_its_integrity_check(converted, tools):
    assert tools.plan_and_preprocess(502, converted[0]) == {f"{name(number)}_ses-0001" for number in UNITS}


def prepared_without_codes(tools, isles, folder, *, unplaced, crop=None):
    """Prepare DWI and ADC of case 2 after their headers lost what they say of the place; `crop` cuts slices off ADC."""
    images = {}
    for kind, path in zip(("dwi", "adc"), published(isles, 2)):
        image = nib.load(path)
        image = image.slicer[:, :, crop:] if crop and kind == "adc" else image
        code = 0 if kind in unplaced else 1
        images[kind] = tools.write_nifti(
            folder / f"{kind}.nii.gz", image.get_fdata(), image.affine, qform=code, sform=code
        )
    return prepare(Case(id="2", subject="2", images=images))


@pytest.mark.parametrize("unplaced", [{"dwi"}, {"adc"}, {"dwi", "adc"}])
def test_channels_of_one_shape_are_laid_voxel_by_voxel_whichever_says_nothing_of_its_place(
    tools, isles, tmp_path, unplaced
):
    made = prepared_without_codes(tools, isles, tmp_path, unplaced=unplaced)
    source = np.maximum(nib.load(published(isles, 2)[1]).get_fdata(), 0)
    np.testing.assert_allclose(made.channels["adc"].array, source, rtol=1e-4)
    np.testing.assert_array_equal(made.channels["adc"].affine, made.channels["dwi"].affine)
    if len(unplaced) == 1:
        truth = nib.load(published(isles, 2)[0]).affine
        np.testing.assert_allclose(made.channels["dwi"].affine, truth, atol=1e-4)
        assert any("voxel by voxel" in sentence for sentence in made.facts["notes"])
    else:
        assert any(sentence.startswith("CHECK: dwi has no orientation") for sentence in made.facts["notes"])


@pytest.mark.parametrize("unplaced", [{"dwi"}, {"adc"}])
def test_channels_of_two_shapes_without_a_place_are_registered_and_flagged(tools, isles, tmp_path, unplaced):
    made = prepared_without_codes(tools, isles, tmp_path, unplaced=unplaced, crop=3)
    assert made.channels["adc"].array.shape == SHAPE
    assert "adc_registration" in made.facts
    assert any(sentence.startswith("CHECK") for sentence in made.facts["notes"])


@pytest.mark.parametrize("default", [np.eye(4), np.diag([-2.0, -2, 2, 1])])
def test_a_channel_whose_affine_is_a_default_is_laid_voxel_by_voxel(tools, isles, tmp_path, default):
    dwi, adc = published(isles, 2)[:2]
    tools.write_nifti(tmp_path / "adc.nii.gz", nib.load(adc).get_fdata(), default)
    made = prepare(Case(id="2", subject="2", images={"dwi": dwi, "adc": tmp_path / "adc.nii.gz"}))
    np.testing.assert_allclose(made.channels["adc"].array, np.maximum(nib.load(adc).get_fdata(), 0), rtol=1e-4)
    assert any("adc was laid voxel by voxel" in sentence for sentence in made.facts["notes"])


def test_a_header_in_microns_costs_its_case_alone(tools, env, isles, tmp_path):
    root = tmp_path / "isles"
    for number in (2, 4):
        for source in published(isles, number):
            copy = root / source.relative_to(isles)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    flair = published(root, 2)[2]
    image = nib.load(flair)
    tools.write_nifti(flair, image.get_fdata(dtype=np.float32), image.affine * [[1000], [1000], [1000], [1]])
    done = tools.run_script(502, "-i", root, "-np", 1, env=env)
    assert done.returncode == 0, done.stderr
    folder = Path(env["nnUNet_raw"]) / "Dataset502_ISLES2022"
    assert tools.check_geometry(folder, 3) == {f"{name(4)}_ses-0001"}
    assert "is no brain scan's" in tools.skipped_in(folder)[f"{name(2)}_ses-0001"]
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 1


@pytest.fixture
def lacking(tools, isles, tmp_path):
    """Three sessions: without FLAIR, without DWI, and with nothing but FLAIR."""
    root = tmp_path / "lacking"
    for number, gone in {1: (2,), 2: (0,), 3: (0, 1)}.items():
        for place, (source, copy) in enumerate(zip(published(isles, number), published(root, number))):
            if place not in gone:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, copy)
    return root


def test_sessions_that_lack_channels_are_left_out_unless_they_are_asked_for(lacking):
    with pytest.raises(UserError, match="no flair image"):
        find_cases(lacking, ("dwi", "adc", "flair"), images_only=False)
    cases, skipped = find_cases(lacking, ("dwi", "adc", "flair"), images_only=False, allow_missing=True)
    assert [list(case.images) for case in cases] == [["dwi", "adc"], ["adc", "flair"]], "the first gives the grid"
    assert [(item.what, item.reason) for item in skipped] == [
        (f"{name(3)}_ses-0001", "no dwi and no adc image, on whose grid its mask lies")
    ]
    cases, _ = find_cases(lacking, ("dwi", "adc", "flair"), images_only=True, allow_missing=True)
    assert [list(case.images) for case in cases] == [["dwi", "adc"], ["adc", "flair"], ["flair"]]
    cases, skipped = find_cases(lacking, ("dwi", "flair"), images_only=False, allow_missing=True)
    assert [list(case.images) for case in cases] == [["dwi"], ["adc", "flair"]], "ADC places the mask"


@pytest.mark.slow
def test_nnunet_checks_plans_and_preprocesses_cases_that_lack_channels(lacking, isles, tools, tmp_path):
    env = tools.environment(tmp_path / "out")
    done = tools.run_script(502, "-i", lacking, "--allow_missing", env=env)
    assert done.returncode == 0, done.stderr
    assert "nnssl_settings=channels=any nnUNetv2_train 502" in done.stdout
    folder = tmp_path / "out" / "nnUNet_raw" / "Dataset502_ISLES2022"
    first, second = (f"{name(number)}_ses-0001" for number in (1, 2))
    assert tools.check_geometry(folder, 3) == {first, second}
    assert json.loads((folder / "dataset.json").read_text())["missing_channels"] == {first: ["FLAIR"], second: ["DWI"]}
    assert [row["missing_channels"] for row in tools.report_of(folder).values()] == ["flair", "dwi"]
    for number, place in ((1, 2), (2, 0)):
        assert not channel(folder, number, place).any()
        label = nib.load(folder / "labelsTr" / f"{name(number)}_ses-0001.nii.gz").get_fdata()
        np.testing.assert_array_equal(label, stroke(number))
    assert tools.plan_and_preprocess(502, env) == {first, second}
