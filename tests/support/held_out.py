"""Folds of models as nnU-Net's validation leaves them: maps of synthetic lesions, unsure, moved and speckled."""

import json
import pickle

import nibabel as nib
import numpy as np
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from scipy import ndimage

SPACING = (1.0, 2.0, 1.5)
CASES = 12
READER = "NibabelIOWithReorient"


def lesion_map(seed, shape=(16, 14, 12)):
    """A true mask of a few lesions, and a map of it that is unsure, moved and speckled."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    truth = field > np.quantile(field, 0.93)
    noise = ndimage.gaussian_filter(rng.normal(size=shape), 0.8)
    return truth, (1 / (1 + np.exp(-(25 * (field - np.quantile(field, 0.93)) + 2.5 * noise)))).astype(np.float32)


def write_fold(folder, cases, reference, *, spoil=0):
    """Leave what nnU-Net's validation leaves: for each case a map in its reader's orientation, and the mask."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = recursive_find_reader_writer_by_name(READER)()
    for case in cases:
        number = int(case[-2:])
        truth, values = lesion_map(number)
        values = values ** (2.2 + spoil)  # too careful: a lower threshold is better
        affine = np.diag([-1.0, 2.0, 1.5, 1.0]) if number % 2 else np.diag([*SPACING, 1.0])
        reference.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(truth.astype(np.uint8), affine), reference / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(values, affine), folder / "image.nii.gz")
        data, properties = reader.read_images([str(folder / "image.nii.gz")])
        (folder / "image.nii.gz").unlink()
        save_case(folder / case, data[0], properties)


def save_case(path, lesion, properties):
    np.savez_compressed(path.with_name(path.name + ".npz"), probabilities=np.stack([1 - lesion, lesion]))
    with path.with_name(path.name + ".pkl").open("wb") as file:
        pickle.dump(properties, file)
    mask = (lesion > 0.5).astype(np.uint8)
    recursive_find_reader_writer_by_name(READER)().write_seg(mask, f"{path}.nii.gz", properties)


def write_models(root, *names):
    cases = [f"sub-{number // 2}_ses-{number:02d}" for number in range(CASES)]
    for place, name in enumerate(names):
        model = root / "nnUNet_results" / "Dataset709_Tiny" / name
        for fold in range(3):
            write_fold(model / f"fold_{fold}" / "validation", cases[fold::3], root / "labelsTr", spoil=0.2 * place)
        (model / "plans.json").write_text(json.dumps({"image_reader_writer": READER}))
        dataset = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
        (model / "dataset.json").write_text(json.dumps(dataset))
    return [root / "nnUNet_results" / "Dataset709_Tiny" / name for name in names]
