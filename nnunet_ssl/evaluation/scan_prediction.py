"""Predict what is known of whole scans, by subject: targets, splits, scores, and what carries across modalities.

Subjects, not scans, are split, so nothing of a subject is seen before it is predicted. How a prediction is learnt is a
:data:`Learner`: a linear probe of frozen embeddings, or an encoder that is fine-tuned on the scans.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.utils import shuffle

from nnunet_ssl.corpus.modalities import UNKNOWN
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.scores import balanced_accuracy, mean_absolute_error, r2, roc_auc
from nnunet_ssl.evaluation.statistics import bootstrap_interval

Task = Literal["auto", "regression", "classification"]
Score = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Maps truth (N,), output (N, ...) and weights (R, N), one per scan, to R values."""
Learner = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Maps the scans to learn from and those to predict, integer row numbers both, to the latter's output: numbers (T,), or
for a classification the probabilities (T, K) of the target's classes, in their order."""

MINIMUM_SUBJECTS = 4
MINIMUM_SUBJECTS_OF_A_CLASS = 3
MOST_CLASSES = 10
NO_VALUE = ("", "n/a", "nan", UNKNOWN)
ALL = "all"
"""What a model is called that learns from the scans of every modality."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScanTarget:
    """What is to be predicted of scans.

    Attributes:
        name: the column.
        task: "regression" or "classification".
        values: (N,) float64, or the classes' names.
        classes: (K,) the sorted names; empty for a regression.
        scans: the N scans, strings: patient_id, session_id, filename, modality and more.
        left_out: how many scans have no value, or one of a class of too few subjects.
        folds: of cross-validations, or fewer where there are too few subjects.
        seed: of their splits.
    """

    name: str
    task: str
    values: np.ndarray
    classes: np.ndarray
    scans: pd.DataFrame
    left_out: int
    folds: int = 5
    seed: int = 0

    @property
    def subject(self) -> np.ndarray:
        """(N,) who each scan is of."""
        return self.scans["patient_id"].to_numpy(str)

    @property
    def modality(self) -> np.ndarray:
        """(N,) of each scan."""
        return self.scans["modality"].to_numpy(str)

    @property
    def scores(self) -> dict[str, Score]:
        """The scores of an output, by name."""
        if self.task == "regression":
            return {"mean absolute error": mean_absolute_error, "R2": r2}
        return {"balanced accuracy": self._accuracy, "ROC AUC": self._area}

    def _accuracy(self, truth: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return balanced_accuracy(truth, self.classes[output.argmax(axis=1)], weights)

    def _area(self, truth: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The mean over classes of the area of each class against the others; for two classes both are one number."""
        areas = [roc_auc(truth == name, output[:, k], weights) for k, name in enumerate(self.classes)]
        return np.mean(areas, axis=0)

    def table(self, output: np.ndarray, fold: np.ndarray) -> pd.DataFrame:
        """Return the scans with truth, predicted, fold, and for a classification ``p(<class>)`` for each class."""
        if self.task == "regression":
            return self.scans.assign(truth=self.values, predicted=output, fold=fold)
        probabilities = {f"p({name})": output[:, k] for k, name in enumerate(self.classes)}
        predicted = self.classes[output.argmax(axis=1)]
        return self.scans.assign(truth=self.values, predicted=predicted, fold=fold, **probabilities)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was predicted of held-out scans, and how well.

    Attributes:
        summary: the task, the scores with their intervals over subjects and by modality, and where that was asked for
            ``across``: by the modality learnt from, by the modality predicted, the same scores.
        predictions: one row per scan, see :meth:`ScanTarget.table`.
        across: the same for the models of one modality each, of which ``trained_on`` tells; without rows otherwise.
    """

    summary: dict[str, Any]
    predictions: pd.DataFrame
    across: pd.DataFrame


def choose_target(
    scans: pd.DataFrame,
    name: str,
    *,
    task: Task = "auto",
    modalities: Sequence[str] = (),
    folds: int = 5,
    seed: int = 0,
) -> tuple[np.ndarray, ScanTarget]:
    """Find what a column has to tell of scans.

    Args:
        scans: N rows of strings.
        name: the column. Scans without a value are left out.
        task: "auto" is a regression when all values are numbers and more than ten of them differ.
        modalities: leave out scans of any other modality; () keeps all.
        folds: of cross-validations, or fewer where there are too few subjects.
        seed: of their splits.

    Returns:
        which rows are used, boolean (N,), and the target of those.

    Raises:
        UserError: no such column or modality, too few subjects with a value, or fewer than two folds.
    """
    if folds < 2:
        raise UserError(f"A cross-validation has at least two folds; {folds} was asked for.")
    if name not in scans:
        raise UserError(f"There is no column '{name}'. Columns: {', '.join(scans.columns)}.")
    if unknown := sorted(set(modalities) - set(scans["modality"])):
        there = ", ".join(sorted(set(scans["modality"])))
        raise UserError(f"There are no scans of {', '.join(unknown)}; there are scans of {there}.")
    scans = scans.assign(**{name: scans[name].str.strip()})  # "control " is no class of its own
    used = ~scans[name].str.lower().isin(NO_VALUE)
    if modalities:
        used &= scans["modality"].isin(modalities)
    numbers = pd.to_numeric(scans[name].where(used), errors="coerce")
    numbers = numbers.where(np.isfinite(numbers))  # "inf" is text to whoever learns
    if task == "auto":
        continuous = numbers[used].notna().all() and numbers.nunique() > MOST_CLASSES
        task = "regression" if continuous else "classification"
    if task == "regression":
        used &= numbers.notna()
        n_subjects = scans["patient_id"][used].nunique()
        if n_subjects < MINIMUM_SUBJECTS:
            raise UserError(
                f"A prediction of '{name}' needs {MINIMUM_SUBJECTS} subjects with a number to predict; there are "
                f"{n_subjects}."
            )
        values = numbers[used].to_numpy(np.float64)
    else:
        used &= _common_classes(scans[used], name).reindex(scans.index, fill_value=False)
        values = scans[name][used].to_numpy(str)
    rows = used.to_numpy()
    return rows, ScanTarget(
        name=name,
        task=task,
        values=values,
        classes=np.unique(values) if task == "classification" else np.array([]),
        scans=scans[rows].reset_index(drop=True),
        left_out=int((~rows).sum()),
        folds=folds,
        seed=seed,
    )


def _common_classes(scans: pd.DataFrame, name: str) -> pd.Series:
    subjects = scans.groupby(name)["patient_id"].nunique()
    kept = subjects.index[subjects >= MINIMUM_SUBJECTS_OF_A_CLASS]
    if len(kept) < 2:
        found = ", ".join(f"{value} ({count})" for value, count in subjects.items()) or "none"
        raise UserError(
            f"A prediction of '{name}' needs two classes with {MINIMUM_SUBJECTS_OF_A_CLASS} subjects each. "
            f"Classes and their subjects: {found}."
        )
    if len(kept) < len(subjects):
        rare = ", ".join(subjects.index.difference(kept))
        logger.warning("Left out, with fewer than %d subjects: %s.", MINIMUM_SUBJECTS_OF_A_CLASS, rare)
    return scans[name].isin(kept)


def split(target: ScanTarget, rows: np.ndarray, folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split scans by subject, and by class where there are classes: (training, test) row numbers of each fold.

    Args:
        target: whose scans.
        rows: integer row numbers of those to split.
        folds: fewer where there are too few subjects, or too few of a class.
    """
    folds = min(folds, _subjects(target, rows))
    names, group = np.unique(target.subject[rows], return_inverse=True)
    splitter: StratifiedGroupKFold | GroupKFold
    if target.task == "classification":
        # Subjects are shuffled here: when scikit-learn before 1.8 does it, it does not stratify (its issue #32478).
        group = np.argsort(shuffle(np.arange(len(names)), random_state=target.seed))[group]
        splitter = StratifiedGroupKFold(folds)
    else:
        splitter = GroupKFold(folds, shuffle=True, random_state=target.seed)
    parts = splitter.split(np.zeros(len(rows)), target.values[rows], groups=group)
    return [(rows[train], rows[test]) for train, test in parts]


