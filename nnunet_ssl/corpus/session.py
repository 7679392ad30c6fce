"""Prepare one session: its scans brought onto common grids, cropped, normalised, stored as nnU-Net stores cases.

The session is the unit of work because scans that agree share a grid and a box. Nothing here knows of other sessions,
so any number of processes or machines may prepare different sessions of a corpus at the same time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.corpus.placement import Group, Look, best_reference, look_at, make_groups, pair_agreements
from nnunet_ssl.corpus.store import file_sizes, finished_row, flush_folder, remove_case, to_half, write_case
from nnunet_ssl.corpus.volumes import foreground_box, read_volume
from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging.geometry import Volume, canonical, onto_grid, same_grid
from nnunet_ssl.imaging.headers import BadScan
from nnunet_ssl.imaging.normalization import PercentileZScoreNormalization
from nnunet_ssl.imaging.registration import agreement, register_rigid
from nnunet_ssl.imaging.skull_strip import brain_mask
from nnunet_ssl.limits import MINIMUM_AGREEMENT
from nnunet_ssl.nnunet_folders import CONFIGURATION

KEPT_BYTES = 2**30
"""A session's volumes stay in memory up to this size between the first look and the storing; others are read twice."""

_STRIPPING_ORDER = ("t1", "t1c", "flair", "t2")  # what HD-BET was trained on, best first

T = TypeVar("T")
Box = list[list[int]]  # [[x0, x1], [y0, y1], [z0, z1]], half open


@dataclass(frozen=True, kw_only=True)
class ScanTask:
    """One scan to prepare. `stripped` says whether its skull is gone already; None: tell by the image."""

    scan_id: str
    path: str
    modality: str
    stripped: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SessionTask:
    """One session to prepare into `folder`. `fingerprint` stands for its inputs and for every option."""

    session: str
    fingerprint: str
    scans: tuple[ScanTask, ...]
    folder: str
    plans: Mapping[str, Any]
    device: str = "cpu"


@dataclass(kw_only=True)
class SessionResult:
    """What became of a session: a manifest row for each stored scan, a reason for each other one.

    `transient` says that a failure need not come again (no memory, a dead worker): the next run tries once more.
    `sizes` holds the bytes of each stored scan's files (see :func:`file_sizes`), by which a later run knows damage.
    """

    session: str
    fingerprint: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    transient: bool = False
    sizes: dict[str, list[int]] = field(default_factory=dict)

    def fail(self, scan: ScanTask, reason: str, *, transient: bool) -> None:
        """Note why a scan was not stored."""
        self.failures.append({"scan_id": scan.scan_id, "path": scan.path, "reason": reason})
        self.transient |= transient

    def remove_failed_cases(self, folder: str) -> None:
        """Remove what an earlier run stored of the scans that fail now."""
        for failure in self.failures:
            remove_case(Path(folder, failure["scan_id"]))


def prepare_session(task: SessionTask) -> SessionResult:
    """Read, check, align, crop, normalise, resample and store the scans of a session.

    A scan that cannot be used is a failure in the result and leaves no file; the others are stored. Scans that do not
    lie where the others lie are stored on a grid of their own.

    Raises:
        OSError: a result cannot be written (full disk, no permission).
        UserError: the store's folder is not there, or skull-stripping is asked for and HD-BET is not ready.
    """
    if not Path(task.folder).is_dir():
        raise UserError(
            f"{task.folder} is not seen from {platform.node()}. Every machine that prepares scans must see the images "
            "and nnUNet_preprocessed under the same paths."
        )
    result = SessionResult(session=task.session, fingerprint=task.fingerprint)
    session = _Session(task)
    looks = _attempt(session.look, task.scans, result)
    looks = _attempt(partial(session.place, looks=looks), looks, result)
    agreements = pair_agreements(looks)
    for group in make_groups(looks, agreements):
        session.enter(group, looks)
        boxes = _attempt(session.foreground_box, group.kept, result)
        box = _union(boxes.values())
        rows = _attempt(partial(session.store, box=box, agreements=agreements), boxes, result)
        result.rows += rows.values()
    result.remove_failed_cases(task.folder)
    result.sizes = {row["scan_id"]: file_sizes(Path(task.folder, row["scan_id"])) for row in result.rows}
    flush_folder(Path(task.folder))
    return result


def _attempt(step: Callable[[ScanTask], T], scans: Iterable[ScanTask], result: SessionResult) -> dict[ScanTask, T]:
    """Take `step` for each scan; note the failures, return what the others gave."""
    given = {}
    for scan in scans:
        try:
            given[scan] = step(scan)
        except BadScan as reason:
            result.fail(scan, str(reason), transient=reason.transient)
        except MemoryError:
            result.fail(scan, "not enough memory", transient=True)
    return given


