"""From found cases to an nnU-Net data set: parallel, resumable, with exact labels and a report of what was done."""

from __future__ import annotations

import errno
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import nibabel as nib
import numpy as np

from nnunet_ssl.conversion import reporting
from nnunet_ssl.conversion.discovery import Skipped
from nnunet_ssl.corpus.workers import WorkerDied, run_locally
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside
from nnunet_ssl.imaging.geometry import (
    Alignment,
    Volume,
    align_mask,
    lesions_lost,
    read_mask,
    same_grid,
    voxels_outside,
    write_volume,
)
from nnunet_ssl.imaging.skull_strip import STRIPPED_MAXIMUM_ML, brain_mask, looks_stripped, require_hd_bet
from nnunet_ssl.limits import LESION_LOSS_TO_CHECK, LESION_LOSS_TO_SKIP
from nnunet_ssl.live import live_line
from nnunet_ssl.nnunet_folders import RECORDS

logger = logging.getLogger(__name__)

FORMAT = 3
"""Raised when converted files change for the same input, so that a resumed run redoes them."""

BRAIN_ML = (400.0, STRIPPED_MAXIMUM_ML)
"""A brain mask smaller or larger than this deserves a look."""

NO_PLACE_TO_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of the disk that is written to: they end a run, whereas any error of one case skips that case only."""

Part = Literal["Tr", "Ts"]
"""Training and test, as nnU-Net's folder names end."""

PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case to convert.

    Attributes:
        id: its name in the data set.
        subject: sessions of one subject never part in different folds.
        images: channel name -> file, and what else `prepare` needs (the grid's reference). Channels of the data set may
            be missing.
        masks: lesion masks, united; none and `labelled` means a subject known to have no lesion.
        labelled: False for a test case of unknown truth.
        part: training or test.
        group: cohort or diagnostic group, for the folds.
        notes: what is odd about it; goes into the report.
    """

    id: str
    subject: str
    images: dict[str, Path]
    masks: tuple[Path, ...] = ()
    labelled: bool = True
    part: Part = "Tr"
    group: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class Prepared:
    """What a data set's own code makes of a case: the channels that there are on one grid, and facts for the report."""

    channels: dict[str, Volume]
    facts: dict[str, Any]


SomeCase = TypeVar("SomeCase", bound=Case)
"""A data set's own kind of case."""

Prepare = Callable[[SomeCase], Prepared]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where and how to write.

    Attributes:
        folder: the data set's folder, or the output folder of ``--images_only``.
        channels: in nnU-Net's order.
        images_only: write ``<id>_0000.nii.gz`` straight into `folder`, no labels.
        strip: skull-strip with HD-BET.
        device: where HD-BET runs.
    """

    folder: Path
    channels: tuple[str, ...]
    images_only: bool = False
    strip: bool = False
    device: str = "cpu"

    def image_paths(self, case: Case) -> list[Path]:
        folder = self.folder if self.images_only else self.folder / f"images{case.part}"
        return [folder / f"{case.id}_{number:04d}.nii.gz" for number in range(len(self.channels))]

    def label_path(self, case: Case) -> Path | None:
        if self.images_only or not case.labelled:
            return None
        return self.folder / f"labels{case.part}" / f"{case.id}.nii.gz"

    def outputs(self, case: Case) -> list[Path]:
        label = self.label_path(case)
        return [*self.image_paths(case), *([label] if label else [])]

    @property
    def output_folders(self) -> list[Path]:
        if self.images_only:
            return [self.folder]
        return [self.folder / f"{kind}{part}" for kind in ("images", "labels") for part in PARTS]

    def record_path(self, case_id: str) -> Path:
        return self.folder.joinpath(*RECORDS, f"{case_id}.json")

    def tile_path(self, case_id: str) -> Path:
        return self.folder / "conversion" / "tiles" / f"{case_id}.png"


def convert(
    cases: Sequence[SomeCase], skipped: Sequence[Skipped], target: Target, prepare: Prepare[SomeCase], n_processes: int
) -> tuple[list[SomeCase], list[dict[str, Any]]]:
    """Convert what is not converted yet, remove what no longer belongs to the data set, and write the report.

    Args:
        cases: all cases of the data set.
        skipped: what was left out so far.
        target: where to write.
        prepare: brings one case's channels onto one grid; must be importable by other processes.
        n_processes: how many cases at a time.

    Returns:
        the converted cases and their rows of the report.

    Raises:
        UserError: HD-BET is wanted and missing, the folder holds other files or other patients of the same names, or no
            case can be converted.
    """
    if target.strip:
        _strip_on(target.channels)
        require_hd_bet()
    _refuse_foreign_files(target)
    _refuse_namesakes(cases, target)
    _remove_partial_files(target.folder)
    earlier = _recorded(target)
    gone = _remove_stale_files(cases, target)
    waiting = [case for case in cases if not _is_done(case, target)]
    logger.info("%d cases; %d are already converted.", len(cases), len(cases) - len(waiting))
    failed = _run(waiting, partial(_convert_one, target=target, prepare=prepare), n_processes)
    _remove_failed_files([case for case in waiting if case.id in {item.what for item in failed}], target)
    reasons = {item.what: item for item in failed}
    converted = [case for case in cases if case.id not in reasons]
    if not converted:
        raise UserError(f"No case could be converted. The first one, {failed[0].what}: {failed[0].reason}")
    skipped = [*skipped, *failed]
    rows = [json.loads(target.record_path(case.id).read_text())["row"] for case in converted]
    changed = bool(gone or reasons.keys() & earlier or {case.id for case in waiting} - reasons.keys())
    reporting.write_report(rows, skipped, target.folder / "conversion", target.channels, changed)
    reporting.log_notes(rows)
    reporting.log_skipped(skipped, target.folder / "conversion")
    return converted, rows


def write_dataset_json(
    folder: Path,
    n_training: int,
    channel_names: Sequence[str],
    missing: Mapping[str, Sequence[str]],
    **description: str,
) -> None:
    """Write nnU-Net's dataset.json; reading reorients to RAS, so that stored orientation doesn't matter.

    Args:
        folder: of the data set.
        n_training: how many training cases it has.
        channel_names: in order.
        missing: case -> the names of channels that are placeholders; nnU-Net does not read this.
        description: further entries.
    """
    content = {
        "channel_names": {str(number): name for number, name in enumerate(channel_names)},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": n_training,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
        "name": folder.name,
        **({"missing_channels": missing} if missing else {}),
        **description,
        "converted_by": "nnunet_ssl",
    }
    reporting.write_text(folder / "dataset.json", json.dumps(content, indent=2))


def _run(cases: Sequence[SomeCase], work: Callable[[SomeCase], None], n_processes: int) -> list[Skipped]:
    """Run `work` on every case and return the failures."""
    failed = []
    outcomes = run_locally(work, cases, max(1, min(n_processes, len(cases))))
    with live_line("Converting", len(cases), unit="case") as line:
        for case, outcome in outcomes:
            if isinstance(outcome, BaseException):
                failed.append(Skipped(case.id, _reason(outcome, case)))
            line.set_postfix({"left out": len(failed)}, refresh=False)
            line.update()
    return sorted(failed, key=lambda item: item.what)


def _reason(error: BaseException, case: Case) -> str:
    """Say in one line why a case failed. What would meet every case, a disk that takes no more files, is raised."""
    if isinstance(error, OSError) and error.errno in NO_PLACE_TO_WRITE:
        raise error
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, WorkerDied):
        return f"{error}; try fewer at a time, with -np 1"
    if isinstance(error, MemoryError):
        return " ".join(f"not enough memory ({error}); try fewer at a time, with -np 1".split())
    logger.error("%s could not be converted.", case.id, exc_info=error)
    return " ".join(f"{type(error).__name__}: {error}".split())


def _remove_failed_files(cases: Sequence[Case], target: Target) -> None:
    for case in cases:
        for path in target.outputs(case):
            path.unlink(missing_ok=True)
        _forget(case.id, target)


def _convert_one(case: SomeCase, target: Target, prepare: Prepare[SomeCase]) -> None:
    """Convert a case.

    An empty record is written first: it claims the files. The true one is written last, so it means that all are there.

    Raises:
        UserError: the case can't be used.
    """
    _write_record(case.id, target, made_from=None, row={})
    prepared = prepare(case)
    present = {name: prepared.channels[name] for name in target.channels if name in prepared.channels}
    label, facts = _label(case, next(iter(present.values())), target)
    facts = prepared.facts | facts
    present = _finish_channels(present, label, facts, target)
    channels = _with_placeholders(present, facts, target)
    outputs = [*channels, *([] if label is None else [channels[0].with_array(label)])]
    for path, output in zip(target.outputs(case), outputs, strict=True):
        write_volume(path, output)
    row = _row(case, channels[0], facts)
    reporting.write_tile(target.tile_path(case.id), channels, label)
    _write_record(case.id, target, made_from=_made_from(case, target), row=row)


def _write_record(case_id: str, target: Target, **content: Any) -> None:
    with written_beside(target.record_path(case_id)) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1))


def _label(case: Case, reference: Volume, target: Target) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Read a case's lesion masks onto the channels' grid, and measure them before and after.

    Raises:
        UserError: most of the lesion is lost on the way.
    """
    if target.label_path(case) is None:
        return None, {}
    label = np.zeros(reference.array.shape, dtype=bool)
    counts: defaultdict[str, float] = defaultdict(int, mask_ml=0.0, lost_ml=0.0)
    alignments: dict[Alignment, None] = {}
    notes: list[str] = []
    for path in case.masks:
        mask = read_mask(path)
        notes += [f"{path.name}: {oddity}" for oddity in mask.notes]
        aligned, how = align_mask(mask, reference)
        alignments[how] = None
        if how == "no orientation in header":
            notes.append(f"{path.name} was laid voxel by voxel on the image: a header says nothing of its place")
            mask = reference.with_array(mask.array)
        for name, number in _measure(mask, reference, aligned, how).items():
            counts[name] += number
        label |= aligned
    lost = counts.pop("lost_ml") / max(counts["mask_ml"], 1e-9)
    if lost > LESION_LOSS_TO_SKIP:
        raise UserError(
            f"{lost:.0%} of its lesion of {counts['mask_ml']:.3g} ml are lost on the image's grid "
            f"({counts['mask_voxels_outside']} of {counts['mask_voxels']} voxels lie outside the image): do the "
            f"headers of {', '.join(path.name for path in case.masks)} and of its image speak of one place?"
        )
    return label, {
        **{name: counts[name] for name in ("mask_voxels", "mask_ml", "mask_voxels_outside")},
        "mask_alignment": ", ".join(alignments) or "healthy control",
        "mask_lost": lost,
        "lesions_lost": counts["lesions_lost"],
        "label_voxels": int(label.sum()),
        "label_ml": float(label.sum() * reference.voxel_ml),
        "mask_notes": notes,
    }


def _measure(mask: Volume, reference: Volume, aligned: np.ndarray, how: Alignment) -> dict[str, float]:
    """Measure a mask before and after it came onto the reference's grid; numbers add up over the masks of a case."""
    voxels, kept = int(mask.array.sum()), int(aligned.sum())
    resampled = how == "resampled"  # else voxels were copied one by one
    kept_ml = kept * (reference.voxel_ml if resampled else mask.voxel_ml)
    return {
        "mask_voxels": voxels,
        "mask_ml": voxels * mask.voxel_ml,
        "mask_voxels_outside": voxels_outside(mask, reference),
        "lost_ml": max(voxels * mask.voxel_ml - kept_ml, 0.0),
        "lesions_lost": lesions_lost(mask, reference, aligned) if resampled else 0,
    }


def _finish_channels(
    channels: Mapping[str, Volume], label: np.ndarray | None, facts: dict[str, Any], target: Target
) -> dict[str, Volume]:
    """Check that the channels share one grid, skull-strip them if asked, and give all the same header.

    Raises:
        UserError: HD-BET finds no brain, or there is no channel that it knows.
    """
    first = next(iter(channels.values()))
    assert all(same_grid(one, first) for one in channels.values()), "prepare() must bring the channels onto one grid"
    if target.strip:
        seen = _strip_on(tuple(channels))
        brain = brain_mask(nib.Nifti1Image(channels[seen].array, first.affine), target.device)
        if not brain.any():
            raise UserError(f"HD-BET found no brain in {seen}; look at that image.")
        facts["brain_ml"] = float(brain.sum() * first.voxel_ml)
        if label is not None:
            facts["label_voxels_outside_brain"] = int((label & ~brain).sum())
        channels = {name: one.with_array(one.array * brain) for name, one in channels.items()}
    facts["stripped"] = target.strip or bool(looks_stripped(first.array, first.voxel_ml * 1000))
    return {name: Volume(one.array, first.affine) for name, one in channels.items()}


def _with_placeholders(present: Mapping[str, Volume], facts: dict[str, Any], target: Target) -> list[Volume]:
    """Return all of the data set's channels: images of zeros, which nnU-Net needs, for those that a case lacks."""
    first = next(iter(present.values()))
    if missing := [name for name in target.channels if name not in present]:
        facts["missing_channels"] = ", ".join(missing)
    return [present.get(name, first.with_array(np.zeros_like(first.array))) for name in target.channels]


def _strip_on(channels: Sequence[str]) -> str:
    """Return which channel HD-BET looks at: the contrasts it was trained on, T1 first."""
    known = [name for name in ("t1", "flair") if name in channels]
    if not known:
        raise UserError(f"HD-BET knows T1, T2 and FLAIR, not {' or '.join(channels)}: add the channel flair.")
    return known[0]


def _row(case: Case, first: Volume, facts: dict[str, Any]) -> dict[str, Any]:
    """Return a case's line of the report."""
    notes = [*case.notes, *facts.pop("notes", []), *facts.pop("mask_notes", []), *_label_notes(facts)]
    if "brain_ml" in facts and not BRAIN_ML[0] <= facts["brain_ml"] <= BRAIN_ML[1]:
        notes.append(f"CHECK: HD-BET's brain mask of {facts['brain_ml']:.0f} ml is none of a whole brain")
    if "missing_channels" in facts:
        notes.append(f"without {facts['missing_channels']}: zeros in its place")
    if facts.get("nonfinite_voxels"):
        notes.append(f"{facts['nonfinite_voxels']} NaN or infinite voxels set to 0")
    return {
        "case": case.id,
        "part": {"Tr": "train", "Ts": "test"}[case.part],
        "group": case.group,
        "shape": "x".join(map(str, first.array.shape)),
        "spacing_mm": "x".join(f"{size:.3g}" for size in first.spacing),
        "orientation": first.orientation,
        **facts,
        "notes": "; ".join(notes),
        "sources": "; ".join(str(path) for path in [*case.images.values(), *case.masks]),
    }


def _label_notes(facts: dict[str, Any]) -> list[str]:
    """Say what is remarkable about a label."""
    if "label_voxels" not in facts:
        return []
    notes = []
    if facts["mask_lost"] > LESION_LOSS_TO_CHECK:
        notes.append(f"CHECK: {facts['mask_lost']:.0%} of the lesion of {facts['mask_ml']:.3g} ml are lost")
    if facts["lesions_lost"]:
        notes.append(f"CHECK: {facts['lesions_lost']} lesions have no voxel left on the image's grid")
    if "resampled" in facts["mask_alignment"]:
        change = facts["label_ml"] - facts["mask_ml"]
        notes.append(f"label resampled, volume changed by {change:+.3f} ml of {facts['mask_ml']:.3f} ml")
    if "nearest voxels" in facts["mask_alignment"]:
        notes.append("the mask lies up to half a voxel off the image: its voxels were copied to the nearest")
    if facts["mask_voxels_outside"]:
        notes.append(f"CHECK: {facts['mask_voxels_outside']} mask voxels lie outside the image")
    if facts["label_voxels"] == 0 and facts["mask_alignment"] != "healthy control":
        notes.append("empty mask")
    if facts.get("label_voxels_outside_brain"):
        notes.append(f"{facts['label_voxels_outside_brain']} label voxels lie outside HD-BET's brain mask")
    return notes


def _made_from(case: Case, target: Target) -> dict[str, Any]:
    """Return all that decides how a case's files come out, JSON-able, to tell whether they must be made again."""
    sources = [*case.images.values(), *case.masks]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    described = asdict(case) | {"images": list(case.images), "masks": len(case.masks)}
    options = [FORMAT, target.channels, target.strip]
    return json.loads(json.dumps({"case": described, "sources": stats, "options": options}))


def _is_done(case: Case, target: Target) -> bool:
    try:
        if _made_earlier_from(case.id, target) != _made_from(case, target):
            return False
    except FileNotFoundError:  # a source went away since it was found: the case fails, and not the run
        return False
    return all(made.is_file() for made in [*target.outputs(case), target.tile_path(case.id)])


def _remove_stale_files(cases: Sequence[Case], target: Target) -> list[str]:
    """Remove what an earlier run made and this one would not: dropped cases, channels, another part.

    In the folder of ``--images_only`` patients may gather: cases of earlier runs stay.

    Raises:
        UserError: the earlier run was on other data altogether.
    """
    expected = {path for case in cases for path in target.outputs(case)}
    current = {case.id for case in cases}
    earlier = _recorded(target)
    gone = [] if target.images_only else sorted(earlier - current)
    if gone and not earlier & current:
        raise UserError(
            f"{target.folder} was made from other data: none of its {len(gone)} cases (such as {gone[0]}) is among the "
            f"{len(current)} found now (such as {min(current)}). Remove that folder, or choose another number with -d."
        )
    for name in sorted(earlier & current) + gone:
        for folder in target.output_folders:
            for path in (folder / f"{name}.nii.gz", *folder.glob(f"{name}_[0-9][0-9][0-9][0-9].nii.gz")):
                if path not in expected:
                    path.unlink(missing_ok=True)
    for name in gone:
        _forget(name, target)
    if gone:
        logger.info("Removed %d cases that are not part of the data set any more: %s", len(gone), ", ".join(gone))
    return gone


def _refuse_foreign_files(target: Target) -> None:
    """Make sure that a data set's folder holds nothing but what these scripts wrote.

    Raises:
        UserError: it does; nnU-Net would take the files for cases.
    """
    if target.images_only:
        return
    recorded = _recorded(target)
    images = [path for folder in target.output_folders for path in folder.glob("[!.]*.nii.gz")]
    ends = {"images": r"_\d{4}\.nii\.gz$", "labels": r"\.nii\.gz$"}
    foreign = [path for path in images if re.sub(ends[path.parent.name[:6]], "", path.name) not in recorded]
    if foreign:
        raise UserError(
            f"{target.folder} holds {len(foreign)} images that this script didn't make, such as {foreign[0].name}. "
            "Move that folder away, or choose another number with -d."
        )


def _refuse_namesakes(cases: Sequence[Case], target: Target) -> None:
    """Make sure that no patient among new images takes the place of another, prepared earlier under the same name.

    Raises:
        UserError: one would.
    """
    for case in cases if target.images_only else ():
        earlier = _made_earlier_from(case.id, target)
        sources = [path for path, *_ in earlier["sources"]] if earlier else []
        if sources and not set(sources) & set(map(str, case.images.values())):
            new = next(iter(case.images.values()))
            raise UserError(
                f"{target.folder} has a case {case.id} from {sources[0]} already; {new} would take its place. "
                "Give another patient another -o; for the same patient, remove that folder first."
            )


def _made_earlier_from(case_id: str, target: Target) -> dict[str, Any] | None:
    """Return what a finished case was made from, None for another."""
    path = target.record_path(case_id)
    return json.loads(path.read_text())["made_from"] if path.is_file() else None


def _recorded(target: Target) -> set[str]:
    """Return the cases that earlier runs converted or began to."""
    return {path.stem for path in target.folder.joinpath(*RECORDS).glob("[!.]*.json")}


def _forget(case_id: str, target: Target) -> None:
    target.record_path(case_id).unlink(missing_ok=True)
    target.tile_path(case_id).unlink(missing_ok=True)


def _remove_partial_files(folder: Path) -> None:
    """Remove what an interrupted run left half-written."""
    for path in folder.rglob(".*.partial.*"):
        path.unlink()