def _subjects(target: ScanTarget, rows: np.ndarray) -> int:
    """How many subjects these scans are of; where there are classes, those of the rarest class."""
    if target.task == "regression":
        return len(np.unique(target.subject[rows]))
    return min(len(np.unique(target.subject[rows][target.values[rows] == name])) for name in target.classes)


def predict_held_out(target: ScanTarget, learner: Learner, *, across: bool = False) -> Prediction:
    """Predict every scan by a model that never saw its subject.

    Args:
        target: what to predict of which scans.
        learner: called once for each fold, and with `across` for each modality and fold.
        across: learn from the scans of each modality alone, too, and predict all: a subject in the test part of a fold
            is so for every modality. A modality of too few subjects is predicted, not learnt from.

    Raises:
        UserError: `across` is wanted, and no scan's modality is known.
    """
    modalities = np.unique(target.modality)
    named = [name for name in modalities if name != UNKNOWN]
    if across and not named:
        raise UserError(
            "What carries across modalities cannot be told: the modality of all scans is unknown. Leave out --across."
        )
    parts = split(target, np.arange(len(target.values)), target.folds)
    fold = np.zeros(len(target.values), dtype=int)
    for number, (_, test) in enumerate(parts):
        fold[test] = number
    everything = np.ones(len(target.values), dtype=bool)
    baseline = _outputs(target, _guesser(target), parts, everything)
    output = _outputs(target, learner, parts, everything)
    summary: dict[str, Any] = {
        "target": target.name,
        "task": target.task,
        "n_subjects": len(np.unique(target.subject)),
        "n_scans": len(target.values),
        "scans_left_out": target.left_out,
        "folds": len(parts),
    }
    if target.task == "classification":
        summary["classes"] = {name: int((target.values == name).sum()) for name in target.classes}
    summary |= _scored(target, output, baseline, everything)
    summary["by_modality"] = {name: _cell(target, output, baseline, name) for name in modalities}
    tables = []
    if across:
        matrix = {ALL: {name: summary["by_modality"][name] for name in named}}
        for name in _learnable(target, parts, named):
            chosen = target.modality == name
            of_one, guessed = (_outputs(target, one, parts, chosen) for one in (learner, _guesser(target)))
            matrix[name] = {other: _cell(target, of_one, guessed, other) for other in named}
            tables.append(target.table(of_one, fold).assign(trained_on=name))
        summary["across"] = matrix
    table = target.table(output, fold)
    return Prediction(
        summary=summary,
        predictions=table,
        across=pd.concat(tables, ignore_index=True) if tables else table[:0].assign(trained_on=""),
    )