class _Session:
    """The steps of :func:`prepare_session` and what they share: the grid at work, its brain mask, volumes in memory."""

    def __init__(self, task: SessionTask) -> None:
        plans = PlansManager(dict(task.plans))
        self.task = task
        self.configuration = plans.get_configuration(CONFIGURATION)
        self.options = plans.plans["preprocessing"]
        self.nan_voxels: dict[ScanTask, int] = {}
        self.notes: dict[ScanTask, list[str]] = {}
        self.affines: dict[ScanTask, np.ndarray] = {}
        self.group: Group[ScanTask]  # the one that was entered
        self.regridded: dict[ScanTask, str] = {}
        self.skull: dict[ScanTask, str] = {}
        self.brain: np.ndarray | None = None
        self.brain_from = ""
        self.kept: dict[ScanTask, Volume] = {}

    def look(self, scan: ScanTask) -> Look:
        """Look at a scan, where its header or :meth:`place` puts it."""
        volume = self._read(scan)
        self._keep(scan, canonical(volume))
        return look_at(volume, scan.stripped)

    def place(self, scan: ScanTask, looks: Mapping[ScanTask, Look]) -> Look:
        """Find the place of a scan whose header does not say it; with the option, also of one that does not agree."""
        reference = best_reference({scan: look for scan, look in looks.items() if look.oriented} or looks)
        look = looks[scan]
        if scan == reference:
            if not look.oriented:
                self.notes[scan].append("no orientation in its header: taken to be stored as RAS")
            return look
        if not look.oriented:
            order = [reference, *(other for other in looks if looks[other].oriented)]
            shape = look.stored.array.shape
            twin = next((other for other in order if looks[other].stored.array.shape == shape), None)
            if twin is None:
                return self._register(scan, reference, "no orientation in its header: ")
            self.notes[scan].append(f"no orientation in its header: laid voxel by voxel on {twin.scan_id}")
            return self._move(scan, looks[twin].stored.affine)
        if self.options.get("register") and not (
            same_grid(look.grid, looks[reference].grid)
            and agreement(looks[reference].small, look.small) >= MINIMUM_AGREEMENT
        ):
            return self._register(scan, reference)
        return look

    def _register(self, scan: ScanTask, reference: ScanTask, why: str = "") -> Look:
        moving = self._read(scan)
        found = register_rigid(canonical(self._read(reference)), canonical(moving))
        self.notes[scan].append(
            f"{why}registered to {reference.scan_id} ({found.shift_mm:.1f} mm, {found.rotation_deg:.1f} degrees)"
            if found.accepted
            else f"{why}registration to {reference.scan_id} rejected ({found.reason})"
        )
        return self._move(scan, np.linalg.inv(found.matrix) @ moving.affine)

    def _move(self, scan: ScanTask, affine: np.ndarray) -> Look:
        """Put a scan elsewhere: a rigid motion of an image is another affine of it."""
        self.affines[scan] = affine
        self.kept.pop(scan, None)
        return self.look(scan)

    def enter(self, group: Group[ScanTask], looks: Mapping[ScanTask, Look]) -> None:
        """Work on a group from now on; find its brain if a scan needs stripping."""
        looks = {scan: looks[scan] for scan in group.kept}
        self.group, self.brain, self.brain_from = group, None, ""
        grid = looks[group.reference].grid
        self.regridded = {scan: group.reference.scan_id for scan in looks if not same_grid(looks[scan].grid, grid)}
        self.skull = {scan: "absent" if look.stripped else "present" for scan, look in looks.items()}
        if self.options["skull_strip"] is None or "present" not in self.skull.values():
            return
        order = [*_STRIPPING_ORDER, *sorted({scan.modality for scan in looks} - set(_STRIPPING_ORDER))]
        best = min(looks, key=lambda scan: (order.index(scan.modality), looks[scan].grid.voxel_ml, scan.scan_id))
        volume = self._load(best)
        self.brain = brain_mask(nibabel.Nifti1Image(volume.array, volume.affine), self.task.device)
        self.brain_from = best.scan_id
        self.skull = {scan: "removed" if skull == "present" else skull for scan, skull in self.skull.items()}

    def foreground_box(self, scan: ScanTask) -> Box:
        """The box of what is not zero, on the group's grid (RAS)."""
        volume = self._load(scan)
        if not volume.array.any():
            raise BadScan("nothing is left inside the brain mask")
        return foreground_box(volume, where=" inside the brain mask" if self.brain is not None else "")

    def store(self, scan: ScanTask, box: Box, agreements: Mapping[tuple[ScanTask, ScanTask], float]) -> dict[str, Any]:
        """Crop, normalise, resample and write a scan; return its row of the manifest."""
        facts = {
            "nan_voxels": self.nan_voxels[scan],
            "regridded_to": self.regridded.get(scan, ""),
            "foreground_kept": round(self.group.kept[scan], 4),
            "aligned_to": self.group.reference.scan_id,
            "agreement": _agreement_with_others(scan, agreements),
            "notes": "; ".join(self.notes[scan]),
            "skull": self.skull[scan],
            "brain_mask_from": self.brain_from,
        }
        grid = self.group.grid
        case = Path(self.task.folder, scan.scan_id)
        inputs = (self.task.fingerprint, grid.array.shape, grid.affine.tolist(), box, facts)
        fingerprint = hashlib.blake2b(repr(inputs).encode(), digest_size=16).hexdigest()
        row = finished_row(case, fingerprint)
        if row is not None:
            return row
        volume = self._load(scan)
        self.kept.pop(scan, None)
        # From here on in nnU-Net's order of axes for RAS images: superior, anterior, right.
        image, foreground = self._preprocess(volume.array[bounding_box_to_slice(box)].transpose(2, 1, 0))
        row = {"scan_id": scan.scan_id, **_describe(foreground), **facts}
        properties = {
            "spacing": list(grid.spacing[::-1]),
            "nibabel_stuff": {"reoriented_affine": grid.affine},
            "shape_before_cropping": grid.array.shape[::-1],
            "bbox_used_for_cropping": box[::-1],
            "shape_after_cropping_and_before_resampling": tuple(stop - start for start, stop in box[::-1]),
        }
        patch_size = self.configuration.patch_size
        write_case(case, image, foreground, properties, patch_size=patch_size, fingerprint=fingerprint, row=row)
        return row

    def _read(self, scan: ScanTask) -> Volume:
        """A scan as its file holds it, in the place that was found for it."""
        volume, self.nan_voxels[scan] = read_volume(Path(scan.path))
        self.notes.setdefault(scan, list(volume.notes))
        return dataclasses.replace(volume, affine=self.affines[scan]) if scan in self.affines else volume

    def _load(self, scan: ScanTask) -> Volume:
        """A scan's volume (RAS) on the group's grid, and without skull as soon as the brain is known."""
        volume = self.kept.pop(scan, None) or canonical(self._read(scan))
        volume = onto_grid(volume, self.group.grid)
        if self.brain is not None:
            volume.array[~self.brain] = 0
        self._keep(scan, volume)
        return volume

    def _keep(self, scan: ScanTask, volume: Volume) -> None:
        if sum(other.array.nbytes for other in self.kept.values()) + volume.array.nbytes <= KEPT_BYTES:
            self.kept[scan] = volume

    def _preprocess(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Normalise and resample a cropped image (superior, anterior, right) in nnU-Net's order of steps.

        Returns:
            The image in the store's precision and the foreground (0; outside -1) as int8, both (1, X', Y', Z').
        """
        configuration = self.configuration
        foreground = np.where(create_nonzero_mask(image[None]), np.int8(0), np.int8(-1))
        try:
            image = PercentileZScoreNormalization(use_mask_for_norm=True, intensityproperties={}).run(image, foreground)
        except ValueError as error:
            raise BadScan(str(error)) from error
        spacings = (self.group.grid.spacing[::-1], configuration.spacing)
        shape = compute_new_shape(image.shape, *spacings)
        if shape.min() < 1:
            raise BadScan(f"its foreground is thinner than a voxel of {configuration.spacing} mm")
        image = configuration.resampling_fn_data(image[None], shape, *spacings)
        foreground = configuration.resampling_fn_seg(foreground[None], shape, *spacings).astype(np.int8, copy=False)
        image[foreground < 0] = 0  # the spline rings some voxels beyond the edge
        return to_half(image) if self.options["dtype"] == "float16" else image.astype(np.float32), foreground


def _union(boxes: Iterable[Box]) -> Box:
    corners = np.array(list(boxes), int).reshape(-1, 3, 2)
    if not len(corners):
        return []
    return np.stack([corners[..., 0].min(axis=0), corners[..., 1].max(axis=0)], axis=1).tolist()


def _agreement_with_others(scan: ScanTask, agreements: Mapping[tuple[ScanTask, ScanTask], float]) -> str:
    """The manifest's words on how well a scan agrees with each other one of its session: "ID=2.31 ID=0.87"."""
    of_scan = {pair[pair[0] == scan]: value for pair, value in agreements.items() if scan in pair}
    return " ".join(f"{other.scan_id}={value:.2f}" for other, value in of_scan.items())


def _describe(foreground: np.ndarray) -> dict[str, Any]:
    """The manifest's words on a stored scan: its shape, the box of its foreground, the share of voxels inside."""
    inside = foreground[0] >= 0
    bounds = get_bbox_from_mask(inside) if inside.any() else [[0, size] for size in inside.shape]
    return {
        "shape": ",".join(map(str, inside.shape)),
        "bbox": ",".join(str(bound) for axis in bounds for bound in axis),
        "foreground": round(float(inside.mean()), 4),
    }
