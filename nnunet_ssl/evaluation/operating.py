"""Choose how probabilities become masks, and measure what the choice gains on cases that had no part in it.

Every candidate (a threshold, a minimum size, a peak that saves a small lesion, with or without mirroring) is scored on
every held-out case; the best on average is chosen. What it gains is measured by cross-validation over units, subjects
or centres: for each part of them, the candidate that is best on all others is applied. As the probabilities themselves
are of networks that did not see the case, the cross-validation is nested. nnU-Net's own masks are the first candidate,
with which the choice is compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import rankdata

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.lesions import PRESETS, compare_lesions, compare_surfaces
from nnunet_ssl.evaluation.matching import find_overlaps
from nnunet_ssl.evaluation.operating_point import ARGMAX, OperatingPoint
from nnunet_ssl.evaluation.out_of_fold import HeldOutCase, read_case
from nnunet_ssl.evaluation.probabilities import pr_auc
from nnunet_ssl.evaluation.ranking import BETTER_WHEN_SMALL
from nnunet_ssl.evaluation.segmentations import METRICS, NAMES, map_cases
from nnunet_ssl.evaluation.statistics import clustered_interval

THRESHOLDS = tuple(round(0.2 + 0.05 * step, 2) for step in range(13))
MINIMUM_MM3 = (0.0, 10.0, 20.0, 30.0, 50.0, 100.0, 200.0, 300.0)
SAVING_PEAKS = (None, 0.7, 0.8, 0.9, 0.95, 0.99)
"""The span of what ISLES'26's teams chose: thresholds of 0.35 to 0.5, sizes of 10 to 300 mm3, peaks of 0.65 to 0.99."""

PARTS = 5
SURFACES = ("hd95_mm", "surface_dice")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is to be optimised.

    Attributes:
        preset: of :data:`PRESETS`; of it come the connectivity, and whether an empty mask wants a constant map.
        metrics: one, whose mean counts, or several: then the mean rank over cases and metrics, as challenges take it.
    """

    preset: str
    metrics: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise UserError(f"There is no metric {unknown[0]}. Metrics: {', '.join(METRICS)}.")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A chosen operating point, and what such a choice gains on cases that had no part in it.

    Attributes:
        point: the best on all cases.
        report: what was measured, for people and programs.
    """

    point: OperatingPoint
    report: dict[str, Any]


def candidates(preset: str, mirroring: Sequence[bool] = (True,)) -> list[OperatingPoint]:
    """List the operating points to choose from; first nnU-Net's own, then the others, from near to far."""
    fixed = PRESETS[preset]
    plain = OperatingPoint(
        mirroring=mirroring[0],
        connectivity=fixed.connectivity,
        constant_map_when_empty=fixed.constant_map_when_empty,
    )
    return [
        replace(plain, threshold=threshold, minimum_mm3=minimum, saving_peak=peak, mirroring=mirrored)
        for mirrored in mirroring
        for threshold in sorted(THRESHOLDS, key=lambda threshold: abs(threshold - ARGMAX))
        for minimum in MINIMUM_MM3
        for peak in SAVING_PEAKS
        if peak is None or (minimum > 0 and peak > threshold)
    ]


def score(
    reference: np.ndarray,
    maps: Mapping[bool, np.ndarray],
    points: Sequence[OperatingPoint],
    metrics: Sequence[str],
    spacing: Sequence[float],
) -> np.ndarray:
    """Score every operating point on one case.

    Args:
        reference: bool (X, Y, Z).
        maps: the lesion's probability with mirroring (True) and without, float32 of the same shape.
        points: P candidates.
        metrics: M names.
        spacing: voxel size in mm.

    Returns:
        (P, M), nan where a metric does not exist.
    """
    voxel_mm3 = float(np.prod(spacing))
    areas = _areas(reference, maps) if "pr_auc" in metrics else None
    lowest = min(point.threshold for point in points)
    box = _box_around(reference, *(values > lowest for values in maps.values()))
    reference, maps = reference[box], {mirrored: values[box] for mirrored, values in maps.items()}
    lesions, known = {}, {}
    rows = np.empty((len(points), len(metrics)))
    for number, point in enumerate(points):
        values, voxels = maps[point.mirroring], (point.mirroring, point.threshold, point.connectivity)
        if voxels not in lesions:
            lesions[voxels] = find_overlaps(reference, values > point.threshold, point.connectivity, values)
        overlaps = lesions[voxels]
        kept = point.keep(overlaps.predicted, overlaps.peaks, voxel_mm3)
        key = (*voxels, kept.tobytes())
        if key not in known:
            known[key] = compare_lesions(overlaps.keeping(kept), voxel_mm3 / 1000)
            if any(name in metrics for name in SURFACES):
                surfaces = compare_surfaces(reference, point.segment(values, voxel_mm3), spacing, 1.0)
                known[key] |= dict(zip(SURFACES, surfaces))
        scores = known[key]
        if areas is not None:
            constant = point.constant_map_when_empty and not kept.any()
            scores = scores | {"pr_auc": areas[None if constant else point.mirroring]}
        rows[number] = [scores[name] for name in metrics]
    return rows


