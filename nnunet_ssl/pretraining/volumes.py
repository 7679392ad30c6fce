"""Read a scan with nnU-Net's reader, or say in one line why it cannot be used; bring scans onto one grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.processing import resample_from_to
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

MAXIMUM_EXTENT_MM = 700.0
VOXEL_RANGE_MM = (0.05, 30.0)


class BadScan(Exception):
    """A scan that cannot enter a corpus; the message is the reason that failures.tsv shows.

    `transient` says that the cause may pass (a missing file, a disk that did not answer): the next run tries again.
    """

    def __init__(self, reason: str, *, transient: bool = False) -> None:
        super().__init__(" ".join(reason.split()))  # one line in failures.tsv, whatever a library's message was
        self.transient = transient


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where an image's voxels lie.

    Attributes:
        shape: voxels along the axes of the data, (X, Y, Z).
        spacing: mm, in the same order.
        affine: (4, 4), from a voxel in NIfTI's order, which is (z, y, x), to mm.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: np.ndarray

    @property
    def voxel_mm3(self) -> float:
        return float(np.prod(self.spacing))

    def same_as(self, other: Grid, tolerance: float = 0.1) -> bool:
        """Whether the shapes are equal, and no corner lies further apart than `tolerance` of a voxel's edge."""
        if self.shape != other.shape:
            return False
        last_x, last_y, last_z = (size - 1 for size in self.shape)
        corners = np.array([[z, y, x, 1] for z in (0, last_z) for y in (0, last_y) for x in (0, last_x)], float).T
        apart = np.linalg.norm(((self.affine - other.affine) @ corners)[:3], axis=0)
        return bool(apart.max() <= tolerance * min(self.spacing))


@dataclass(frozen=True, kw_only=True)
class Volume:
    """An image in RAS orientation, as nnU-Net's readers hold it: X points to superior, Y to anterior, Z to right.

    Attributes:
        data: (X, Y, Z) float32, finite.
        grid: where its voxels lie.
        nan_voxels: how many voxels were not finite and became background.
    """

    data: np.ndarray
    grid: Grid
    nan_voxels: int = 0

    def as_nifti(self) -> nibabel.Nifti1Image:
        """The image in NIfTI's axis order."""
        return nibabel.Nifti1Image(self.data.transpose(2, 1, 0), self.grid.affine)


def read_volume(path: Path, reader: BaseReaderWriter) -> Volume:
    """Read a scan; voxels that are not finite become background (zero) and are counted.

    Raises:
        BadScan: the file is missing or holds no readable 3-D image, its header makes no sense, or no voxel differs.
        MemoryError: the image is larger than the memory.
    """
    with _bad_if_unreadable("cannot be opened"):
        _check_file(path)
    with _bad_if_unreadable("not a readable NIfTI file"), nibabel.imageglobals.LoggingOutputSuppressor():
        _check_header(nibabel.load(path))
    with _bad_if_unreadable("truncated or corrupt"):
        images, properties = reader.read_images([str(path)])
    data = images[0]
    bad = ~np.isfinite(data)
    nan_voxels = int(bad.sum())
    if nan_voxels == data.size:
        raise BadScan("no finite voxel")
    if nan_voxels:
        data[bad] = 0
    _check_contrast(data)
    affine = properties["nibabel_stuff"]["reoriented_affine"]
    grid = Grid(shape=data.shape, spacing=tuple(properties["spacing"]), affine=affine)
    return Volume(data=data, grid=grid, nan_voxels=nan_voxels)


@contextmanager
def _bad_if_unreadable(what: str) -> Iterator[None]:
    """Whatever a reader stumbles over in a broken file becomes a :class:`BadScan`; it is transient if the disk is."""
    try:
        yield
    except (BadScan, MemoryError):
        raise
    except Exception as error:
        disk = isinstance(error, OSError) and error.errno is not None
        raise BadScan(f"{what} ({type(error).__name__}: {error})", transient=disk) from error


def _check_file(path: Path) -> None:
    if not path.exists():
        kind = "a link that leads nowhere" if path.is_symlink() else "no such file"
        raise BadScan(f"missing ({kind})", transient=True)
    if path.stat().st_size == 0:
        raise BadScan("empty file")


def _check_header(image: nibabel.spatialimages.SpatialImage) -> None:
    if image.ndim != 3:
        raise BadScan(f"{image.ndim}-D, shape {image.shape}: only 3-D images are used")
    if image.get_data_dtype().kind not in "iuf":
        raise BadScan(f"voxels of type {image.get_data_dtype()}: only real numbers are used")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise BadScan("header: the affine is not finite or not invertible")
    written = np.array(image.header.get_zooms(), float)
    implied = nibabel.affines.voxel_sizes(image.affine)
    if not np.allclose(written, implied, rtol=0.05):
        raise BadScan(f"header: voxel size {_mm(written)} by pixdim, but {_mm(implied)} by the affine")
    if implied.min() < VOXEL_RANGE_MM[0] or implied.max() > VOXEL_RANGE_MM[1]:
        raise BadScan(f"header: voxel size {_mm(implied)} is no brain scan's")
    extent = implied * image.shape
    if extent.max() > MAXIMUM_EXTENT_MM or min(image.shape) < 2:
        raise BadScan(f"header: shape {image.shape} with voxels of {_mm(implied)} is no brain scan's")


def _mm(values: np.ndarray) -> str:
    return " x ".join(f"{value:.3g}" for value in values) + " mm"


def _check_contrast(data: np.ndarray) -> None:
    foreground = data[data != 0]
    if foreground.size == 0:
        raise BadScan("all zero")
    if foreground.min() == foreground.max():
        raise BadScan("constant: every voxel that is not zero has the same value")


def on_grid(volume: Volume, grid: Grid) -> Volume:
    """Resample `volume` onto `grid` by their affines (linear, zero outside), unless it lies there already.

    Raises:
        BadScan: nothing of the volume lies inside the grid.
    """
    if volume.grid.same_as(grid):
        return volume
    moved = resample_from_to(volume.as_nifti(), (grid.shape[::-1], grid.affine), order=1)
    data = np.ascontiguousarray(np.asanyarray(moved.dataobj, np.float32).transpose(2, 1, 0))
    if not data.any():
        raise BadScan("does not overlap the grid of its session's sharpest scan")
    return dataclasses.replace(volume, data=data, grid=grid)
