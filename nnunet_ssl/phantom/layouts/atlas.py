"""ATLAS v2.0 (R2.0): T1 of chronic stroke registered to MNI, in cohorts, training with masks and testing without."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from nnunet_ssl.phantom.acquisition import acquire, draw_quality
from nnunet_ssl.phantom.anatomy import build_anatomy, draw_person, mni_grid
from nnunet_ssl.phantom.layouts.nifti import write_litter, write_nifti
from nnunet_ssl.phantom.lesions import chronic_stroke, lesion_volume

_SPACE = "space-MNI152NLin2009aSym"
_MASK_TYPES = ((np.uint8, 1), (np.float64, 1), (np.uint8, 255), (np.float32, 1), (np.int16, 1))  # dtype, value


def write_atlas(
    folder: Path | str,
    *,
    n_train: int,
    n_test: int,
    voxel_mm: float = 3.0,
    seed: int = 0,
    quirks: bool = True,
    rearranged: bool = False,
    skull: bool = True,
    truth: Path | None = None,
) -> Path:
    """Write a synthetic ATLAS.

    Args:
        folder: becomes the data set's top folder (``ATLAS_2``).
        n_train: cases with a lesion mask, spread unevenly over cohorts.
        n_test: cases without; `truth` has their masks.
        voxel_mm: 1 is the real size (197 x 233 x 189), 3 is fast.
        seed: fixes everything.
        quirks: dot-files, foreign files and masks of several types and values.
        rearranged: the variant ``data/{train,test}/derivatives/ATLAS/sub-*``.
        skull: keep skull and scalp, as ATLAS does.
        truth: a folder for the masks that the organisers keep to themselves, ``<case>.nii.gz`` as nnU-Net names them.

    Returns:
        the folder.
    """
    folder = Path(folder)
    names = _case_names(n_train + n_test)
    for i, (cohort, subject) in enumerate(names):
        training = i < n_train
        if rearranged:
            root = folder / "data" / ("train" if training else "test") / "derivatives" / "ATLAS"
        else:
            root = folder / ("Training" if training else "Testing") / cohort
        anat = root / f"sub-{subject}" / "ses-1" / "anat"
        mask_type = _MASK_TYPES[i % len(_MASK_TYPES)] if quirks else _MASK_TYPES[0]
        stem = f"sub-{subject}_ses-1"
        mask_path = anat / f"{stem}_{_SPACE}_label-L_desc-T1lesion_mask.nii.gz" if training else None
        if truth and not training:
            mask_path, mask_type = Path(truth) / f"{stem}.nii.gz", _MASK_TYPES[0]
        image_path = anat / f"{stem}_{_SPACE}_T1w.nii.gz"
        _write_case(image_path, mask_path, np.random.default_rng([seed, i]), voxel_mm, mask_type, skull)
        root.joinpath("dataset_description.json").write_text(json.dumps({"Name": "ATLAS", "BIDSVersion": "1.4.1"}))
        if quirks and i % 4 == 0:
            write_litter(anat)
    if quirks:
        _write_foreign_files(folder, voxel_mm)
    return folder


def _case_names(count: int) -> list[tuple[str, str]]:
    """Return (cohort, subject) of each case: cohorts R001, R002, R004 ... of uneven size, ids with gaps."""
    names: list[tuple[str, str]] = []
    cohort, size = 1, max(2, count // 3)
    while len(names) < count:
        for k in range(min(size, count - len(names))):
            names.append((f"R{cohort:03d}", f"r{cohort:03d}s{1 + k + k // 3:03d}"))
        cohort += 1 + cohort % 2
        size = max(2, int(size * 0.6))
    return names


def _write_case(
    image_path: Path,
    mask_path: Path | None,
    rng: np.random.Generator,
    voxel_mm: float,
    mask_type: tuple[type, int],
    skull: bool,
) -> None:
    anatomy = build_anatomy(draw_person(rng), mni_grid(voxel_mm), pose=False)
    volume_ml = lesion_volume(rng, median_ml=25, spread=0.9, smallest_ml=5, largest_ml=150)
    anatomy, mask = chronic_stroke(anatomy, rng, volume_ml)
    image = acquire(anatomy, "t1", draw_quality(rng, stripped=not skull), rng)
    write_nifti(image_path, image * 300, anatomy.grid.affine, np.float32, qform_code=0, sform_code=4)
    if mask_path:
        dtype, value = mask_type
        write_nifti(mask_path, mask * value, anatomy.grid.affine, dtype, qform_code=0, sform_code=4)


def _write_foreign_files(folder: Path, voxel_mm: float) -> None:
    folder.joinpath("20211112_ATLAS_2.0_SupplementaryInfo.csv").write_text("Subject ID,Session\n")
    folder.joinpath("20220425_ATLAS_2.0_MetaData.xlsx").write_bytes(b"PK\3\4")
    grid = mni_grid(voxel_mm)
    template = nib.Nifti1Image(np.zeros(grid.shape, np.uint8), grid.affine)
    nib.save(template, folder / "MNI152NLin2009aSym.nii.gz")
    write_litter(folder)
