"""Read the channels of a case and bring them onto one grid: by header where they were scanned together, else by
registration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ssl.imaging.geometry import Volume, read_volume, resample_onto, same_grid
from nnunet_ssl.imaging.registration import register_rigid

Facts = dict[str, Any]
"""What was done to a case, for the report: column -> value; "notes" is a list of sentences."""


def read_image(path: Path, facts: Facts, *, clip_negative: bool = False) -> Volume:
    """Read an image; NaN and infinite voxels, which nnU-Net refuses, become 0, and negative ones too if asked."""
    volume = read_volume(path)
    array = volume.array
    broken = ~np.isfinite(array)
    _count(facts, "nonfinite_voxels", broken)
    array = np.where(broken, np.float32(0), array)
    if clip_negative:
        _count(facts, "negative_voxels", array < 0)
        array = np.maximum(array, 0)
    return volume.with_array(array)


def onto_grid(moving: Volume, reference: Volume, name: str, facts: Facts) -> Volume:
    """Bring an image of the same scan onto a reference's grid; it is resampled by the headers if that differs."""
    unplaced = not moving.oriented and moving.array.shape == reference.array.shape
    if unplaced or same_grid(moving, reference):
        return reference.with_array(moving.array)
    note(facts, f"{name} lay on another grid and was resampled by its header")
    return resample_onto(moving, reference)


def registered_onto(moving: Volume, reference: Volume, name: str, facts: Facts) -> Volume:
    """Register an image of another pose and grid rigidly and resample it onto the reference's grid.

    How well it fits before and after goes to `facts`; a registration that failed its check leaves the headers'
    geometry and a note.
    """
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
