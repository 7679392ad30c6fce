"""Prepare one session: all its scans cropped by one box and resampled to one grid, stored as nnU-Net stores cases.

The session is the unit of work because its scans share a grid and a box. Nothing here knows of other sessions, so any
number of processes or machines may prepare different sessions of a corpus at the same time.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging.normalization import PercentileZScoreNormalization
from nnunet_ssl.imaging.skull_strip import brain_mask, looks_stripped
from nnunet_ssl.pretraining.corpus import CONFIGURATION
from nnunet_ssl.pretraining.store import finished_row, flush_folder, remove_case, to_half, write_case
from nnunet_ssl.pretraining.volumes import BadScan, Grid, Volume, on_grid, read_volume

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
    """

    session: str
    fingerprint: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    transient: bool = False

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

    A scan that cannot be used is a failure in the result and leaves no file; the others are stored.

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
    if looks:
        session.align(looks)
    boxes = _attempt(session.foreground_box, looks, result)
    box = _union(boxes.values())
    result.rows = list(_attempt(lambda scan: session.store(scan, box), boxes, result).values())
    result.remove_failed_cases(task.folder)
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


@dataclass(frozen=True, kw_only=True)
class _Look:
    grid: Grid
    stripped: bool


class _Session:
    """The steps of :func:`prepare_session` and what they share: the common grid, the brain mask, volumes in memory."""

    def __init__(self, task: SessionTask) -> None:
        plans = PlansManager(dict(task.plans))
        self.task = task
        self.configuration = plans.get_configuration(CONFIGURATION)
        self.options = plans.plans["preprocessing"]
        self.reader = plans.image_reader_writer_class()
        self.grid: Grid | None = None
        self.regridded: dict[ScanTask, str] = {}
        self.skull: dict[ScanTask, str] = {}
        self.brain: np.ndarray | None = None
        self.brain_from = ""
        self.kept: dict[ScanTask, Volume] = {}

    def look(self, scan: ScanTask) -> _Look:
        """Read a scan for the first time and judge it."""
        volume = self._load(scan)
        stripped = looks_stripped(volume.data, volume.grid.voxel_mm3) if scan.stripped is None else scan.stripped
        return _Look(grid=volume.grid, stripped=stripped)

    def align(self, looks: Mapping[ScanTask, _Look]) -> None:
        """Choose the session's grid, that of its sharpest scan, and find the brain if a scan needs stripping."""
        sharpest = min(looks, key=lambda scan: (looks[scan].grid.voxel_mm3, scan.scan_id))
        self.grid = looks[sharpest].grid
        self.regridded = {scan: sharpest.scan_id for scan in looks if not looks[scan].grid.same_as(self.grid)}
        self.skull = {scan: "absent" if look.stripped else "present" for scan, look in looks.items()}
        if self.options["skull_strip"] is None or "present" not in self.skull.values():
            return
        order = [*_STRIPPING_ORDER, *sorted({scan.modality for scan in looks} - set(_STRIPPING_ORDER))]
        best = min(looks, key=lambda scan: (order.index(scan.modality), looks[scan].grid.voxel_mm3, scan.scan_id))
        self.brain_from = best.scan_id
        self.brain = brain_mask(self._load(best).as_nifti(), self.task.device).transpose(2, 1, 0)
        self.skull = {scan: "removed" if skull == "present" else skull for scan, skull in self.skull.items()}

    def foreground_box(self, scan: ScanTask) -> Box:
        """The box of what is not zero, on the session's grid."""
        foreground = self._load(scan).data != 0
        if not foreground.any():
            raise BadScan("nothing is left inside the brain mask")
        return get_bbox_from_mask(foreground)

    def store(self, scan: ScanTask, box: Box) -> dict[str, Any]:
        """Crop, normalise, resample and write a scan; return its row of the manifest."""
        case, fingerprint = Path(self.task.folder, scan.scan_id), self.task.fingerprint
        row = finished_row(case, fingerprint)
        if row is not None:
            return row
        volume = self._load(scan)
        self.kept.pop(scan, None)
        image, foreground = self._preprocess(volume.data[bounding_box_to_slice(box)])
        row = {
            "scan_id": scan.scan_id,
            **_describe(foreground),
            "nan_voxels": volume.nan_voxels,
            "regridded_to": self.regridded.get(scan, ""),
            "skull": self.skull[scan],
            "brain_mask_from": self.brain_from,
        }
        properties = {
            "spacing": list(volume.grid.spacing),
            "nibabel_stuff": {"reoriented_affine": volume.grid.affine},
            "shape_before_cropping": volume.grid.shape,
            "bbox_used_for_cropping": box,
            "shape_after_cropping_and_before_resampling": tuple(stop - start for start, stop in box),
        }
        patch_size = self.configuration.patch_size
        write_case(case, image, foreground, properties, patch_size=patch_size, fingerprint=fingerprint, row=row)
        return row

    def _load(self, scan: ScanTask) -> Volume:
        """A scan's volume, on the session's grid and without skull as soon as these are known."""
        volume = self.kept.pop(scan, None) or read_volume(Path(scan.path), self.reader)
        if self.grid is not None:
            volume = on_grid(volume, self.grid)
        if self.brain is not None:
            volume.data[~self.brain] = 0
        if sum(other.data.nbytes for other in self.kept.values()) + volume.data.nbytes <= KEPT_BYTES:
            self.kept[scan] = volume
        return volume

    def _preprocess(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Normalise and resample a cropped image (X, Y, Z) in nnU-Net's order of steps.

        Returns:
            The image in the store's precision and the foreground (0; outside -1) as int8, both (1, X', Y', Z').
        """
        configuration = self.configuration
        foreground = np.where(create_nonzero_mask(image[None]), np.int8(0), np.int8(-1))
        try:
            image = PercentileZScoreNormalization(use_mask_for_norm=True, intensityproperties={}).run(image, foreground)
        except ValueError as error:
            raise BadScan(str(error)) from error
        spacings = (self.grid.spacing, configuration.spacing)
        shape = compute_new_shape(image.shape, *spacings)
        if shape.min() < 1:
            raise BadScan(f"its foreground is thinner than a voxel of {configuration.spacing} mm")
        image = configuration.resampling_fn_data(image[None], shape, *spacings)
        foreground = configuration.resampling_fn_seg(foreground[None], shape, *spacings).astype(np.int8, copy=False)
        return to_half(image) if self.options["dtype"] == "float16" else image.astype(np.float32), foreground


def _union(boxes: Iterable[Box]) -> Box:
    corners = np.array(list(boxes), int).reshape(-1, 3, 2)
    if not len(corners):
        return []
    return np.stack([corners[..., 0].min(axis=0), corners[..., 1].max(axis=0)], axis=1).tolist()


def _describe(foreground: np.ndarray) -> dict[str, Any]:
    """The manifest's words on a stored scan: its shape, the box of its foreground, the share of voxels inside."""
    inside = foreground[0] >= 0
    bounds = get_bbox_from_mask(inside) if inside.any() else [[0, size] for size in inside.shape]
    return {
        "shape": ",".join(map(str, inside.shape)),
        "bbox": ",".join(str(bound) for axis in bounds for bound in axis),
        "foreground": round(float(inside.mean()), 4),
    }
