"""Probability maps: read what ``nnUNetv2_predict --save_probabilities`` wrote, and score a map without a threshold."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np

from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging.geometry import Volume, read_volume, same_grid

TURNED_TO_RAS = {
    "SimpleITKIO": False,
    "NibabelIO": False,
    "SimpleITKIOWithReorient": True,
    "NibabelIOWithReorient": True,
}
"""nnU-Net's readers of three-dimensional medical images, and whether they turn an image to RAS.

The segmentation is turned back when it is written; the probabilities are not.
"""

UNSURE = 1e-3
"""So near to 0.5, rounding decides on which side nnU-Net puts a voxel."""

ROUNDING = 0.01
"""So near to 1 are the sums of a softmax's probabilities, also if 16 bits hold each."""

LEVELS = 4
"""How far up plans.json may lie: in a fold's ``validation`` folder, it is two folders up."""


def pr_auc(reference: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the area under the voxels' precision-recall curve as ISLES'26 takes it.

    By trapezoids over all voxels of the map as float32, which is not average precision. Without a lesion it is 1 where
    the map is exactly constant, else 0.

    Args:
        reference: bool (X, Y, Z).
        probabilities: float, the same shape; larger means lesion, the scale does not matter.
    """
    from sklearn.metrics import auc, precision_recall_curve

    scores = np.asarray(probabilities, dtype=np.float32).ravel()
    if not reference.any():
        return float((scores == scores[0]).all())
    precision, recall, _ = precision_recall_curve(reference.ravel(), scores)
    return float(auc(recall, precision))


def find_map(folder: Path, case: str, *, images: bool) -> Path | None:
    """Return a case's map: nnU-Net's ``CASE.npz`` or, where the folder holds `images` of maps, ``CASE.nii.gz``."""
    endings = (".npz", ".nii.gz", ".nii") if images else (".npz",)
    return next((path for end in endings if (path := folder / f"{case}{end}").is_file()), None)


def read_map(path: Path, mask: Volume, label: int | None) -> np.ndarray:
    """Read how likely each voxel is lesion, float32 (X, Y, Z) on a mask's grid.

    Args:
        path: nnU-Net's ``.npz`` or an image.
        mask: on whose grid the map lies.
        label: the label that is the lesion; None takes everything but the background. Of no use to an image.

    Raises:
        UserError: the map can't be read, does not fit the mask's grid, or holds NaN or infinite values.
    """
    values = _read_npz(path, mask, label) if path.suffix == ".npz" else _read_image(path, mask)
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinite values: voxels can't be ranked by them.")
    return values


def _read_image(path: Path, mask: Volume) -> np.ndarray:
    volume = read_volume(path)
    if not same_grid(volume, mask):
        raise UserError(f"{path} does not lie on the grid of its mask. Resample it, or predict again.")
    return volume.array


def _read_npz(path: Path, mask: Volume, label: int | None) -> np.ndarray:
    """Read nnU-Net's map as its reader's orientation has it, and turn it to the mask's."""
    values = onto_image(read_lesion_channel(path, label), mask.affine, turned=_turned_to_ras(path))
    if values.shape != mask.array.shape:
        raise UserError(f"{path} holds {values.shape} voxels, but its mask {mask.array.shape}: predict both together.")
    return values


def onto_image(values: np.ndarray, affine: np.ndarray, *, turned: bool) -> np.ndarray:
    """Bring an array (Z, Y, X) of nnU-Net's to the axes of its image, (X, Y, Z) as stored with this affine.

    Args:
        turned: whether nnU-Net saw the image turned to RAS.
    """
    values = values.transpose(2, 1, 0)
    if not turned:
        return values
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.io_orientation(affine))
    return nib.apply_orientation(values, back)


def read_lesion_channel(path: Path, label: int | None = None) -> np.ndarray:
    """Read the lesion's probability, float32 (Z, Y, X) in the orientation of nnU-Net's reader, from its ``.npz``.

    Of regions, which overlap, the likeliest counts where any label is lesion: nnU-Net's mask is where one is above 0.5.

    Raises:
        UserError: it can't be read, or has no such label.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            classes = file["probabilities"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} holds no probabilities of nnU-Net ({error}): predict again with --save_probabilities."
        ) from error
    if classes.ndim != 4 or (label is not None and label >= len(classes) > 1):
        raise UserError(f"{path} holds an array of {classes.shape}, not (classes, Z, Y, X) with the lesion's label.")
    if len(classes) > 1 and not _are_exclusive(classes):
        if label is not None:
            raise UserError(f"{path} holds the probabilities of regions, of which none is that of the label {label}.")
        return classes.max(axis=0).astype(np.float32)
    return lesion_channel(classes, label).astype(np.float32)


def _are_exclusive(classes: np.ndarray) -> bool:
    """Tell classes, of which each voxel has one (a softmax), from regions, of which it has any number (sigmoids)."""
    return bool(np.abs(classes.sum(axis=0, dtype=np.float32) - 1).max(initial=0) < ROUNDING)


def lesion_channel(classes: np.ndarray, label: int | None = None) -> np.ndarray:
    """Return the lesion's probability, (Z, Y, X). One channel is a region's; else the first is the background's."""
    if len(classes) <= 2:  # taken as it is: one minus the background would round small probabilities to one value
        return classes[-1 if label is None or len(classes) == 1 else label]
    return classes[1:].sum(axis=0) if label is None else classes[label]


def belongs_to(probabilities: np.ndarray, mask: np.ndarray) -> bool:
    """Tell whether a lesion's map is that of which nnU-Net made a mask: the mask is where the lesion is likelier.

    Nothing else tells a map from that of another case, or of an earlier prediction, on the same grid.

    Args:
        probabilities: float, of two classes.
        mask: bool, the same shape.
    """
    differs = (probabilities > 0.5) != mask
    return not (np.abs(probabilities[differs] - 0.5) > UNSURE).any()


def _turned_to_ras(path: Path) -> bool:
    """Tell by nnU-Net's own files, beside the map or above, how its reader turned the image."""
    for folder in list(path.absolute().parents)[:LEVELS]:
        for name, key in (("plans.json", "image_reader_writer"), ("dataset.json", "overwrite_image_reader_writer")):
            file = folder / name
            reader = json.loads(file.read_text()).get(key) if file.is_file() else None
            if reader in TURNED_TO_RAS:
                return TURNED_TO_RAS[reader]
            if reader is not None:
                raise UserError(f"{file} names the reader {reader}, whose probability maps can't be placed.")
    raise UserError(
        f"Neither plans.json nor dataset.json beside {path} or above it says how nnU-Net turned the image: copy "
        "plans.json from the model's folder to there."
    )