def score_cases(
    held_out: Mapping[bool, Sequence[HeldOutCase]], points: Sequence[OperatingPoint], goal: Goal, processes: int = 1
) -> np.ndarray:
    """Score every operating point on every case, (cases, points, metrics).

    Args:
        held_out: the same cases with mirroring (True) and, where that is to be chosen, without.

    Raises:
        UserError: they are not the same.
    """
    names = [{case.case for case in cases} for cases in held_out.values()]
    if odd := sorted(names[0].union(*names) - names[0].intersection(*names)):
        raise UserError(
            f"{len(odd)} cases, such as {odd[0]}, were held out with or without mirroring, but not both: validate the "
            "folds again (nnUNetv2_train ... --val --npz), and remove what lies in their validation_unmirrored."
        )
    cases = [dict(zip(held_out, pair)) for pair in zip(*held_out.values(), strict=True)]
    work = partial(_score_case, points=points, goal=goal)
    return np.stack(map_cases(work, cases, processes, "scoring operating points"))


def choose(scores: np.ndarray, points: Sequence[OperatingPoint], units: Sequence[str], goal: Goal) -> Choice:
    """Choose the best operating point, and measure by cross-validation over units what choosing gains.

    Args:
        scores: (N, P, M) of N cases, P points and M metrics; point 0 is what others are compared with.
        points: P candidates.
        units: what each case belongs to; no unit is both chosen by and measured on.
        goal: the metrics, and whether their mean or their rank counts.

    Raises:
        UserError: there are fewer than two units, or no case has the metric.
    """
    losses = _losses(scores, goal)
    counts = ~np.isnan(losses).all(axis=1)
    if not counts.any():
        raise UserError(f"No case has {', '.join(NAMES[name] for name in goal.metrics)}: choose another metric.")
    part, n_units = parts_of(units)
    chosen = np.empty(len(scores), dtype=int)
    by_part = []
    for number in range(part.max() + 1):
        training = losses[(part != number) & counts]
        if not len(training):
            raise UserError("Too few cases have the metric to choose by some of them and measure on the others.")
        best = int(np.argmin(training.mean(axis=0)))
        chosen[part == number] = best
        by_part.append(best)
    ours, plain = scores[np.arange(len(scores)), chosen], scores[:, 0]
    report = {
        "preset": goal.preset,
        "chosen_by": list(goal.metrics) if len(goal.metrics) == 1 else f"rank over {', '.join(goal.metrics)}",
        "n_cases": len(scores),
        "n_units": n_units,
        "n_candidates": len(points),
        "gain": _gains(ours, plain, units, goal),
        "chosen_without_each_part": [asdict(points[best]) for best in by_part],
    }
    if len(goal.metrics) > 1:
        report["rank"] = _rank_of_two(ours, plain, units, goal)
    return Choice(point=points[int(np.argmin(losses[counts].mean(axis=0)))], report=report)


def describe(choice: Choice) -> str:
    """Write a choice as the lines that the command prints."""
    point, report = choice.point, choice.report
    lines = [
        f"threshold {point.threshold:g}, lesions of at least {point.minimum_mm3:g} mm3"
        + ("" if point.saving_peak is None else f" (or with a probability of {point.saving_peak:g})")
        + (", with mirroring" if point.mirroring else ", without mirroring"),
        f"chosen among {report['n_candidates']} on {report['n_cases']} cases; out of sample (cross-validated over "
        f"{report['n_units']} units), against nnU-Net's own masks: mean, gain [95 % interval]",
    ]
    for name, entry in report["gain"].items():
        low, high = entry["interval"]
        fewer = "" if entry["n_cases"] == report["n_cases"] else f"  over the {entry['n_cases']} cases that have it"
        lines.append(
            f"  {NAMES[name]:<24} {entry['chosen']:8.4f}  {entry['difference']:+.4f}  [{low:+.4f}, {high:+.4f}]{fewer}"
        )
    decisive = next(iter(report["gain"].values()))["gained"]
    if "rank" in report:
        entry = report["rank"]
        low, high = entry["interval"]
        decisive = entry["gained"]
        lines.append(
            f"  rank of the two (1 is best)  {entry['mean']:.4f}  [{low:.4f}, {high:.4f}]; 1.5 is no difference"
        )
    if not decisive:
        lines.append("The interval includes no gain: on these cases, nnU-Net's own masks may be as good.")
    return "\n".join(lines)


