"""Open a NIfTI file behind one guard: whoever reads a scan or a mask learns here whether its header makes sense."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from nnunet_ssl.limits import MAXIMUM_EXTENT_MM, VOXEL_RANGE_MM, VOXEL_SIZE_TOLERANCE

_GZIP = b"\x1f\x8b"
_NIFTI = {size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big")}  # a header begins by its size


class BadScan(Exception):
    """A file that holds no usable scan; the message is the reason, in one line and without the file's name.

    `transient` says that the cause may pass (a missing file, a disk that did not answer): the next run tries again.
    """

    def __init__(self, reason: str, *, transient: bool = False) -> None:
        super().__init__(" ".join(reason.split()))  # one line in failures.tsv, whatever a library's message was
        self.transient = transient


def is_default(affine: np.ndarray) -> bool:
    """Whether an affine (4, 4) is what programs write that were told of no place: the first voxel lies at 0, 0, 0 mm
    and the axes are those of the world, as nibabel (RAS) or ITK (LPS) have them. Scanners write no such thing."""
    linear = affine[:3, :3]
    return bool(np.allclose(affine[:3, 3], 0, atol=1e-6) and np.allclose(linear, np.diag(np.diag(linear)), atol=1e-6))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A NIfTI file whose header makes sense.

    Attributes:
        image: its voxels are not read yet.
        affine: (4, 4), voxel index to RAS+ mm.
        oriented: False when the file gave neither sform nor qform, so that the affine is a guess.
        notes: what is odd about the header, and was mended.
    """

    image: nib.spatialimages.SpatialImage
    affine: np.ndarray
    oriented: bool
    notes: tuple[str, ...] = ()

    def voxels(self) -> np.ndarray:
        """Read the voxels, (X, Y, Z), in the type that the header asks for.

        Raises:
            BadScan: the file is truncated or corrupt.
            MemoryError: the image is larger than the memory.
        """
        with bad_if_unreadable("truncated or corrupt"):
            return np.asarray(self.image.dataobj).reshape(self.image.shape[:3])


def open_nifti(path: Path) -> Opened:
    """Open a 3-D image; trailing axes of length 1 are dropped.

    Of sform and qform the first counts that is set and makes sense, in nibabel's order.

    Raises:
        BadScan: the file is missing, is no NIfTI image or not a single volume of real numbers, or its header is
            impossible.
    """
    with bad_if_unreadable("cannot be opened"):
        _check_file(path)
    with bad_if_unreadable("not a readable NIfTI file"), _silent_nibabel():
        image = nib.load(path)
        if not isinstance(image, nib.spatialimages.SpatialImage):
            raise BadScan(f"a {type(image).__name__}: only images of voxels are used")
        shape = image.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3:
            raise BadScan(f"{len(shape)}-D, shape {image.shape}: only 3-D images are used")
        if image.get_data_dtype().kind not in "iuf":
            raise BadScan(f"voxels of type {image.get_data_dtype()}: only real numbers are used")
        return _placed(image, shape)


@contextmanager
def _silent_nibabel() -> Iterator[None]:
    """Nibabel says what it mends in a header without saying of which file."""
    said = nib.imageglobals.logger
    before, said.disabled = said.disabled, True
    try:
        yield
    finally:
        said.disabled = before


@contextmanager
def bad_if_unreadable(what: str) -> Iterator[None]:
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
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise BadScan("empty file")
    name = path.name.lower()
    if name.endswith(".nii") and start.startswith(_GZIP):
        raise BadScan("compressed by gzip, though named .nii: rename it to end in .nii.gz")
    if name.endswith(".nii.gz") and start in _NIFTI:
        raise BadScan("not compressed, though named .nii.gz: rename it to end in .nii")


def _placed(image: nib.spatialimages.SpatialImage, shape: tuple[int, ...]) -> Opened:
    """Find the affine that holds, and check it."""
    header = image.header
    if isinstance(header, nib.Nifti1Header):  # or NIfTI 2's, which builds on it
        forms = {"sform": header.get_sform(coded=True)[0], "qform": _qform(header)}
        forms = {name: affine for name, affine in forms.items() if affine is not None}
    else:  # a single affine, and no doubt about it
        forms = {"affine": image.affine}
    usable = {name: affine for name, affine in (forms or {"guess": image.affine}).items() if _invertible(affine)}
    if not usable:
        raise BadScan("header: the affine is not finite or not invertible")
    name, affine = next(iter(usable.items()))
    _check_size(affine, header, shape)
    broken = [other for other in forms if other not in usable]
    notes = [f"header: its {other} is not invertible, so its {name} is used" for other in broken if name == "qform"]
    return Opened(image=image, affine=np.asarray(affine, np.float64), oriented=bool(forms), notes=tuple(notes))


def _qform(header: nib.Nifti1Header) -> np.ndarray | None:
    """The qform, or None if it is not set; one that nibabel cannot make sense of is full of NaN."""
    try:
        return header.get_qform(coded=True)[0]
    except nib.spatialimages.HeaderDataError:
        return np.full((4, 4), np.nan)


def _invertible(affine: np.ndarray) -> bool:
    return bool(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) >= 1e-9)


def _check_size(affine: np.ndarray, header: nib.spatialimages.SpatialHeader, shape: tuple[int, ...]) -> None:
    """Refuse voxels and fields of view that no brain scan has, and headers that contradict themselves."""
    written, implied = np.array(header.get_zooms()[:3], float), nib.affines.voxel_sizes(affine)
    if not np.allclose(written, implied, rtol=VOXEL_SIZE_TOLERANCE):
        raise BadScan(f"header: voxel size {_mm(written)} by pixdim, but {_mm(implied)} by the affine")
    unit = _unit(header)
    unit = f" (its unit is said to be {unit})" if unit not in ("mm", "unknown") else ""
    if implied.min() < VOXEL_RANGE_MM[0] or implied.max() > VOXEL_RANGE_MM[1]:
        raise BadScan(f"header: voxel size {_mm(implied)} is no brain scan's{unit}")
    if (implied * shape).max() > MAXIMUM_EXTENT_MM or min(shape) < 2:
        raise BadScan(f"header: shape {tuple(shape)} with voxels of {_mm(implied)} is no brain scan's{unit}")


def _unit(header: nib.spatialimages.SpatialHeader) -> str:
    """The unit of length; scanners write bytes that stand for none, and nothing but a message depends on it."""
    if not isinstance(header, nib.Nifti1Header):  # a format without units
        return "mm"
    try:
        return str(header.get_xyzt_units()[0])
    except KeyError:
        return "unknown"


def _mm(values: np.ndarray) -> str:
    return " x ".join(f"{value:.3g}" for value in values) + " mm"
