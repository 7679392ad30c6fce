"""Folds for nnU-Net: random as nnU-Net draws them, grouped by cohort, or stratified; kept where nnU-Net reads them."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from report import write_text

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import folder_of

logger = logging.getLogger(__name__)

Folds = Literal["random", "cohort", "stratified"]

_SEED = 12345  # nnU-Net's own


class HasGroup(Protocol):
    """What a split needs to know of a case."""

    id: str
    subject: str
    group: str


def make_splits(cases: Sequence[HasGroup], folds: Folds) -> list[dict[str, list[str]]]:
    """Divide training cases into five folds (fewer when there are fewer subjects or cohorts).

    Args:
        cases: the training cases.
        folds: "random" = what nnU-Net itself would draw, a subject's sessions kept together; "cohort" = no group in two
            folds, sizes balanced; "stratified" = every fold has each group's share.

    Returns:
        nnU-Net's ``splits_final.json``; empty when the cases can't be divided.
    """
    from sklearn.model_selection import GroupKFold, StratifiedKFold

    cases = sorted(cases, key=lambda case: case.id)
    ids, groups = [case.id for case in cases], [case.group for case in cases]
    if folds == "random":
        return _random(cases)
    if folds == "cohort":
        n_splits = min(5, len(set(groups)))
        if n_splits < 2:
            logger.warning("All training cases are of one cohort: the folds are random instead of grouped by cohort.")
            return _random(cases)
        parts = GroupKFold(n_splits).split(ids, groups=groups)
    else:
        n_splits = min(5, max(map(groups.count, groups)))
        if n_splits < 2:
            return _random(cases)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a group smaller than the number of folds is spread thin
            parts = list(StratifiedKFold(n_splits, shuffle=True, random_state=_SEED).split(ids, groups))
    return [{"train": [ids[i] for i in train], "val": [ids[i] for i in val]} for train, val in parts]


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
    for path in (ours, used):
        write_text(path, json.dumps(splits, indent=2))


def _random(cases: Sequence[HasGroup]) -> list[dict[str, list[str]]]:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    subjects = list(dict.fromkeys(case.subject for case in cases))
    if len(subjects) < 2:
        return []
    by_subject = generate_crossval_split(subjects, seed=_SEED, n_splits=min(5, len(subjects)))
    return [
        {part: [case.id for case in cases if case.subject in set(chosen)] for part, chosen in split.items()}
        for split in by_subject
    ]


def _read(path: Path):
    return json.loads(path.read_text()) if path.is_file() else None
