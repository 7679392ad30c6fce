"""Alignment of modalities in a representation: the paper's two figures, and the checks beside them, with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from nnunet_ssl.corpus.modalities import UNKNOWN
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.embeddings import Embeddings
from nnunet_ssl.evaluation.statistics import bootstrap_interval, jackknife_interval, mean_interval
from nnunet_ssl.representation import (
    Modalities,
    PerPatient,
    cross_modality_distance,
    cross_modality_retrieval,
    cross_subject_distance,
    effective_rank,
    patient_distances,
    uniformity,
)


def measure_alignment(embeddings: Embeddings) -> dict[str, Any]:
    """Measure how well a representation aligns modalities and keeps subjects apart.

    ``docs/reference/scores.md`` defines each figure. Scans of unknown modality are left out. Intervals are 95 %, over
    patients.

    Raises:
        UserError: no patient has scans of two modalities.
    """
    known = embeddings.where((embeddings.scans["modality"] != UNKNOWN).to_numpy())
    patient, modality = known.scans["patient_id"].to_numpy(str), known.scans["modality"].to_numpy(str)
    within = cross_modality_distance(known.vectors, patient, modality)
    if not within.n_patients:
        raise UserError(
            f"Alignment compares one patient's scans of different modality, and no patient has two modalities. Found: "
            f"{len(embeddings)} scans of {embeddings.scans['patient_id'].nunique()} patients, {len(known)} of them of "
            f"a known modality ({', '.join(np.unique(modality)) or 'none'})."
        )
    return {
        "n_scans": len(known),
        "n_patients": len(np.unique(patient)),
        "n_scans_by_modality": {name: int((modality == name).sum()) for name in np.unique(modality)},
        "dimension": known.vectors.shape[1],
        "cross_modality": _summary(within) | {"interval": mean_interval(within.values)},
        "cross_subject": _cross_subject(known.vectors, patient, modality, "any"),
        "cross_subject_same_modality": _cross_subject(known.vectors, patient, modality, "same"),
        "cross_subject_different_modality": _cross_subject(known.vectors, patient, modality, "different"),
        "retrieval": _retrieval(known.vectors, patient, modality),
        "effective_rank": _over_scans(effective_rank, known.vectors, patient),
        "uniformity": _over_scans(uniformity, known.vectors, patient),
        "modality_pairs": _modality_pairs(known.vectors, patient, modality),
    }


def describe_alignment(result: dict[str, Any]) -> str:
    """Write the result as the few lines that the command prints."""
    lines = [f"{result['n_patients']} patients, {result['n_scans']} scans, {result['dimension']} dimensions"]
    names = {
        "cross_modality": "cross-modality distance, within patient",
        "cross_subject": "cross-subject distance",
        "cross_subject_same_modality": "    same modality",
        "cross_subject_different_modality": "    different modality",
    }
    for key, name in names.items():
        entry = result[key]
        lines.append(
            f"{name:<40} {entry['mean']:.4f} +- {entry['std']:.4f}  {_bracket(entry)}  {entry['n_patients']} patients"
        )
    retrieval = result["retrieval"]
    lines.append(
        f"{'retrieval accuracy across modalities':<40} {retrieval['accuracy']:.4f}  {_bracket(retrieval)}  "
        f"chance {retrieval['chance']:.4f}"
    )
    for key, name in {"effective_rank": "effective rank", "uniformity": "uniformity"}.items():
        lines.append(f"{name:<40} {result[key]['value']:.4f}  {_bracket(result[key])}")
    return "\n".join(lines)


def _summary(per_patient: PerPatient) -> dict[str, Any]:
    return {"mean": per_patient.mean, "std": per_patient.std, "n_patients": per_patient.n_patients}


def _cross_subject(
    vectors: np.ndarray, patient: np.ndarray, modality: np.ndarray, modalities: Modalities
) -> dict[str, Any]:
    """The mean over patients, with an interval that draws patients on both sides of a pair."""
    summary = _summary(cross_subject_distance(vectors, patient, modality, modalities=modalities))
    _, matrix = patient_distances(vectors, patient, modality, modalities=modalities)
    np.fill_diagonal(matrix, np.nan)
    known = ~np.isnan(matrix)
    filled = np.where(known, matrix, 0.0)

    def mean_over_patients(weights: np.ndarray) -> np.ndarray:
        counts = weights @ known
        per_patient = np.divide(weights @ filled, counts, out=np.zeros_like(counts), where=counts > 0)
        drawn = weights * (counts > 0)
        with np.errstate(invalid="ignore"):
            return (drawn * per_patient).sum(axis=1) / drawn.sum(axis=1)

    return summary | {"interval": bootstrap_interval(mean_over_patients, len(matrix))}


def _retrieval(vectors: np.ndarray, patient: np.ndarray, modality: np.ndarray) -> dict[str, Any]:
    """The mean over patients of the share of a patient's searches that find the patient."""
    searches = cross_modality_retrieval(vectors, patient, modality)
    patients, owner = np.unique(patient[searches.query], return_inverse=True)
    count = np.bincount(owner)
    hits = np.bincount(owner, weights=searches.hit) / count
    chance = np.bincount(owner, weights=searches.chance) / count
    return {
        "accuracy": hits.mean(),
        "chance": chance.mean(),
        "n_patients": len(patients),
        "n_searches": len(searches.hit),
        "interval": mean_interval(hits),
    }


def _over_scans(measure: Callable[[np.ndarray], float], vectors: np.ndarray, patient: np.ndarray) -> dict[str, Any]:
    """A measure of the whole set. Drawing scans twice would lower it, so its interval leaves patients out instead."""
    _, owner = np.unique(patient, return_inverse=True)
    return {"value": measure(vectors), "interval": jackknife_interval(lambda kept: measure(vectors[kept]), owner)}


def _modality_pairs(vectors: np.ndarray, patient: np.ndarray, modality: np.ndarray) -> list[dict[str, Any]]:
    """The cross-modality distance and the retrieval accuracy (both ways) of each two modalities."""
    pairs = []
    for first, second in itertools.combinations(np.unique(modality), 2):
        rows = np.isin(modality, [first, second])
        within = cross_modality_distance(vectors[rows], patient[rows], modality[rows])
        if within.n_patients:
            accuracy = cross_modality_retrieval(vectors[rows], patient[rows], modality[rows]).accuracy
            pairs.append({"modalities": [first, second]} | _summary(within) | {"retrieval": accuracy})
    return pairs


def _bracket(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"[{low:.4f}, {high:.4f}]"
