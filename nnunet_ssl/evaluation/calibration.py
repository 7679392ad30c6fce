"""What a probability and a predicted volume are worth: calibration by temperature, and volumes with intervals.

Both are learned from held-out cases (see `out_of_fold`), and what they achieve is measured by cross-validation over
units, as the operating point is.

Temperature (Guo et al., arXiv 1706.04599): log odds are divided by one number, that which makes the true masks most
likely. Of a softmax of two classes the log odds are the difference of the logits. Probabilities keep their order.

Volumes (split conformal prediction; Lei et al., JASA 2018): how far the true volume of a held-out case lies from the
predicted one, on a logarithmic scale that starts at :data:`OFFSET_ML`. The interval of a new case reaches as far as
1 - alpha of (n + 1) such distances do. It holds the true volume with at least that probability, on average over
draws of cases, if the new case and the held-out ones are exchangeable: of the same hospitals, and predicted by a model
like those of the folds. (A mean of all folds is a little better than each; its intervals are then a little too wide.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, logit

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.operating import parts_of
from nnunet_ssl.evaluation.operating_point import OperatingPoint
from nnunet_ssl.evaluation.out_of_fold import HeldOutCase, read_case
from nnunet_ssl.evaluation.segmentations import map_cases
from nnunet_ssl.evaluation.statistics import clustered_interval, rate_interval

LOG_ODDS = np.linspace(-20, 20, 1601)
"""Edges of the bins in which voxels are counted; a bin is 0.025 wide, beyond the ends all is as sure as at them."""

CENTRES = (LOG_ODDS[1:] + LOG_ODDS[:-1]) / 2
RELIABILITY_BINS = 15
OFFSET_ML = 0.1
"""Where the logarithmic scale of volumes starts: differences below are of the size of a few voxels."""

TEMPERATURES = (0.05, 20.0)

FILE = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class CaseCounts:
    """What calibration needs of a case.

    Attributes:
        lesion, other: (B,) how many voxels of lesion and of anything else have log odds in each bin.
        true_ml, predicted_ml: volumes of the true mask and of the predicted one.
    """

    lesion: np.ndarray
    other: np.ndarray
    true_ml: float
    predicted_ml: float


def count_cases(held_out: Sequence[HeldOutCase], point: OperatingPoint, processes: int = 1) -> list[CaseCounts]:
    """Count the voxels of every case, and take its volumes at an operating point."""
    return map_cases(partial(_count_case, point=point), held_out, processes, "counting voxels")


def count(reference: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many voxels of lesion, and of anything else, have log odds in each bin."""
    with np.errstate(divide="ignore"):
        odds = np.clip(logit(probabilities.astype(np.float64)), LOG_ODDS[0], LOG_ODDS[-1])
    lesion, other = (np.histogram(odds[mask], LOG_ODDS)[0] for mask in (reference, ~reference))
    return lesion, other


def temperature(lesion: np.ndarray, other: np.ndarray) -> float:
    """Return the temperature that makes the true masks most likely.

    Args:
        lesion, other: (B,) counts of voxels by their log odds.
    """

    def loss(log_temperature: float) -> float:
        return log_loss(lesion, other, math.exp(log_temperature))

    return math.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x)


def log_loss(lesion: np.ndarray, other: np.ndarray, by: float = 1.0) -> float:
    """Return the mean negative log likelihood of voxels, log odds divided by a temperature."""
    odds = CENTRES / by
    return float(-(lesion @ log_expit(odds) + other @ log_expit(-odds)) / (lesion.sum() + other.sum()))


