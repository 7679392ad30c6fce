"""How the layouts write a NIfTI file, and the litter that real folders hold beside them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np


def write_nifti(
    path: Path,
    array: np.ndarray,
    affine: np.ndarray,
    dtype: type | str = np.float32,
    *,
    qform_code: int = 1,
    sform_code: int = 1,
) -> Path:
    """Write an array as NIfTI-1. Integer types are rounded; a form with code 0 is left out of the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if np.issubdtype(np.dtype(dtype), np.integer):
        array = np.rint(array)
    image = nib.Nifti1Image(array.astype(dtype), affine)
    image.set_sform(affine if sform_code else None, code=sform_code)
    image.set_qform(affine if qform_code else None, code=qform_code)
    nib.save(image, path)
    return path


def write_litter(folder: Path) -> None:
    """Leave what file browsers and archivers leave in a folder: dot-files, one of them posing as an image."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    images = sorted(path for path in folder.iterdir() if path.name.endswith(".nii.gz") and path.name[0] != ".")
    for path in images[:1]:
        (folder / f"._{path.name}").write_bytes(b"\0\5\26\7Mac OS X")
