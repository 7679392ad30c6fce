import json

import nibabel as nib
import numpy as np
import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.phantom.labels import TISSUES
from nnunet_ssl.phantom.layouts import write_tissue

FAST = {"n_train": 2, "n_test": 1, "voxel_mm": 6.0, "seed": 3}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same heads as three data sets: T1, FLAIR with regions, both channels."""
    root = tmp_path_factory.mktemp("raw")
    return (
        write_tissue(root / "Dataset510_T1", modalities=["t1"], **FAST),
        write_tissue(root / "Dataset511_Flair", modalities=["flair"], labels="regions", **FAST),
        write_tissue(root / "Dataset512_Both", modalities=["flair", "t1"], **FAST),
    )


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def test_nnunet_finds_the_data_sets_whole(written):
    verify = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity").verify_dataset_integrity
    verify(str(written[2]), num_processes=1)
    for folder in written:
        assert len(list((folder / "imagesTs").iterdir())) == len(list((folder / "labelsTs").iterdir())) * (
            2 if folder.name.endswith("Both") else 1
        )
    labels = json.loads((written[0] / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0} | {name: value for value, name in enumerate(TISSUES, start=1)}


def test_cases_of_one_name_are_one_head_on_one_grid_and_a_scan_is_the_same_in_every_data_set(written):
    t1, flair, both = written
    for part, case in (("Tr", "phantom_001"), ("Tr", "phantom_002"), ("Ts", "phantom_003")):
        first, second = (nib.load(folder / f"images{part}/{case}_0000.nii.gz") for folder in (t1, flair))
        np.testing.assert_array_equal(first.affine, second.affine)
        assert first.shape == second.shape
        np.testing.assert_array_equal(
            voxels(t1 / f"labels{part}/{case}.nii.gz"), voxels(both / f"labels{part}/{case}.nii.gz")
        )
        np.testing.assert_array_equal(first.dataobj, voxels(both / f"images{part}/{case}_0001.nii.gz"))
        np.testing.assert_array_equal(second.dataobj, voxels(both / f"images{part}/{case}_0000.nii.gz"))
        brains = [np.asarray(image.dataobj) != 0 for image in (first, second)]
        assert (brains[0] != brains[1]).mean() < 0.01


def test_labels_lie_on_what_they_name(written):
    """On T1, white matter is brighter than cortex and cortex than CSF; a label map of the mirrored head fits worse."""
    for case in ("phantom_001", "phantom_002"):
        image, labels = (
            voxels(written[0] / name) for name in (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz")
        )

        def spread(labels, image=image):
            return sum(image[labels == value].var() * (labels == value).sum() for value in range(6))

        mean = [image[labels == 1 + TISSUES.index(name)].mean() for name in ("white", "cortical_grey", "csf")]
        assert mean[0] > 1.2 * mean[1] > 1.4 * mean[2]
        assert spread(labels) < 0.7 * spread(labels[::-1])


def test_left_labels_lie_left_in_the_files_world(written):
    names = json.loads((written[1] / "dataset.json").read_text())["labels"]
    image = nib.load(written[1] / "labelsTr" / "phantom_001.nii.gz")
    for side, sign in (("left", -1), ("right", 1)):
        values = [value for name, value in names.items() if name.startswith(side)]
        places = nib.affines.apply_affine(image.affine, np.argwhere(np.isin(image.dataobj, values)))
        assert len(values) == 5
        assert sign * places[:, 0].mean() > 15


def test_a_folder_that_nnunet_would_not_find_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tissue is no data set's name to nnU-Net: .* DatasetNNN_Name"):
        write_tissue(tmp_path / "tissue", **FAST)
