"""The figure of an alignment: where scans lie, by modality and by subject, and how far apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from nnunet_ssl.corpus.modalities import UNKNOWN
from nnunet_ssl.evaluation.embeddings import Embeddings
from nnunet_ssl.evaluation.figures.style import PALETTE, QUIET, colour_of, figure, without_scales
from nnunet_ssl.representation import cosine_distances, normalized

Projection = Literal["pca", "tsne"]
HIGHLIGHTED = 8
SMALLEST_TSNE = 10


def draw_alignment(
    embeddings: Embeddings, result: dict[str, Any], path: Path, *, projection: Projection, title: str
) -> None:
    """Draw four panels: 2-D map by modality, by subject, histogram of distances, and each pair of modalities."""
    places = project(embeddings.vectors, projection)
    with figure(path, (11, 8.4)) as drawing:
        panels = drawing.subplots(2, 2)
        drawing.suptitle(title, fontsize=11)
        _draw_modalities(panels[0, 0], places, embeddings)
        _draw_subjects(panels[0, 1], places, embeddings)
        _draw_distances(panels[1, 0], embeddings, result)
        _draw_pairs(panels[1, 1], result)


def project(vectors: np.ndarray, projection: Projection) -> np.ndarray:
    """Return (N, 2): the first two principal components, or t-SNE under cosine distance (from PCA, seeded).

    Below ten scans t-SNE has no neighbourhoods to keep, and PCA is drawn in its place.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = normalized(vectors)
    if projection == "pca" or len(rows) < SMALLEST_TSNE:
        return PCA(n_components=2, random_state=0).fit_transform(rows)
    perplexity = min(30, (len(rows) - 1) / 3)
    return TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=0).fit_transform(rows)


def _draw_modalities(axes: Axes, places: np.ndarray, embeddings: Embeddings) -> None:
    modality = embeddings.scans["modality"].to_numpy(str)
    names = np.unique(modality)
    for name in names:
        rows = modality == name
        x, y = places[rows].T
        axes.scatter(x, y, s=14, lw=0, alpha=0.8, color=colour_of(name, names), label=f"{name} ({rows.sum()})")
    axes.set_title("Scans by modality")
    axes.legend(markerscale=1.6, handletextpad=0.2, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    without_scales(axes)


def _draw_subjects(axes: Axes, places: np.ndarray, embeddings: Embeddings) -> None:
    """Grey lines join each subject's scans to their centre; the subjects with most scans are coloured."""
    subject = embeddings.scans["patient_id"].to_numpy(str)
    names, counts = np.unique(subject, return_counts=True)
    highlighted = names[np.argsort(-counts, kind="stable")[:HIGHLIGHTED]]
    for name in sorted(names, key=lambda name: name in highlighted):
        mine = places[subject == name]
        front = name in highlighted
        colour = PALETTE[list(highlighted).index(name)] if front else QUIET
        for place in mine:
            axes.plot(*np.stack([place, mine.mean(axis=0)]).T, color=colour, lw=0.9 if front else 0.5, zorder=1 + front)
        x, y = mine.T
        axes.scatter(x, y, s=22 if front else 10, lw=0, color=colour, zorder=2 + front)
    axes.set_title(f"Scans by subject (in colour: the {len(highlighted)} largest of {len(names)})")
    without_scales(axes)


def _draw_distances(axes: Axes, embeddings: Embeddings, result: dict[str, Any]) -> None:
    embeddings = embeddings.where((embeddings.scans["modality"] != UNKNOWN).to_numpy())
    distance = cosine_distances(embeddings.vectors)
    patient = embeddings.scans["patient_id"].to_numpy(str)
    modality = embeddings.scans["modality"].to_numpy(str)
    upper = np.triu(np.ones(distance.shape, dtype=bool), k=1)
    own = patient[:, None] == patient[None, :]
    same = modality[:, None] == modality[None, :]
    kinds = {
        "same subject, different modality": (own & ~same, PALETTE[3]),
        "different subject, same modality": (~own & same, PALETTE[0]),
        "different subject, different modality": (~own & ~same, PALETTE[5]),
    }
    bins = np.linspace(0, max(1e-3, distance[upper].max()), 51)
    for name, (pairs, colour) in kinds.items():
        values = distance[pairs & upper]
        if len(values):
            label = f"{name} ({len(values):,} pairs)"
            counts, _ = np.histogram(values, bins)
            axes.stairs(counts / counts.max(), bins, fill=True, alpha=0.3, color=colour)
            axes.stairs(counts / counts.max(), bins, color=colour, lw=1.3, label=label)
    mean = result["cross_modality"]["mean"]
    axes.axvline(mean, ymax=1 / 1.45, color=PALETTE[3], lw=1, ls="--", label=f"mean over patients, {mean:.4f}")
    axes.set(
        title="Cosine distances between scans", xlabel="1 - cosine similarity", ylabel="pairs, each kind to its peak"
    )
    axes.set(xlim=(-0.01 * bins[-1], bins[-1]), ylim=(0, 1.45), yticks=[0, 0.5, 1])
    axes.legend(loc="upper left")


def _draw_pairs(axes: Axes, result: dict[str, Any]) -> None:
    """Distance within patient below the diagonal, retrieval accuracy above it."""
    names = list(result["n_scans_by_modality"])
    distance, accuracy = np.full((2, len(names), len(names)), np.nan)
    for pair in result["modality_pairs"]:
        i, j = sorted(names.index(name) for name in pair["modalities"])
        distance[j, i], accuracy[i, j] = pair["mean"], pair["retrieval"]
    axes.imshow(distance, cmap="Oranges", vmin=0, vmax=1)
    axes.imshow(accuracy, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(np.where(np.isnan(distance), accuracy, distance)):
        if not np.isnan(value):
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("Pairs of modalities: retrieval accuracy (blue,\nabove), distance within patient (orange, below)")
