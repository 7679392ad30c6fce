"""What a frozen representation knows of a whole scan: linear probes for age, or for any column of the manifest.

The strength of regularisation is chosen inside each training part, again by subject (nested cross-validation), so
nothing of a subject is seen before it is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.embeddings import Embeddings
from nnunet_ssl.evaluation.scan_prediction import Prediction, ScanTarget, Task, choose_target, predict_held_out, split

STRENGTHS = np.logspace(-1, 5, 7)
"""Candidates for the penalty, on standardised embeddings; the logistic regression's C is its inverse."""


def probe(
    embeddings: Embeddings,
    target: str,
    *,
    task: Task = "auto",
    folds: int = 5,
    seed: int = 0,
    across: bool = False,
    modalities: Sequence[str] = (),
) -> Prediction:
    """Predict a column of the scans' table from their embeddings.

    Args:
        embeddings: one per scan.
        target, task, modalities: see :func:`~nnunet_ssl.evaluation.scan_prediction.choose_target`.
        folds: of both cross-validations; fewer where there are too few subjects.
        seed: of the splits.
        across: probe each modality alone, too, see :func:`~nnunet_ssl.evaluation.scan_prediction.predict_held_out`.

    Raises:
        UserError: no such column or modality, too few subjects with a value, or fewer than two folds.
    """
    rows, known = choose_target(embeddings.scans, target, task=task, modalities=modalities, folds=folds, seed=seed)
    vectors = embeddings.vectors[rows]

    def learn(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        model = _model(known).set_params(cv=_inner_splits(known, train))
        model.fit(vectors[train], known.values[train])
        if known.task == "regression":
            return model.predict(vectors[test])
        return model.predict_proba(vectors[test])

    return predict_held_out(known, learn, across=across)


def _model(target: ScanTarget) -> GridSearchCV:
    if target.task == "regression":
        return GridSearchCV(
            make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": STRENGTHS}, scoring="neg_mean_absolute_error"
        )
    return GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, class_weight="balanced")),
        {"logisticregression__C": 1 / STRENGTHS},
        scoring="balanced_accuracy",
    )


def _inner_splits(target: ScanTarget, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split a training part, whose rows scikit-learn counts from 0.

    Raises:
        UserError: it has fewer than two subjects of some class.
    """
    for name in target.classes:
        subjects = np.unique(target.subject[rows][target.values[rows] == name])
        if len(subjects) < 2:
            raise UserError(
                f"Of '{name}' a training part has {len(subjects)} subject(s), too few to choose the penalty by: folds "
                f"hold whole subjects, who are of several classes. Leave '{name}' out, or find more of it."
            )
    parts = split(target, rows, max(2, target.folds - 1))
    return [(np.searchsorted(rows, train), np.searchsorted(rows, test)) for train, test in parts]
