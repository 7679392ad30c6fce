"""ATLAS R3.0, the data of ISLES'26: native T1 of stroke, skull-stripped, as 55 centres scanned and stored it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_ssl.phantom.acquisition import ScanGrid, acquire, draw_quality, resample_onto_scan, scan_grid
from nnunet_ssl.phantom.anatomy import build_anatomy, draw_person, mni_grid
from nnunet_ssl.phantom.layouts.nifti import write_litter, write_nifti
from nnunet_ssl.phantom.lesions import chronic_stroke, lesion_volume

COLUMNS = ("SESSION_ID", "ATLAS2_DATASET", "DAYS_POST_STROKE", "CHRONICITY", "SITE")
BACKGROUND = -4.0
"""What stands outside the brain at the centre R029."""

_MASK_TYPES = (np.uint8, np.float64, np.int16, np.float32, np.uint16, np.int32)
_TIMES = (("471.0", ""), ("", "1.0"), ("12.0", ""), ("", ""), ("-3.0", "1"), ("181.5", "1"))  # days, chronicity
_ATLAS2 = ("Training", "Testing", "Training", "")


@dataclass(frozen=True, kw_only=True)
class Oddity:
    """What is odd about a case.

    Attributes:
        orientation: as stored.
        thick: slices of 6 mm.
        background: the value outside the brain.
        lesion: False for an empty mask, which is true.
        one: the value that a mask has for 1.
        header_only: its table has no row.
        off_mm: how far the mask's header puts it from the image, though the voxels fit.
    """

    orientation: str = "RAS"
    thick: bool = False
    background: float = 0.0
    lesion: bool = True
    one: float = 1.0
    header_only: bool = False
    off_mm: float = 0.0


ODD = {
    "r001s002": Oddity(orientation="LAS"),
    "r029s001": Oddity(background=BACKGROUND),
    "soop0468": Oddity(orientation="PSR", thick=True),
    "soop0910": Oddity(lesion=False, header_only=True),
    "r039s001": Oddity(orientation="PSL", one=0.9999),
    "soop1532": Oddity(orientation="LAS", thick=True, off_mm=24.0),
    "r053s016": Oddity(lesion=False),
}
"""The odd cases by their names, which are real ones; the rest is RAS."""

_FIRST = ("r001s001", *ODD)


def write_atlas3(
    folder: Path | str, *, n_cases: int, voxel_mm: float = 3.0, seed: int = 0, quirks: bool = True
) -> Path:
    """Write a synthetic ATLAS R3.0, raw release.

    Args:
        folder: becomes the data set's top folder (``ATLAS3_Training_Raw``).
        n_cases: all with a mask; the first eight hold every oddity, the others spread unevenly over more centres.
        voxel_mm: 1 is about the real size, 3 is fast.
        seed: fixes everything.
        quirks: oddities, masks of six types, tables of another column order at one centre, dot-files.

    Returns:
        the folder.
    """
    folder = Path(folder)
    for number, subject in zip(range(n_cases), _subjects()):
        site = "SOOP" if subject.startswith("soop") else subject[:4].upper()
        anat = folder / site / f"sub-{subject}" / "ses-1" / "anat"
        stem = anat / f"sub-{subject}_ses-1"
        oddity = ODD.get(subject, Oddity()) if quirks else Oddity()
        mask_type = _MASK_TYPES[number % len(_MASK_TYPES)] if quirks else np.uint8
        if oddity.one != 1:
            mask_type = np.float32
        _write_case(stem, np.random.default_rng([seed, number]), voxel_mm, mask_type, oddity, double=number % 5 > 0)
        _write_table(stem, site, number, oddity, swapped=quirks and site == "SOOP")
        if quirks and number % 4 == 0:
            write_litter(anat)
    return folder


def _subjects() -> Iterator[str]:
    """Yield the names of the first cases, then centres of uneven size, the size falling from 6 to 1 and again."""
    yield from _FIRST
    for number in range(2, 29):
        for case in range(6 - number % 6):
            yield f"r{number:03d}s{1 + case:03d}"


def _write_case(
    stem: Path, rng: np.random.Generator, voxel_mm: float, mask_type: type, oddity: Oddity, double: bool
) -> None:
    anatomy = build_anatomy(draw_person(rng, ages=(35, 85)), mni_grid(voxel_mm))
    mask = np.zeros(anatomy.grid.shape, dtype=bool)
    if oddity.lesion:
        volume_ml = lesion_volume(rng, median_ml=12, spread=1.2, smallest_ml=1, largest_ml=200)
        anatomy, mask = chronic_stroke(anatomy, rng, volume_ml)
    slices = max(6.0, voxel_mm) if oddity.thick else voxel_mm
    grid = scan_grid(anatomy, (voxel_mm, voxel_mm, slices), orientation=oddity.orientation)
    image = 300 * acquire(anatomy, "t1", draw_quality(rng, thick=oddity.thick, stripped=True), rng, grid)
    label = resample_onto_scan(mask.astype(np.float32), anatomy.grid.affine, grid) > 0.5
    if oddity.background:
        image = np.where(image == 0, oddity.background, image)
    write_nifti(_named(stem, "space-orig_desc-brain_T1w.nii.gz"), image, grid.affine, "f8" if double else "f4")
    where = _moved(grid, oddity.off_mm)
    write_nifti(
        _named(stem, "space-orig_label-lesion_desc-T1lesion_mask.nii.gz"), label * oddity.one, where.affine, mask_type
    )


def _moved(grid: ScanGrid, shift_mm: float) -> ScanGrid:
    affine = grid.affine.copy()
    affine[2, 3] += shift_mm
    return ScanGrid(grid.shape, affine)


def _write_table(stem: Path, site: str, number: int, oddity: Oddity, swapped: bool) -> None:
    days, chronicity = _TIMES[number % len(_TIMES)]
    atlas2 = "" if site == "SOOP" else _ATLAS2[number % len(_ATLAS2)]
    row = dict(zip(COLUMNS, (stem.name, atlas2, days, chronicity, site)))
    columns = (COLUMNS[1], COLUMNS[0], *COLUMNS[2:]) if swapped else COLUMNS
    lines = [columns] if oddity.header_only else [columns, [row[name] for name in columns]]
    _named(stem, "metadata.csv").write_text("".join(",".join(line) + "\n" for line in lines))


def _named(stem: Path, ending: str) -> Path:
    return stem.with_name(f"{stem.name}_{ending}")
