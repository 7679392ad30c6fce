import csv

import nibabel as nib
import numpy as np
import pytest

from nnunet_ssl.imaging.skull_strip import looks_stripped
from nnunet_ssl.phantom.layouts import write_atlas3
from nnunet_ssl.phantom.layouts.atlas3 import BACKGROUND, COLUMNS, ODD

VOXEL_MM = 6.0


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_atlas3(tmp_path_factory.mktemp("atlas3") / "ATLAS3_Training_Raw", n_cases=12, voxel_mm=VOXEL_MM)


def files(release, subject):
    anat = next(release.glob(f"*/sub-{subject}/ses-1/anat"))
    image, mask = (
        nib.load(anat / f"sub-{subject}_ses-1_space-orig_{name}.nii.gz")
        for name in ("desc-brain_T1w", "label-lesion_desc-T1lesion_mask")
    )
    return image, mask, (anat / f"sub-{subject}_ses-1_metadata.csv").read_text()


def subjects(release):
    return sorted(path.name.removeprefix("sub-") for path in release.glob("*/sub-*"))


def test_every_case_has_image_mask_and_table_below_its_centre(release):
    assert len(subjects(release)) == 12
    assert {path.parent.name for path in release.glob("*/sub-r029s001")} == {"R029"}
    assert len(list(release.glob("SOOP/sub-soop*/ses-1/anat/[!.]*"))) == 9
    for subject in subjects(release):
        image, mask, table = files(release, subject)
        assert image.shape == mask.shape and table.count("\n") in (1, 2)


def test_orientations_types_and_values_are_as_found(release):
    read = {subject: files(release, subject) for subject in subjects(release)}
    stored = {"".join(nib.aff2axcodes(image.affine)) for image, *_ in read.values()}
    assert stored == {"RAS", "LAS", "PSR", "PSL"}
    assert {image.get_data_dtype().str[1:] for image, *_ in read.values()} == {"f4", "f8"}
    assert len({mask.get_data_dtype() for _, mask, _ in read.values()}) == 6
    values = {subject: set(np.unique(mask.dataobj)) for subject, (_, mask, _) in read.items()}
    assert values["r039s001"] == {0, np.float32(0.9999)}
    assert values["soop0910"] == values["r053s016"] == {0}
    others = values.keys() - {"r039s001", "soop0910", "r053s016"}
    assert all(values[subject] == {0, 1} for subject in others)


def test_brains_are_stripped_and_one_centre_has_another_background(release):
    for subject in subjects(release):
        image = files(release, subject)[0]
        data, voxel_mm3 = image.get_fdata(), np.prod(image.header.get_zooms())
        if subject == "r029s001":
            assert (data == BACKGROUND).mean() > 0.4 and (data != 0).all()
            data = np.where(data == BACKGROUND, 0, data)
        assert looks_stripped(data, voxel_mm3)


def test_lesions_lie_on_dark_brain_tissue_where_the_voxels_say(release):
    for subject in sorted(set(subjects(release)) - {"soop0910", "r053s016", "r029s001"}):
        image, mask, _ = files(release, subject)
        data, lesion = image.get_fdata(), np.asarray(mask.dataobj) > 0
        assert (data[lesion] > 0).mean() > 0.9
        assert np.median(data[lesion]) < 0.9 * np.median(data[(data > 0) & ~lesion])


def test_one_mask_says_it_lies_elsewhere_and_all_others_lie_on_their_image(release):
    off = [
        subject
        for subject in subjects(release)
        if not np.allclose(files(release, subject)[0].affine, files(release, subject)[1].affine)
    ]
    assert off == ["soop1532"]


def test_tables_differ_in_column_order_and_one_has_no_row(release):
    tables = {subject: list(csv.reader(files(release, subject)[2].splitlines())) for subject in subjects(release)}
    assert all(sorted(table[0]) == sorted(COLUMNS) for table in tables.values())
    assert {table[0][0] for subject, table in tables.items() if subject.startswith("soop")} == {"ATLAS2_DATASET"}
    assert {table[0][0] for subject, table in tables.items() if subject.startswith("r")} == {"SESSION_ID"}
    assert [subject for subject, table in tables.items() if len(table) == 1] == ["soop0910"]


def test_clean_means_without_any_of_it(tmp_path):
    release = write_atlas3(tmp_path, n_cases=len(ODD) + 1, voxel_mm=8, quirks=False)
    for subject in subjects(release):
        image, mask, table = files(release, subject)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S") and np.array_equal(image.affine, mask.affine)
        assert mask.get_data_dtype() == np.uint8 and np.asarray(mask.dataobj).any()
        assert table.startswith("SESSION_ID") and table.count("\n") == 2
        assert image.get_fdata().min() == 0
    assert not list(release.rglob(".*"))


def test_a_seed_writes_the_same_again(tmp_path, release):
    again = write_atlas3(tmp_path, n_cases=2, voxel_mm=VOXEL_MM)
    for subject in subjects(again):
        for first, second in zip(files(release, subject)[:2], files(again, subject)[:2]):
            assert np.array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
