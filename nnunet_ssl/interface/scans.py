"""Read images as pre-training sees them, by the steps of ``nnssl_prepare`` themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ssl.corpus.modalities import UNKNOWN
from nnunet_ssl.corpus.plans import PreparationConfig, make_plans
from nnunet_ssl.corpus.session import ScanTask, SessionTask, prepare_session
from nnunet_ssl.corpus.store import read_box
from nnunet_ssl.errors import UserError


@dataclass(frozen=True, repr=False)
class Scan:
    """A scan, cropped, normalised and resampled.

    Attributes:
        path: where it came from.
        array: (1, X, Y, Z) float32; X runs from inferior to superior, Y from posterior to anterior, Z from left to
            right. Inside the foreground, mean 0 and standard deviation 1 before resampling; outside 0.
        spacing: mm, in the order of the array's axes.
        foreground: (3, 2), the box of what is not background, in voxels, half open.
    """

    path: Path
    array: np.ndarray
    spacing: tuple[float, float, float]
    foreground: np.ndarray

    def __repr__(self) -> str:
        shape, spacing = ("x".join(f"{value:g}" for value in values) for values in (self.array.shape[1:], self.spacing))
        return f"Scan({self.path.name}, {shape} voxels of {spacing} mm)"


def read_scan(path: Path | str, preprocessing: Mapping[str, Any] | None = None) -> Scan:
    """Read an image (NIfTI or what else nibabel reads) as pre-training sees it.

    Args:
        path: the file.
        preprocessing: an encoder's (:attr:`LoadedEncoder.preprocessing`); None for the package's own: RAS, 1 mm,
            clipped to the foreground's 0.5 and 99.5 percentiles, z-scored inside it.

    Raises:
        UserError: the file cannot be used as a scan.
    """
    return read_session([path], preprocessing)[0]


def read_session(paths: Sequence[Path | str], preprocessing: Mapping[str, Any] | None = None) -> list[Scan]:
    """Read the scans of one session; those that lie in one place share grid and box, voxel by voxel.

    Args:
        paths: the files, all of one head on one day.
        preprocessing: as for :func:`read_scan`.

    Returns:
        the scans, in the order of `paths`.

    Raises:
        UserError: a file cannot be used as a scan.
    """
    if not paths or isinstance(paths, str):
        raise UserError(f"read_session takes a list of image files, not {paths!r}.")
    plans = make_plans("read_session", _options(preprocessing or {}))
    scans = tuple(
        ScanTask(scan_id=f"scan_{number}", path=str(path), modality=UNKNOWN) for number, path in enumerate(paths)
    )
    with tempfile.TemporaryDirectory(prefix="nnunet_ssl_") as folder:
        result = prepare_session(SessionTask(session="", fingerprint="", scans=scans, folder=folder, plans=plans))
        if result.failures:
            raise UserError("; ".join(f"{failure['path']}: {failure['reason']}" for failure in result.failures))
        rows = {row["scan_id"]: row for row in result.rows}
        return [_read(Path(folder), scan, rows[scan.scan_id], plans["preprocessing"]["spacing"]) for scan in scans]


def _options(preprocessing: Mapping[str, Any]) -> PreparationConfig:
    """The options of ``nnssl_prepare`` that an encoder's preprocessing was made with."""
    defaults = PreparationConfig()
    return PreparationConfig(
        spacing=tuple(preprocessing.get("spacing", defaults.spacing)),
        dtype=preprocessing.get("dtype", defaults.dtype),
        skull_strip=preprocessing.get("skull_strip"),
        register=preprocessing.get("register"),
    )


def _read(folder: Path, scan: ScanTask, row: Mapping[str, Any], spacing: Sequence[float]) -> Scan:
    shape = [int(size) for size in row["shape"].split(",")]
    box = np.array(row["bbox"].split(","), int).reshape(3, 2)
    voxels = read_box(folder / f"{scan.scan_id}.b2nd", shape, [(0, size) for size in shape])
    x, y, z = spacing
    return Scan(Path(scan.path), voxels[None].astype(np.float32), (x, y, z), box)
