"""Folds for nnU-Net: random as nnU-Net draws them, by whole groups, or stratified; kept where nnU-Net reads them."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnunet_ssl.conversion.dataset import Case
from nnunet_ssl.conversion.reporting import write_text
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import folder_of

logger = logging.getLogger(__name__)

Folds = Literal["random", "cohort", "centre", "stratified"]

_SEED = 12345  # nnU-Net's own


def make_splits(
    cases: Sequence[Case], folds: Folds, strata: Mapping[str, str] | None = None
) -> list[dict[str, list[str]]]:
    """Divide training cases into five folds (fewer when there are fewer subjects or cohorts).

    Args:
        cases: the training cases.
        folds: "random" = what nnU-Net itself would draw, a subject's sessions kept together; "cohort" = no group in two
            folds, sizes balanced; "centre" = no group in two folds, each stratum's share balanced; "stratified" = every
            fold has each group's share.
        strata: for "centre": the stratum of each case, such as its lesion's size.

    Returns:
        nnU-Net's ``splits_final.json``; empty when the cases can't be divided.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

    cases = sorted(cases, key=lambda case: case.id)
    ids, groups = [case.id for case in cases], [case.group for case in cases]
    if folds == "random":
        return _random(cases)
    if folds in ("cohort", "centre"):
        n_splits = min(5, len(set(groups)))
        if n_splits < 2:
            logger.warning("All training cases are of one %s: the folds are random instead of grouped.", folds)
            return _random(cases)
        balanced = [strata[case.id] for case in cases] if folds == "centre" and strata else None
        if balanced and max(map(balanced.count, balanced)) >= n_splits:
            parts = _quietly(StratifiedGroupKFold(n_splits).split(ids, balanced, groups))
        else:  # too few cases of any stratum to go round
            parts = GroupKFold(n_splits).split(ids, groups=groups)
    else:
        n_splits = min(5, max(map(groups.count, groups)))
        if n_splits < 2:
            return _random(cases)
        parts = _quietly(StratifiedKFold(n_splits, shuffle=True, random_state=_SEED).split(ids, groups))
    return [{"train": [ids[i] for i in train], "val": [ids[i] for i in val]} for train, val in parts]


def size_bins(volumes: Mapping[str, float], n_bins: int = 5) -> dict[str, int]:
    """Return the bin of each volume, 0 the smallest; bins hold about equally many, and equal volumes share one."""
    if not volumes:
        return {}
    edges = np.quantile(list(volumes.values()), np.arange(1, n_bins) / n_bins)
    return {name: int(np.searchsorted(edges, volume, side="left")) for name, volume in volumes.items()}


def store_splits(splits: list[dict[str, list[str]]], raw: Path) -> None:
    """Write the splits to ``$nnUNet_preprocessed/<data set>/splits_final.json``, where nnU-Net's training looks.

    Planning and preprocessing leave that file alone. A copy beside the raw data tells our file from one that the user
    or nnU-Net made since; the latter stays. Nothing is written when there are no splits.
    """
    if not splits:
        logger.warning("There are too few training cases for folds: train with fold `all`.")
        return
    ours = raw / "conversion" / "splits_final.json"
    try:
        used = folder_of("nnUNet_preprocessed") / raw.name / "splits_final.json"
    except UserError as error:
        write_text(ours, json.dumps(splits, indent=2))
        logger.warning("The folds are in %s only, where training doesn't look. %s Then run this again.", ours, error)
        return
    if used.is_file() and json.loads(used.read_text()) not in (splits, _read(ours)):
        logger.warning("%s is not from this script and stays as it is. Remove it to get the folds chosen here.", used)
        return
    for path in (used, ours):  # a kill between the two leaves folds that are known as ours next time
        write_text(path, json.dumps(splits, indent=2))


def _quietly(parts: Iterator[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw the parts, without scikit-learn's warning that a group smaller than the number of folds is spread thin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return list(parts)


def _random(cases: Sequence[Case]) -> list[dict[str, list[str]]]:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    subjects = list(dict.fromkeys(case.subject for case in cases))
    if len(subjects) < 2:
        return []
    by_subject = generate_crossval_split(subjects, seed=_SEED, n_splits=min(5, len(subjects)))
    return [
        {part: [case.id for case in cases if case.subject in set(chosen)] for part, chosen in split.items()}
        for split in by_subject
    ]


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
