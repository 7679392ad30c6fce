"""What a frozen representation knows of a whole scan: linear probes for age, or for any column of the manifest.

Subjects, not scans, are split. The strength of regularisation is chosen inside each training part, again by subject
(nested cross-validation), so nothing of a subject is seen before it is predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import shuffle

from nnunet_ssl.corpus.modalities import UNKNOWN
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.embeddings import Embeddings
from nnunet_ssl.evaluation.scores import balanced_accuracy, mean_absolute_error, r2, roc_auc
from nnunet_ssl.evaluation.statistics import bootstrap_interval

Task = Literal["auto", "regression", "classification"]
Score = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Maps truth (N,), output (N, ...) and weights (R, N), one per scan, to R values."""

STRENGTHS = np.logspace(-1, 5, 7)
"""Candidates for the penalty, on standardised embeddings; the logistic regression's C is its inverse."""
MINIMUM_SUBJECTS = 4
MINIMUM_SUBJECTS_OF_A_CLASS = 3
MOST_CLASSES = 10
NO_VALUE = ("", "n/a", "nan", UNKNOWN)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe predicted, and how well.

    Attributes:
        summary: the task, and the scores with their intervals over subjects and by modality.
        predictions: one row per scan that has a value: who it is, truth, predicted, fold, and for a classification
            ``p(<class>)`` for each class.
    """

    summary: dict[str, Any]
    predictions: pd.DataFrame


def probe(embeddings: Embeddings, target: str, *, task: Task = "auto", folds: int = 5, seed: int = 0) -> ProbeResult:
    """Predict a column of the scans' table from their embeddings.

    Args:
        embeddings: one per scan.
        target: the column. Scans without a value are left out.
        task: "auto" is a regression when all values are numbers and more than ten of them differ.
        folds: of both cross-validations; fewer where there are too few subjects.
        seed: of the splits.

    Raises:
        UserError: no such column, too few subjects with a value, or fewer than two folds.
    """
    if folds < 2:
        raise UserError(f"A cross-validation has at least two folds; {folds} was asked for.")
    if target not in embeddings.scans:
        raise UserError(f"There is no column '{target}'. Columns: {', '.join(embeddings.scans.columns)}.")
    known = embeddings.where(~embeddings.scans[target].str.strip().str.lower().isin(NO_VALUE).to_numpy())
    numbers = pd.to_numeric(known.scans[target], errors="coerce")
    if task == "auto":
        continuous = numbers.notna().all() and numbers.nunique() > MOST_CLASSES
        task = "regression" if continuous else "classification"
    if task == "regression":
        known = known.where(numbers.notna().to_numpy())
        result = _regress(known, numbers.dropna().to_numpy(np.float64), folds, seed)
    else:
        known = _without_rare_classes(known, target)
        result = _classify(known, known.scans[target].to_numpy(str), folds, seed)
    context = {
        "target": target,
        "task": task,
        "n_subjects": known.scans["patient_id"].nunique(),
        "n_scans": len(known),
        "scans_left_out": len(embeddings) - len(known),
    }
    return ProbeResult(summary=context | result.summary, predictions=result.predictions)


def describe_probe(summary: dict[str, Any]) -> str:
    """Write a summary as the few lines that the command prints."""
    lines = [
        f"{summary['task']} of '{summary['target']}': {summary['n_subjects']} subjects, {summary['n_scans']} scans "
        f"({summary['scans_left_out']} left out), {summary['folds']} folds by subject"
    ]
    for name, entry in summary["scores"].items():
        low, high = entry["interval"]
        lines.append(
            f"{name:<20} {entry['value']:8.4f}  [{low:.4f}, {high:.4f}]   without images {entry['baseline']:.4f}"
        )
    for modality, entry in summary["by_modality"].items():
        scores = ", ".join(f"{name} {value:.4f}" for name, value in entry["scores"].items() if not np.isnan(value))
        lines.append(f"    {modality:<8} {entry['n_scans']:>6} scans   {scores}")
    return "\n".join(lines)


def _regress(embeddings: Embeddings, truth: np.ndarray, folds: int, seed: int) -> ProbeResult:
    n_subjects = embeddings.scans["patient_id"].nunique()
    if n_subjects < MINIMUM_SUBJECTS:
        raise UserError(f"A probe needs {MINIMUM_SUBJECTS} subjects with a number to predict; there are {n_subjects}.")
    splits = _Splits(min(folds, n_subjects), seed, stratified=False)
    model = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": STRENGTHS}, scoring="neg_mean_absolute_error"
    )
    output, fold = _predict_held_out(model, embeddings, truth, splits)
    baseline, _ = _predict_held_out(DummyRegressor(), embeddings, truth, splits)
    scores: dict[str, Score] = {"mean absolute error": mean_absolute_error, "R2": r2}
    return ProbeResult(
        summary={"folds": splits.folds} | _scored(scores, embeddings, truth, output, baseline),
        predictions=embeddings.scans.assign(truth=truth, predicted=output, fold=fold),
    )


def _classify(embeddings: Embeddings, truth: np.ndarray, folds: int, seed: int) -> ProbeResult:
    classes = np.unique(truth)
    smallest = _subjects_of_classes(embeddings, truth).min()
    splits = _Splits(min(folds, smallest), seed, stratified=True)
    model = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, class_weight="balanced")),
        {"logisticregression__C": 1 / STRENGTHS},
        scoring="balanced_accuracy",
    )
    output, fold = _predict_held_out(model, embeddings, truth, splits)
    baseline, _ = _predict_held_out(DummyClassifier(strategy="uniform"), embeddings, truth, splits)

    def accuracy(truth: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return balanced_accuracy(truth, classes[output.argmax(axis=1)], weights)

    def area(truth: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The mean over classes of the area of each class against the others; for two classes both are one number."""
        return np.mean([roc_auc(truth == name, output[:, k], weights) for k, name in enumerate(classes)], axis=0)

    probabilities = {f"p({name})": output[:, k] for k, name in enumerate(classes)}
    return ProbeResult(
        summary={"folds": splits.folds, "classes": {name: int((truth == name).sum()) for name in classes}}
        | _scored({"balanced accuracy": accuracy, "ROC AUC": area}, embeddings, truth, output, baseline),
        predictions=embeddings.scans.assign(
            truth=truth, predicted=classes[output.argmax(axis=1)], fold=fold, **probabilities
        ),
    )


