"""Read a scan of a corpus behind the same guard as every image, or say in one line why it cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import get_bbox_from_mask

from nnunet_ssl.imaging.geometry import Volume, read_scan
from nnunet_ssl.imaging.headers import BadScan
from nnunet_ssl.limits import MINIMUM_FOREGROUND_ML, MINIMUM_FOREGROUND_MM


def read_volume(path: Path) -> tuple[Volume, int]:
    """Read a scan as float32; voxels that are not finite become background (zero).

    Returns:
        The scan, its axes in the order of the file, and how many voxels were not finite.

    Raises:
        BadScan: the file is missing or holds no readable 3-D image, its header makes no sense, no voxel differs, or
            next to none is not zero.
        MemoryError: the image is larger than the memory.
    """
    volume = read_scan(path)
    with np.errstate(over="ignore"):
        array = volume.array.astype(np.float32)
    bad = ~np.isfinite(array)
    if bad.all():
        raise BadScan("no finite voxel")
    array[bad] = 0
    values = array[array != 0]
    if values.size == 0:
        raise BadScan("all zero")
    if values.min() == values.max():
        raise BadScan("constant: every voxel that is not zero has the same value")
    clean = volume.with_array(array)
    foreground_box(clean)
    return clean, int(bad.sum())


def foreground_box(volume: Volume, where: str = "") -> list[list[int]]:
    """Return the box of what is not zero, [[x0, x1], [y0, y1], [z0, z1]], half open.

    Raises:
        BadScan: that is too little or too thin for a part of a head; `where` goes into the reason.
    """
    foreground = volume.array != 0
    count = int(foreground.sum())
    if count * volume.voxel_ml < MINIMUM_FOREGROUND_ML:
        raise BadScan(f"only {count} voxels ({count * volume.voxel_ml:.2g} ml) are not zero{where}")
    box = get_bbox_from_mask(foreground)
    extent = np.diff(box)[:, 0] * volume.spacing
    if extent.min() < MINIMUM_FOREGROUND_MM:
        raise BadScan(f"what is not zero{where} is a layer of {extent.min():.2g} mm")
    return box
