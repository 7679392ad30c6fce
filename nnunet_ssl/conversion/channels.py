"""Read the channels of a case and bring them onto one grid: by header where they were scanned together, else by
registration; voxel by voxel where one of two images of the same shape says nothing of its place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ssl.imaging.geometry import Volume, alike_but_unplaced, read_volume, resample_onto, same_grid
from nnunet_ssl.imaging.registration import register_rigid

Facts = dict[str, Any]
"""What was done to a case, for the report: column -> value; "notes" is a list of sentences."""


def usable_channels(
    there: Collection[str], channels: Sequence[str], references: Sequence[str], *, allow_missing: bool
) -> tuple[str, ...] | str:
    """Return which images of a case to read, the first of them giving the grid, or why it cannot be used.

    Args:
        there: the images that it has.
        channels: of the data set.
        references: images on whose grid the case can be put together, the best first.
        allow_missing: whether channels may be missing; if not, the first reference must be there, too.
    """
    if not allow_missing:
        needed = tuple(dict.fromkeys((references[0], *channels)))
        missing = [name for name in needed if name not in there]
        return f"no {' and no '.join(missing)} image" if missing else needed
    wanted = [name for name in channels if name in there]
    reference = next((name for name in references if name in there), None)
    if not wanted:
        return f"no {' and no '.join(channels)} image"
    if reference is None:
        return f"no {' and no '.join(references)} image, on whose grid its mask lies"
    return tuple(dict.fromkeys((reference, *wanted)))


def read_image(path: Path, facts: Facts) -> Volume:
    """Read an image; NaN and infinite voxels, which nnU-Net refuses, become 0."""
    volume = read_volume(path)
    for oddity in volume.notes:
        note(facts, f"{path.name}: {oddity}")
    return finite(volume, facts)


def finite(image: Volume, facts: Facts) -> Volume:
    """Set NaN and infinite voxels to 0; float32."""
    broken = ~np.isfinite(image.array)
    _count(facts, "nonfinite_voxels", broken)
    return image.with_array(np.where(broken, np.float32(0), image.array).astype(np.float32, copy=False))


def without_negative(image: Volume, facts: Facts) -> Volume:
    """Set negative voxels to 0."""
    _count(facts, "negative_voxels", image.array < 0)
    return image.with_array(np.maximum(image.array, 0))


def with_places(images: Mapping[str, Volume], facts: Facts) -> dict[str, Volume]:
    """Give each image whose header says nothing of its place that of one of the same shape that does; else say so."""
    placed = dict(images)
    for name, image in images.items():
        if image.oriented:
            continue
        shape = image.array.shape
        twin = next((key for key, other in images.items() if other.oriented and other.array.shape == shape), None)
        if twin is None:
            note(facts, f"CHECK: {name} has no orientation in its header and is taken to be stored as RAS")
            continue
        note(facts, f"{name} has no orientation in its header and was laid voxel by voxel on {twin}")
        placed[name] = images[twin].with_array(image.array)
    return placed


def onto_grid(moving: Volume, reference: Volume, name: str, facts: Facts) -> Volume:
    """Bring an image of the same scan onto a reference's grid.

    It is resampled by the headers if its grid differs; registered if one of the headers says nothing of its place.
    """
    if same_grid(moving, reference) or _nothing_but_voxels(moving, reference, name, facts):
        return reference.with_array(moving.array)
    if not (moving.oriented and reference.oriented):
        return registered_onto(moving, reference, name, facts)
    note(facts, f"{name} lay on another grid and was resampled by its header")
    return resample_onto(moving, reference)


def _nothing_but_voxels(moving: Volume, reference: Volume, name: str, facts: Facts) -> bool:
    """Tell whether two images of one shape can only be laid voxel by voxel, because a header says nothing."""
    alone = not same_grid(moving, reference) and alike_but_unplaced(moving, reference)
    if alone:
        note(facts, f"{name} was laid voxel by voxel on the reference: a header says nothing of its place")
    return alone


def registered_onto(moving: Volume, reference: Volume, name: str, facts: Facts) -> Volume:
    """Register an image of another pose and grid rigidly and resample it onto the reference's grid.

    How well it fits before and after goes to `facts`; a registration that failed its check leaves the headers'
    geometry and a note. Images of one shape of which one says nothing of its place are laid voxel by voxel.
    """
    if _nothing_but_voxels(moving, reference, name, facts):
        return reference.with_array(moving.array)
    result = register_rigid(reference, moving)
    facts |= {
        f"{name}_registration": "rigid" if result.accepted else "header",
        f"{name}_information_before": result.information[0],
        f"{name}_information_after": result.information[1],
        f"{name}_overlap_before": result.overlap[0],
        f"{name}_overlap_after": result.overlap[1],
        f"{name}_rotation_deg": result.rotation_deg,
        f"{name}_shift_mm": result.shift_mm,
    }
    if not result.accepted:
        note(facts, f"CHECK: registration of {name} rejected ({result.reason}); it lies where its header says")
    return resample_onto(moving, reference, result.matrix)


def note(facts: Facts, sentence: str) -> None:
    """Add a sentence to a case's notes."""
    facts.setdefault("notes", []).append(sentence)


def _count(facts: Facts, name: str, voxels: np.ndarray) -> None:
    facts[name] = facts.get(name, 0) + int(voxels.sum())
