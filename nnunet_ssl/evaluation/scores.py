"""Scores of predictions under many weightings at once, as a bootstrap draws them; scikit-learn computes one at a time.

Everywhere `truth` is (N,), and `weights` (R, N): how much each prediction counts in each of R draws. Each function
returns (R,) values, nan where a draw leaves the score undefined. With weights of one they are scikit-learn's.
"""

from __future__ import annotations

import numpy as np


def mean_absolute_error(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean of |truth - predicted|."""
    return _ratio(weights @ np.abs(truth - predicted), weights.sum(axis=1))


def r2(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the coefficient of determination: 1 - squared error / squared deviation from the draw's mean."""
    mean = _ratio(weights @ truth, weights.sum(axis=1))
    deviation = (weights * (truth - mean[:, None]) ** 2).sum(axis=1)
    return 1 - _ratio(weights @ (truth - predicted) ** 2, deviation)


def balanced_accuracy(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean over the classes in `truth` of the share of each that is predicted right."""
    hit = truth == predicted
    recalls = [_ratio(weights @ (hit & (truth == name)), weights @ (truth == name)) for name in np.unique(truth)]
    return np.mean(recalls, axis=0)


def roc_auc(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the probability that a positive scores higher than a negative; equal scores count half.

    Args:
        truth: boolean (N,).
    """
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # of runs of equal scores
    positive, negative = (np.add.reduceat(weights[:, order] * kind[order], starts, axis=1) for kind in (truth, ~truth))
    lower = np.cumsum(negative, axis=1) - negative / 2
    return _ratio((positive * lower).sum(axis=1), positive.sum(axis=1) * negative.sum(axis=1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
