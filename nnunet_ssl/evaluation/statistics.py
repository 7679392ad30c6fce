"""Uncertainty: intervals over patients, cases or seeds, and corrected paired tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

REPEATS = 2000
LEVEL = 0.95


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], n_units: int, *, repeats: int = REPEATS, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval (95 %) of a statistic when its independent units are drawn with replacement.

    Args:
        statistic: maps weights (R, n_units), how often each unit was drawn, to values (R,). Values of nan (a draw on
            which the statistic does not exist) are left out.
        n_units: patients or cases. With fewer than two there is no interval: (nan, nan).
        repeats: R.
        seed: same seed, same interval.
    """
    if n_units < 2:
        return float("nan"), float("nan")
    weights = np.random.default_rng(seed).multinomial(n_units, np.full(n_units, 1 / n_units), size=repeats)
    values = statistic(weights.astype(np.float64))
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(values: ArrayLike, **options: Any) -> tuple[float, float]:
    """Return the bootstrap interval of the mean of one value per unit; nan values are not units."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return bootstrap_interval(lambda weights: weights @ known / weights.sum(axis=1), len(known), **options)


def t_interval(values: ArrayLike) -> tuple[float, float]:
    """Return Student's interval (95 %) of the mean of one value per unit; nan values are not units.

    For few units whose values are about normal, such as seeds: of five, a bootstrap's interval is much too narrow. With
    fewer than two there is none: (nan, nan).
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + LEVEL) / 2, len(known) - 1) * stats.sem(known)
    return float(known.mean() - half), float(known.mean() + half)


def clustered_interval(values: ArrayLike, units: Sequence[str], **options: Any) -> tuple[float, float]:
    """Return the bootstrap interval of the mean of values whose units, not they, are independent; nan is left out.

    Args:
        values: (N,).
        units: (N,) the unit of each value, such as a patient with several scans, or a centre.
    """
    known = np.asarray(values, dtype=np.float64)
    present = ~np.isnan(known)
    _, unit = np.unique(np.asarray(units)[present], return_inverse=True)
    sums, counts = np.bincount(unit, known[present]), np.bincount(unit)
    return bootstrap_interval(lambda weights: weights @ sums / (weights @ counts), len(counts), **options)


def rate_interval(values: ArrayLike) -> tuple[float, float]:
    """Return Wilson's interval (95 %) of a rate from one 0 or 1 per unit; nan values are not units.

    A bootstrap of all ones would claim certainty; Wilson's (1927) does not.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return float("nan"), float("nan")
    interval = stats.binomtest(int(known.sum()), len(known)).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def jackknife_interval(
    statistic: Callable[[np.ndarray], float], unit: ArrayLike, *, groups: int = 20, seed: int = 0
) -> tuple[float, float]:
    """Return a normal interval (95 %) from the spread of a statistic when groups of units are left out in turn.

    For statistics that drawing a row twice would change by itself, such as a rank, where a bootstrap is wrong.

    Args:
        statistic: maps a boolean (N,) array of the rows that are kept to a value.
        unit: (N,) integers from 0, the unit (patient) of each row.
        groups: units are dealt at random into this many groups, or one group per unit when they are fewer.
    """
    owner = np.asarray(unit)
    n_units = int(owner.max()) + 1 if len(owner) else 0
    groups = min(groups, n_units)
    if groups < 2:
        return float("nan"), float("nan")
    group = np.random.default_rng(seed).permutation(np.arange(n_units) % groups)[owner]
    value = statistic(np.ones(len(owner), dtype=bool))
    without = np.array([statistic(group != left_out) for left_out in range(groups)])
    error = np.sqrt((groups - 1) / groups * ((without - without.mean()) ** 2).sum())
    half = stats.norm.ppf((1 + LEVEL) / 2) * error
    return float(value - half), float(value + half)


def paired_wilcoxon(first: ArrayLike, second: ArrayLike) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test on paired values.

    Pairs without a difference say nothing and are dropped, as Wilcoxon did. Without any difference: p = 1.
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if not np.any(differences):
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def paired_t(differences: ArrayLike) -> float:
    """Return the two-sided p of the paired t-test, from the differences of a few repeats; 1 without any difference."""
    known = np.asarray(differences, dtype=np.float64)
    return float(stats.ttest_1samp(known, 0).pvalue) if np.any(known) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method (Holm 1979), in the given order."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()