def reliability(lesion: np.ndarray, other: np.ndarray, by: float = 1.0) -> list[dict[str, float]]:
    """Return, for ranges of predicted probability, its mean, the share of voxels that are lesion, and their number."""
    predicted, total = expit(CENTRES / by), lesion + other
    place = np.minimum((predicted * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    rows = []
    for number in np.unique(place[total > 0]):
        here = place == number
        voxels = total[here].sum()
        rows.append(
            {
                "predicted": float(predicted[here] @ total[here] / voxels),
                "observed": float(lesion[here].sum() / voxels),
                "voxels": int(voxels),
            }
        )
    return rows


def calibration_error(rows: Sequence[Mapping[str, float]]) -> float:
    """Return the expected calibration error: |predicted - observed|, averaged over voxels.

    Nearly all voxels are background and surely so; only those in ranges above the lowest count.
    """
    shown = [row for row in rows if row["predicted"] > 1 / RELIABILITY_BINS]
    voxels = sum(row["voxels"] for row in shown)
    return sum(abs(row["predicted"] - row["observed"]) * row["voxels"] for row in shown) / voxels if voxels else 0.0


def distance(true_ml: np.ndarray | float, predicted_ml: np.ndarray | float) -> np.ndarray:
    """Return how far a volume lies from its prediction, in natural logarithms."""
    return np.abs(np.log(np.asarray(true_ml) + OFFSET_ML) - np.log(np.asarray(predicted_ml) + OFFSET_ML))


def conformal_distance(distances: np.ndarray, coverage: float) -> float:
    """Return the distance that a new case's stays below with a probability of at least `coverage`.

    Raises:
        UserError: so few cases promise no such thing.
    """
    n = len(distances)
    rank = math.ceil((n + 1) * coverage - 1e-9)
    if rank > n:
        needed = math.ceil(coverage / (1 - coverage) - 1e-9)
        raise UserError(f"An interval with a coverage of {coverage:.0%} needs at least {needed} cases, not {n}.")
    return float(np.sort(distances)[rank - 1])


def volume_interval(predicted_ml: float, reach: float) -> tuple[float, float]:
    """Return the interval (ml) of a case's volume, whose distance is at most `reach`."""
    start = predicted_ml + OFFSET_ML
    return max(0.0, start * math.exp(-reach) - OFFSET_ML), start * math.exp(reach) - OFFSET_ML


def cool(probabilities: np.ndarray, by: float) -> np.ndarray:
    """Return probabilities, float32, whose log odds are divided by a temperature."""
    with np.errstate(divide="ignore"):
        return expit(logit(probabilities.astype(np.float64)) / by).astype(np.float32)


def calibrate(counts: Sequence[CaseCounts], units: Sequence[str], coverage: float = 0.9) -> dict[str, Any]:
    """Learn temperature and volume interval from all cases, and measure by cross-validation what they achieve.

    Args:
        counts: of N cases.
        units: what each belongs to.
        coverage: share of cases whose true volume is to lie in the interval.

    Raises:
        UserError: there are too few cases or units, or no lesion at all.
    """
    lesion, other = (np.stack([getattr(case, name) for case in counts]) for name in ("lesion", "other"))
    if not lesion.any():
        raise UserError("No case has a lesion: there is nothing to calibrate by.")
    part, n_units = parts_of(units)
    true_ml, predicted_ml = (np.array([getattr(case, name) for case in counts]) for name in ("true_ml", "predicted_ml"))
    distances = distance(true_ml, predicted_ml)
    gains, covered = np.empty(len(counts)), np.empty(len(counts))
    calibrated = [np.zeros(len(CENTRES)), np.zeros(len(CENTRES))]
    for number in range(part.max() + 1):
        inside, outside = part == number, part != number
        by = temperature(lesion[outside].sum(axis=0), other[outside].sum(axis=0))
        for case in np.flatnonzero(inside):
            gains[case] = log_loss(lesion[case], other[case]) - log_loss(lesion[case], other[case], by)
        for total, held_out in zip(calibrated, (lesion, other)):
            total += _cooled(held_out[inside].sum(axis=0), by)
        covered[inside] = distances[inside] <= conformal_distance(distances[outside], coverage)
    all_lesion, all_other = lesion.sum(axis=0), other.sum(axis=0)
    before, after = reliability(all_lesion, all_other), reliability(calibrated[0], calibrated[1])
    reach = conformal_distance(distances, coverage)
    return {
        "n_cases": len(counts),
        "n_units": n_units,
        "temperature": temperature(all_lesion, all_other),
        "log_loss_gain": float(gains.mean()),
        "log_loss_gain_interval": clustered_interval(gains, units),
        "calibration_error": {"before": calibration_error(before), "after": calibration_error(after)},
        "reliability": {"before": before, "after": after},
        "volume": {
            "coverage_promised": coverage,
            "coverage_measured": float(covered.mean()),
            "coverage_interval": rate_interval(covered),
            "reach": reach,
            "factor": math.exp(reach),
            "offset_ml": OFFSET_ML,
        },
    }


def is_of(path: Path, point: OperatingPoint) -> bool:
    """Whether a stored calibration's volumes are those of an operating point; one that does not tell passes.

    Raises:
        UserError: it is none.
    """
    try:
        told = json.loads(path.read_text()).get("point")
        return told is None or OperatingPoint(**told) == point
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not what nnssl_evaluate calibration writes ({error}): run it again.") from error


def describe(result: Mapping[str, Any]) -> str:
    """Write a calibration as the lines that the command prints."""
    low, high = result["log_loss_gain_interval"]
    error, volume = result["calibration_error"], result["volume"]
    reached, covered = volume["coverage_interval"], volume["coverage_measured"]
    sure = "too sure of itself" if result["temperature"] > 1 else "too careful"
    return "\n".join(
        [
            f"{result['n_cases']} cases, {result['n_units']} units; measured out of sample [95 % interval]",
            f"temperature          {result['temperature']:.3f} (the network is {sure})",
            f"log loss gained      {result['log_loss_gain']:.2e}  [{low:.2e}, {high:.2e}] per voxel, mean over cases",
            f"calibration error    {error['before']:.4f} before, {error['after']:.4f} after",
            f"volume               from 1/{volume['factor']:.2f} to {volume['factor']:.2f} times the predicted one "
            f"(counted from -{volume['offset_ml']} ml): {volume['coverage_promised']:.0%} promised, "
            f"{covered:.1%} reached [{reached[0]:.1%}, {reached[1]:.1%}]",
        ]
    )


def _count_case(held_out: HeldOutCase, point: OperatingPoint) -> CaseCounts:
    reference, values = read_case(held_out)
    lesion, other = count(reference.array, values)
    mask = point.segment(values, reference.voxel_ml * 1000)
    return CaseCounts(
        lesion=lesion,
        other=other,
        true_ml=float(reference.array.sum()) * reference.voxel_ml,
        predicted_ml=float(mask.sum()) * reference.voxel_ml,
    )


def _cooled(counts: np.ndarray, by: float) -> np.ndarray:
    """Return counts of voxels by their log odds after these were divided by a temperature."""
    return np.histogram(np.clip(CENTRES / by, LOG_ODDS[0], LOG_ODDS[-1]), LOG_ODDS, weights=counts)[0]