@dataclass(frozen=True)
class _Splits:
    """A way to split by subject."""

    folds: int
    seed: int
    stratified: bool

    def of(self, truth: np.ndarray, subject: np.ndarray, folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
        names, group = np.unique(subject, return_inverse=True)
        if self.stratified:
            # Subjects are shuffled here: when scikit-learn before 1.8 does it, it does not stratify (its issue #32478).
            group = np.argsort(shuffle(np.arange(len(names)), random_state=self.seed))[group]
            splitter = StratifiedGroupKFold(folds)
        else:
            splitter = GroupKFold(folds, shuffle=True, random_state=self.seed)
        return list(splitter.split(np.zeros(len(truth)), truth, groups=group))


def _predict_held_out(
    model: BaseEstimator, embeddings: Embeddings, truth: np.ndarray, splits: _Splits
) -> tuple[np.ndarray, np.ndarray]:
    """Return the prediction of each scan by a model that never saw its subject, and the fold it was in.

    A grid search is given its own splits of each training part. Classifiers return (N, classes) probabilities.
    """
    subject = embeddings.scans["patient_id"].to_numpy(str)
    classes = np.unique(truth)
    classify = hasattr(model, "predict_proba")
    output = np.zeros((len(truth), len(classes)) if classify else len(truth))
    fold_of = np.zeros(len(truth), dtype=int)
    for fold, (train, test) in enumerate(splits.of(truth, subject, splits.folds)):
        if isinstance(model, GridSearchCV):
            model.set_params(cv=splits.of(truth[train], subject[train], max(2, splits.folds - 1)))
        model.fit(embeddings.vectors[train], truth[train])
        if classify:
            columns = np.searchsorted(classes, model.classes_)
            output[np.ix_(test, columns)] = model.predict_proba(embeddings.vectors[test])
        else:
            output[test] = model.predict(embeddings.vectors[test])
        fold_of[test] = fold
    return output, fold_of


def _scored(
    scores: Mapping[str, Score], embeddings: Embeddings, truth: np.ndarray, output: np.ndarray, baseline: np.ndarray
) -> dict[str, Any]:
    """Each score with its interval over subjects, the same of a model without images, and each modality's."""
    _, subject = np.unique(embeddings.scans["patient_id"].to_numpy(str), return_inverse=True)
    modality = embeddings.scans["modality"].to_numpy(str)

    def value(score: Score, output: np.ndarray, rows: np.ndarray) -> float:
        return float(score(truth[rows], output[rows], np.ones((1, rows.sum())))[0])

    def interval(score: Score) -> tuple[float, float]:
        return bootstrap_interval(
            lambda weights: score(truth, output, weights[:, subject]), subject.max() + 1, repeats=1000
        )

    everything = np.ones(len(truth), dtype=bool)
    return {
        "scores": {
            name: {
                "value": value(score, output, everything),
                "interval": interval(score),
                "baseline": value(score, baseline, everything),
            }
            for name, score in scores.items()
        },
        "by_modality": {
            name: {
                "n_scans": int((modality == name).sum()),
                "scores": {key: value(score, output, modality == name) for key, score in scores.items()},
            }
            for name in np.unique(modality)
        },
    }


def _subjects_of_classes(embeddings: Embeddings, truth: np.ndarray) -> pd.Series:
    return embeddings.scans["patient_id"].groupby(truth).nunique()


def _without_rare_classes(embeddings: Embeddings, target: str) -> Embeddings:
    subjects = _subjects_of_classes(embeddings, embeddings.scans[target].to_numpy(str))
    kept = subjects.index[subjects >= MINIMUM_SUBJECTS_OF_A_CLASS]
    if len(kept) < 2:
        found = ", ".join(f"{name} ({count})" for name, count in subjects.items()) or "none"
        raise UserError(
            f"A probe of '{target}' needs two classes with {MINIMUM_SUBJECTS_OF_A_CLASS} subjects each. "
            f"Classes and their subjects: {found}."
        )
    if len(kept) < len(subjects):
        rare = ", ".join(subjects.index.difference(kept))
        logger.warning("Left out, with fewer than %d subjects: %s.", MINIMUM_SUBJECTS_OF_A_CLASS, rare)
    return embeddings.where(embeddings.scans[target].isin(kept).to_numpy())