def _score_case(maps: Mapping[bool, HeldOutCase], points: Sequence[OperatingPoint], goal: Goal) -> np.ndarray:
    read = {mirrored: read_case(case) for mirrored, case in maps.items()}
    reference = next(iter(read.values()))[0]
    probabilities = {mirrored: values for mirrored, (_, values) in read.items()}
    scores = score(reference.array, probabilities, points, goal.metrics, reference.spacing)
    if PRESETS[goal.preset].patients_only and not reference.array.any():
        scores[:, [name != "correctly_empty" for name in goal.metrics]] = np.nan
    return scores


def _areas(reference: np.ndarray, maps: Mapping[bool, np.ndarray]) -> dict[bool | None, float]:
    """Return the PR-AUC of each map, and (None) of a constant one."""
    areas: dict[bool | None, float] = {mirrored: pr_auc(reference, values) for mirrored, values in maps.items()}
    return areas | {None: pr_auc(reference, np.zeros(reference.shape, np.float32))}


def _box_around(*masks: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box with all that is in any of the masks, at least one voxel."""
    anything = np.logical_or.reduce(masks)
    box = []
    for axis in range(anything.ndim):
        along = np.flatnonzero(anything.any(axis=tuple(other for other in range(anything.ndim) if other != axis)))
        box.append(slice(along[0], along[-1] + 1) if len(along) else slice(0, 1))
    return tuple(box)


def _losses(scores: np.ndarray, goal: Goal) -> np.ndarray:
    """Return what is to be small on average, (N, P); nan in all points where a case does not count.

    One metric: itself, with its sign. A point that lacks it on a case, as HD95 lacks where the mask is empty, takes the
    worst of the case's points. Several: the point's mean rank among the points, as if each were a team.
    """
    signed = scores * np.array([1.0 if name in BETTER_WHEN_SMALL else -1.0 for name in goal.metrics])
    missing = np.isnan(signed)
    worst = np.where(missing, -np.inf, signed).max(axis=1, keepdims=True)
    filled = np.where(missing & np.isfinite(worst), worst, signed)
    if len(goal.metrics) == 1:
        return filled[:, :, 0]
    ranks = rankdata(np.where(missing, np.inf, signed), axis=1)
    ranks[missing] = scores.shape[1]
    known = np.broadcast_to(~missing.all(axis=1, keepdims=True), ranks.shape)
    total, number = np.where(known, ranks, 0).sum(axis=2), known.sum(axis=2)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def parts_of(units: Sequence[str]) -> tuple[np.ndarray, int]:
    """Deal units to parts, (N,), balanced by their numbers of cases; and return how many units there are."""
    from sklearn.model_selection import GroupKFold

    n_units = len(set(units))
    if n_units < 2:
        raise UserError("All cases are of one unit, so that no choice can be measured on another: use another --by.")
    part = np.empty(len(units), dtype=int)
    folds = GroupKFold(min(PARTS, n_units), shuffle=True, random_state=0).split(units, groups=list(units))
    for number, (_, held_out) in enumerate(folds):
        part[held_out] = number
    return part, n_units


def _gains(ours: np.ndarray, plain: np.ndarray, units: Sequence[str], goal: Goal) -> dict[str, dict[str, Any]]:
    """What is gained of each metric, over the cases that have it with both masks."""
    gains = {}
    for number, name in enumerate(goal.metrics):
        difference = ours[:, number] - plain[:, number]
        both = ~np.isnan(difference)
        sign = -1 if name in BETTER_WHEN_SMALL else 1
        interval = clustered_interval(difference, units)
        gains[name] = {
            "n_cases": int(both.sum()),
            "plain": _mean(plain[both, number]),
            "chosen": _mean(ours[both, number]),
            "difference": _mean(difference),
            "interval": interval,
            "gained": bool(min(sign * end for end in interval) > 0),
        }
    return gains


def _rank_of_two(ours: np.ndarray, plain: np.ndarray, units: Sequence[str], goal: Goal) -> dict[str, Any]:
    """Rank the chosen masks and nnU-Net's own against each other as a challenge of two teams."""
    ranks = _losses(np.stack([ours, plain], axis=1), goal)[:, 0]
    interval = clustered_interval(ranks, units)
    return {"mean": _mean(ranks), "interval": interval, "gained": bool(interval[1] < 1.5)}


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
