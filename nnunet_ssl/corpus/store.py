"""The files of a prepared store: write a case so that nnU-Net reads it, recognise one that is whole, read from it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

from nnunet_ssl.files import written_beside

SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")
"""What makes a case, in the order of writing: the .pkl file is there only if the others are complete."""

HALF_STEP = 2.0**-10
"""Half-precision values are no finer than this (standard deviations): finer bits are noise, and do not compress."""


class UnreadableScan(Exception):
    """A stored scan that is damaged, gone, or another than the manifest says; the message names the file."""


def to_half(image: np.ndarray) -> np.ndarray:
    """Round to float16; where that is finer than :data:`HALF_STEP`, to multiples of the step."""
    fine = np.abs(image) < 1
    rounded = np.round(image / HALF_STEP) * HALF_STEP + 0.0  # + 0.0 makes one zero of -0.0 and 0.0
    return np.where(fine, rounded, image).astype(np.float16)


def write_case(
    case: Path,
    image: np.ndarray,
    foreground: np.ndarray,
    properties: Mapping[str, Any],
    *,
    patch_size: Sequence[int],
    fingerprint: str,
    row: Mapping[str, Any],
) -> None:
    """Write a case as nnUNetDatasetBlosc2 reads it, each file by one rename.

    Args:
        case: the files' common path, without suffix.
        image: (1, X, Y, Z).
        foreground: (1, X, Y, Z) int8, 0 inside and -1 outside: nnU-Net's "segmentation".
        properties: nnU-Net's properties of the case.
        patch_size: the crops to choose chunks and blocks for.
        fingerprint: of what the case was made from.
        row: what :func:`finished_row` is to return.
    """
    for suffix, array, shuffle in (
        (".b2nd", image, blosc2.Filter.SHUFFLE),
        ("_seg.b2nd", foreground, blosc2.Filter.NOFILTER),
    ):
        blocks, chunks = comp_blosc2_params(array.shape, patch_size, array.itemsize)
        # The same bytes every time: with several threads the order of a chunk's blocks is left to chance, and the file
        # also records how many threads a reader uses by default.
        layout = {
            "chunks": chunks,
            "blocks": blocks,
            "cparams": {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [shuffle], "nthreads": 1},
            "dparams": {"nthreads": 1},
        }
        with written_beside(f"{case}{suffix}") as path:
            blosc2.asarray(np.ascontiguousarray(array), urlpath=str(path), mode="w", **layout)
    with written_beside(f"{case}.pkl") as path:
        path.write_bytes(pickle.dumps({**properties, "nnunet_ssl": {"fingerprint": fingerprint, "row": row}}))


def finished_row(case: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest row of a case that is whole and made from the same inputs, or None."""
    record = _record(case)
    return record["row"] if record and record["fingerprint"] == fingerprint else None


def is_whole(case: Path) -> bool:
    """Whether a case's arrays are there and as long as they say themselves, and its properties can be read."""
    return _record(case) is not None


def file_sizes(case: Path) -> list[int]:
    """The bytes of a case's files, in the order of :data:`SUFFIXES`."""
    return [Path(f"{case}{suffix}").stat().st_size for suffix in SUFFIXES]


def read_box(path: Path, shape: Iterable[int], box: Iterable[Iterable[int]]) -> np.ndarray:
    """Decompress a part of a stored scan, (X, Y, Z): whoever reads voxels from a store does it here.

    Not memory-mapped, which would be a tenth faster: a mapped file that shrinks or vanishes kills the process.

    Args:
        path: the scan's .b2nd file.
        shape: (X, Y, Z) that the manifest gives the scan.
        box: (3, 2) half-open voxel ranges inside the scan.

    Raises:
        UnreadableScan: the file is missing or damaged, or its shape is another one.
    """
    expected = (1, *map(int, shape))
    try:
        array = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
        if array.shape != expected:
            raise ValueError(f"its shape is {array.shape}, the manifest says {expected}")
        return array[(slice(0, 1), *(slice(int(start), int(stop)) for start, stop in box))][0]
    except Exception as error:  # blosc2 answers damaged files with any kind of exception
        raise UnreadableScan(f"{path} cannot be read ({error})") from error


def padded_patch(
    read: Callable[[np.ndarray], np.ndarray], shape: Sequence[int], start: Sequence[int], size: Sequence[int]
) -> np.ndarray:
    """Return the patch of `size` voxels from `start` on, (X, Y, Z); beyond a volume of `shape` its edge repeats.

    Args:
        read: returns the voxels of a box (3, 2), half open, inside the volume.
    """
    first = np.asarray(start)
    last = first + size
    inside = np.stack([first.clip(0, shape), last.clip(0, shape)], axis=1)
    missing = np.stack([inside[:, 0] - first, last - inside[:, 1]], axis=1)
    return np.pad(read(inside), missing, mode="edge")


def _record(case: Path) -> dict[str, Any] | None:
    """What :func:`write_case` noted beside nnU-Net's properties; None if a file is missing, cut off or damaged."""
    try:
        if not all(_is_as_long_as_it_says(Path(f"{case}{suffix}")) for suffix in SUFFIXES[:2]):
            return None
        return pickle.loads(Path(f"{case}.pkl").read_bytes())["nnunet_ssl"]
    except Exception:  # a damaged pickle raises anything
        return None


def _is_as_long_as_it_says(path: Path) -> bool:
    """Compare a file's size with the length in its first bytes, see Blosc2's "contiguous frame format"."""
    with path.open("rb") as file:
        start = file.read(24)
        size = os.fstat(file.fileno()).st_size
    return start[2:9] == b"b2frame" and int.from_bytes(start[16:24], "big") == size


def remove_case(case: Path) -> None:
    """Remove what there is of a case."""
    for suffix in SUFFIXES:
        Path(f"{case}{suffix}").unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power cut (Windows offers no such call)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