def _outputs(
    target: ScanTarget, learner: Learner, parts: Sequence[tuple[np.ndarray, np.ndarray]], learnt: np.ndarray
) -> np.ndarray:
    """Predict all scans, learning from those of each training part for which the boolean (N,) array is true."""
    n = len(target.values)
    output = np.zeros((n, len(target.classes)) if target.task == "classification" else n)
    for train, test in parts:
        output[test] = learner(train[learnt[train]], test)
    return output


def _guesser(target: ScanTarget) -> Learner:
    """Predict without images: the training mean, or all classes alike."""

    def guess(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        if target.task == "regression":
            return np.full(len(test), target.values[train].mean())
        return np.full((len(test), len(target.classes)), 1 / len(target.classes))

    return guess


def _learnable(target: ScanTarget, parts: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str]) -> list[str]:
    """Return the modalities among `names` of which every training part has two subjects (of every class)."""
    few = [
        name
        for name in names
        if min(_subjects(target, train[target.modality[train] == name]) for train, _ in parts) < 2
    ]
    if few:
        logger.warning("Not learnt from, with too few subjects: scans of %s.", ", ".join(few))
    return [name for name in names if name not in few]


def _scored(target: ScanTarget, output: np.ndarray, baseline: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """Return each score of some scans with its interval over subjects, and the same of a model without images."""
    truth, output, baseline = target.values[rows], output[rows], baseline[rows]
    names, subject = np.unique(target.subject[rows], return_inverse=True)
    once = np.ones((1, len(truth)))

    def interval(score: Score) -> tuple[float, float]:
        return bootstrap_interval(lambda weights: score(truth, output, weights[:, subject]), len(names), repeats=1000)

    scores = {
        name: {
            "value": float(score(truth, output, once)[0]),
            "interval": interval(score),
            "baseline": float(score(truth, baseline, once)[0]),
        }
        for name, score in target.scores.items()
    }
    return {"n_subjects": len(names), "n_scans": len(truth), "scores": scores}


def _cell(target: ScanTarget, output: np.ndarray, baseline: np.ndarray, modality: str) -> dict[str, Any]:
    """Return the scores of one modality's scans; intervals and those of a model without images stand beside them."""
    result = _scored(target, output, baseline, target.modality == modality)
    entries = result["scores"].items()
    return result | {
        "scores": {name: entry["value"] for name, entry in entries},
        "intervals": {name: entry["interval"] for name, entry in entries},
        "without_images": {name: entry["baseline"] for name, entry in entries},
    }


def across_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return the matrix of a summary as a table: a row for each modality learnt from and each predicted.

    Its columns are trained_on, tested_on, n_subjects, n_scans, and for each score its name, ``<name> low`` and
    ``<name> high`` (95 % over subjects) and ``<name> without images``.
    """
    rows = []
    for trained_on, cells in summary["across"].items():
        for tested_on, cell in cells.items():
            row = {"trained_on": trained_on, "tested_on": tested_on}
            row |= {key: cell[key] for key in ("n_subjects", "n_scans")}
            for name, value in cell["scores"].items():
                low, high = cell["intervals"][name]
                row |= {name: value, f"{name} low": low, f"{name} high": high}
                row[f"{name} without images"] = cell["without_images"][name]
            rows.append(row)
    return pd.DataFrame(rows)


def describe_prediction(summary: Mapping[str, Any]) -> str:
    """Write a summary as the few lines that a command prints."""
    lines = [
        f"{summary['task']} of '{summary['target']}': {summary['n_subjects']} subjects, {summary['n_scans']} scans "
        f"({summary['scans_left_out']} left out), {summary['folds']} folds by subject"
    ]
    for name, entry in summary["scores"].items():
        low, high = entry["interval"]
        lines.append(
            f"{name:<20} {entry['value']:8.4f}  [{low:.4f}, {high:.4f}]   without images {entry['baseline']:.4f}"
        )
    for modality, cell in summary["by_modality"].items():
        scores = ", ".join(f"{name} {value:.4f}" for name, value in cell["scores"].items() if not np.isnan(value))
        lines.append(f"    {modality:<8} {cell['n_scans']:>6} scans   {scores}")
    if "across" in summary:
        name = next(iter(summary["scores"]))
        table = across_table(summary).pivot(index="trained_on", columns="tested_on", values=name)
        lines.append(f"{name}, learnt from the modality of a row, predicted in that of a column:")
        lines += table.loc[list(summary["across"])].to_string(float_format="{:.4f}".format).splitlines()
    return "\n".join(lines)
