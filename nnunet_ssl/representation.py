"""How good is a set of embeddings? Pure functions: alignment between modalities, separation of subjects, collapse.

Everywhere `embeddings` is (N, D), one row per scan, and `patient` and `modality` hold one label per row. All measures
look at directions only: rows are L2-normalised first. A row of zeros has no direction and is at distance 1 from all.
Rows that are not finite leave the measures without a value; a caller who must know the reason looks before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

Modalities = Literal["any", "same", "different"]


@dataclass(frozen=True, kw_only=True)
class PerPatient:
    """One number per patient, and their mean and spread over patients.

    Attributes:
        patients: (P,) labels; only patients for which the number exists.
        values: (P,) float64.
    """

    patients: np.ndarray
    values: np.ndarray

    @property
    def n_patients(self) -> int:
        """How many patients have a value."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over patients; nan without patients."""
        return float(self.values.mean()) if self.n_patients else float("nan")

    @property
    def std(self) -> float:
        """Sample standard deviation (ddof = 1) over patients; nan for fewer than two."""
        return float(self.values.std(ddof=1)) if self.n_patients > 1 else float("nan")


def normalized(embeddings: ArrayLike) -> np.ndarray:
    """Return the rows at unit length, in float64; rows of zeros stay zeros."""
    rows = np.asarray(embeddings, dtype=np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def cosine_distances(embeddings: ArrayLike) -> np.ndarray:
    """Return the (N, N) matrix of 1 - cosine similarity, from 0 (same direction) to 2 (opposite)."""
    rows = normalized(embeddings)
    return 1.0 - rows @ rows.T


def cross_modality_distance(embeddings: ArrayLike, patient: ArrayLike, modality: ArrayLike) -> PerPatient:
    """Measure how far apart one patient's modalities lie: the alignment figure of arXiv 2511.11311.

    For each patient, the mean cosine distance over all pairs of scans of different modality, in any session. Patients
    with a single modality have no value. Pass scans of unknown modality to none of this module's functions that compare
    modalities: two unknown scans may or may not differ.
    """
    patients, matrix = patient_distances(embeddings, patient, modality, modalities="different")
    values = matrix.diagonal()
    return PerPatient(patients=patients[~np.isnan(values)], values=values[~np.isnan(values)])


def cross_subject_distance(
    embeddings: ArrayLike, patient: ArrayLike, modality: ArrayLike | None = None, *, modalities: Modalities = "any"
) -> PerPatient:
    """Measure how far apart different patients lie; near 0 means that the representation has collapsed.

    For each patient, the mean over the other patients of the mean cosine distance between their scans.

    Args:
        modalities: compare all scans of two patients, only those of the same modality, or only of different ones.
    """
    patients, matrix = patient_distances(embeddings, patient, modality, modalities=modalities)
    np.fill_diagonal(matrix, np.nan)
    known = ~np.isnan(matrix)
    has_value = known.any(axis=1)
    sums = np.where(known, matrix, 0.0).sum(axis=1)[has_value]
    return PerPatient(patients=patients[has_value], values=sums / known.sum(axis=1)[has_value])


def patient_distances(
    embeddings: ArrayLike, patient: ArrayLike, modality: ArrayLike | None = None, *, modalities: Modalities = "any"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted patients (P,) and the (P, P) mean cosine distances between their scans.

    A scan is never paired with itself. Entries without any pair of scans are nan.

    Raises:
        ValueError: `modalities` asks for a comparison and `modality` is missing.
    """
    patients, owner = np.unique(np.asarray(patient), return_inverse=True)
    pairs = ~np.eye(len(owner), dtype=bool)
    if modalities != "any":
        if modality is None:
            raise ValueError(f"modalities='{modalities}' compares modalities: pass one label per scan.")
        labels = np.asarray(modality)
        pairs &= (labels[:, None] == labels[None, :]) == (modalities == "same")
    member = np.eye(len(patients))[owner]
    sums = member.T @ np.where(pairs, cosine_distances(embeddings), 0.0) @ member
    counts = member.T @ pairs @ member
    return patients, np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Nearest-neighbour searches from one modality into another; one entry per search.

    Attributes:
        query: (Q,) row number of the scan that searches.
        gallery: (Q,) the modality that was searched, over all patients.
        hit: (Q,) 1 where the nearest scan is the same patient's, else 0; among k equally near scans, the share that is.
        chance: (Q,) the probability that a scan drawn blindly from the gallery is the same patient's.
    """

    query: np.ndarray
    gallery: np.ndarray
    hit: np.ndarray
    chance: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of searches that find their own patient; nan without searches."""
        return float(self.hit.mean()) if len(self.hit) else float("nan")


def cross_modality_retrieval(
    embeddings: ArrayLike, patient: ArrayLike, modality: ArrayLike, *, tolerance: float = 1e-9
) -> Retrieval:
    """Ask of each scan whether its nearest neighbour in each other modality belongs to the same patient.

    A modality is searched only when the patient has a scan in it. Neighbours whose cosine similarity to the query lies
    within `tolerance` of the best count as equally near, so that a collapsed representation scores at chance.
    """
    rows, owner, labels = normalized(embeddings), np.asarray(patient), np.asarray(modality)
    found = []
    for gallery in np.unique(labels):
        members = np.flatnonzero(labels == gallery)
        queries = np.flatnonzero((labels != gallery) & np.isin(owner, owner[members]))
        similarity = rows[queries] @ rows[members].T
        own = owner[queries, None] == owner[None, members]
        nearest = similarity >= similarity.max(axis=1, keepdims=True) - tolerance
        hit = (nearest & own).sum(axis=1) / np.maximum(nearest.sum(axis=1), 1)
        found.append((queries, np.full(len(queries), gallery), hit, own.mean(axis=1)))
    query, searched, hit, chance = (np.concatenate(parts) for parts in zip(*found))
    return Retrieval(query=query, gallery=searched, hit=hit, chance=chance)


def effective_rank(embeddings: ArrayLike) -> float:
    """Return how many directions the normalised rows spread over: exp(entropy of the singular values' shares).

    Between 1 (all rows on one line: collapse) and min(N, D). Roy and Vetterli, EUSIPCO 2007; as a measure of collapse,
    "RankMe", Garrido et al., ICML 2023. Rows are not centred. nan for rows that are not finite.
    """
    rows = normalized(embeddings)
    if not np.isfinite(rows).all():
        return float("nan")
    values = np.linalg.svd(rows, compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def uniformity(embeddings: ArrayLike, *, temperature: float = 2.0) -> float:
    """Return log of the mean of exp(-t |x - y|^2) over pairs of different rows: 0 when all coincide, lower when spread.

    Wang and Isola, ICML 2020, with their t = 2. nan for fewer than two rows.
    """
    rows = normalized(embeddings)
    if len(rows) < 2:
        return float("nan")
    pairs = np.triu_indices(len(rows), k=1)
    squared = 2.0 - 2.0 * (rows @ rows.T)[pairs]
    return float(np.log(np.exp(-temperature * squared).mean()))
