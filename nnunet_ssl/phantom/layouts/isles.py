"""ISLES 2022: DWI, ADC and FLAIR of acute stroke, skull-stripped; FLAIR on a grid of its own and in another pose."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from nnunet_ssl.phantom.acquisition import ScanGrid, draw_quality, move, scan_grid
from nnunet_ssl.phantom.anatomy import build_anatomy, draw_person, mni_grid
from nnunet_ssl.phantom.layouts.nifti import write_litter, write_nifti
from nnunet_ssl.phantom.lesions import acute_stroke, lesion_volume, white_matter_hyperintensities
from nnunet_ssl.phantom.raters import CONTRAST_TO_NOISE, Annotated

ADC_UNITS = (1e-3, 1.0, 1e3)
"""What an ADC of 1e-3 mm2/s reads in the three units found: mm2/s, 1e-3 mm2/s, 1e-6 mm2/s."""

EMPTY_CASE = 3
"""The number of the case without a lesion, when quirks are wanted."""

MODALITIES = ("dwi", "adc", "flair")

Layout = Literal["bids", "raw", "renamed"]


def write_isles(
    folder: Path | str,
    *,
    n_cases: int,
    voxel_mm: float = 3.0,
    seed: int = 0,
    quirks: bool = True,
    layout: Layout = "bids",
    rater: str | None = None,
    contrast_to_noise: float = CONTRAST_TO_NOISE,
    truth: Path | None = None,
) -> Path:
    """Write a synthetic ISLES 2022.

    Args:
        folder: becomes the data set's top folder (``ISLES-2022``).
        n_cases: labelled cases.
        voxel_mm: 1 is the real size (DWI at 2 mm, FLAIR at 0.45 x 0.45 x 5 mm), 3 is fast.
        seed: fixes everything.
        quirks: three ADC units, oblique affines, header codes and types as seen, slightly negative voxels, every fourth
            case in thick slices, one empty mask, dot-files.
        layout: "bids" as published, "raw" = the older flat one with lower-case ``flair``, "renamed" =
            ``images/`` and ``labels_derivatives/``.
        rater: the one modality that the masks are drawn on, see :func:`nnunet_ssl.phantom.raters.visible_lesion`; None
            for the lesions as they are. The images are the same, bit by bit.
        contrast_to_noise: what the rater sees.
        truth: a folder for the masks of the lesions as they are, ``<case>.nii.gz`` as nnU-Net names them.

    Returns:
        the folder.
    """
    folder = Path(folder)
    rows = []
    for number in range(1, n_cases + 1):
        rng = np.random.default_rng([seed, number])
        person = draw_person(rng, ages=(45, 85))
        healthy = white_matter_hyperintensities(build_anatomy(person, mni_grid(voxel_mm)), rng, person.atrophy)
        anatomy, mask = healthy, np.zeros(healthy.grid.shape, bool)
        if not (quirks and number == EMPTY_CASE):
            volume_ml = lesion_volume(rng, median_ml=10, spread=1.3, smallest_ml=0.5, largest_ml=200)
            anatomy, mask = acute_stroke(anatomy, rng, volume_ml)
        name = f"sub-strokecase{number:04d}"
        files = _file_names(folder, layout, name)
        if truth:
            files["truth"] = Path(truth) / f"{name}_ses-0001.nii.gz"
        annotated = Annotated(healthy, anatomy, mask, rater, contrast_to_noise)
        _write_case(files, annotated, rng, voxel_mm, flair_motion(seed, number), number, quirks)
        rows.append({"participant_id": name, "sex": person.sex, "age": person.age})
        if quirks and number % 4 == 1:
            write_litter(files["dwi"].parent)
    pd.DataFrame(rows).to_csv(folder / "participants.tsv", sep="\t", index=False)
    return folder


def flair_motion(seed: int, number: int) -> np.ndarray:
    """Return how the head of a case lay in the FLAIR scan: (4, 4), a point of the DWI scan (RAS mm) to FLAIR's."""
    rng = np.random.default_rng([seed, number, 7])
    return move(np.eye(4), tuple(rng.uniform(-6, 6, 3)), tuple(rng.uniform(-8, 8, 3)))


def _file_names(folder: Path, layout: Layout, name: str) -> dict[str, Path]:
    session = f"{name}/ses-0001"
    stem = f"{name}_ses-0001"
    scans = folder / {"bids": "", "raw": "rawdata", "renamed": "images"}[layout] / session
    masks = folder / ("labels_derivatives" if layout == "renamed" else "derivatives") / session
    if layout == "raw":
        files = {modality: scans / f"{stem}_{modality}.nii.gz" for modality in ("dwi", "adc", "flair")}
    else:
        files = {modality: scans / "dwi" / f"{stem}_{modality}.nii.gz" for modality in ("dwi", "adc")}
        files["flair"] = scans / "anat" / f"{stem}_FLAIR.nii.gz"
    return files | {"mask": masks / f"{stem}_msk.nii.gz"}


def _write_case(
    files: dict[str, Path],
    case: Annotated,
    rng: np.random.Generator,
    voxel_mm: float,
    motion: np.ndarray,
    number: int,
    quirks: bool,
) -> None:
    in_plane = max(2.0, voxel_mm)
    slices = max(4.8, voxel_mm) if quirks and number % 4 == 0 else in_plane
    tilt = tuple(rng.uniform(-12, 12, 3)) if quirks else (0.0, 0.0, 0.0)
    grid = scan_grid(case.anatomy, (in_plane, in_plane, slices), orientation="LAS", tilt=tilt)
    unit = ADC_UNITS[number % 3] if quirks else 1e3
    quality = draw_quality(rng, stripped=True)
    dwi = _with_negatives(300 * case.acquire("dwi", quality, rng, grid), rng, quirks)
    adc = _with_negatives(case.acquire("adc", quality, rng, grid), rng, quirks)
    codes = {"qform_code": 2, "sform_code": 1} if quirks else {}
    write_nifti(files["dwi"], dwi, grid.affine, np.float64, **codes)
    write_nifti(files["adc"], adc * unit, grid.affine, np.float64, **codes)
    flair_grid = scan_grid(case.anatomy, (0.45 * voxel_mm, 0.45 * voxel_mm, max(5.0, voxel_mm)), orientation="LPS")
    where = ScanGrid(flair_grid.shape, np.linalg.inv(motion) @ flair_grid.affine)
    flair = 200 * case.acquire("flair", draw_quality(rng, thick=True, stripped=True), rng, where)
    write_nifti(files["flair"], flair, flair_grid.affine, np.float32)
    codes = {"qform_code": 0, "sform_code": 2} if quirks else {}
    rounded = grid.affine * (1 + 1e-7) if quirks else grid.affine
    write_nifti(files["mask"], case.drawn_on(grid), rounded, np.uint16, **codes)
    if "truth" in files:
        write_nifti(files["truth"], case.true_on(grid), grid.affine, np.uint8)


def _with_negatives(image: np.ndarray, rng: np.random.Generator, wanted: bool) -> np.ndarray:
    """Make a few voxels slightly negative, as interpolation leaves them."""
    if wanted:
        image = image.copy()
        image[rng.random(image.shape) < 1e-3] = -0.01 * float(image.max())
    return image
