"""The figure of what carries across modalities: learnt from the modality of a row, predicted in that of a column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ssl.evaluation.figures.style import figure

PERFECT = {"mean absolute error": 0.0, "R2": 1.0, "balanced accuracy": 1.0, "ROC AUC": 1.0}


def draw_across(summary: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Draw a heat map for each score, with intervals over subjects: white is what a model without images scores (or
    worse), the darkest blue is perfect."""
    matrix, scores = summary["across"], list(summary["scores"])
    trained = list(matrix)
    tested = sorted({name for cells in matrix.values() for name in cells})
    size = (len(scores) * (1.05 * len(tested) + 1.3), 0.62 * len(trained) + 1.7)
    with figure(path, size) as drawing:
        panels = drawing.subplots(1, len(scores), squeeze=False)[0]
        drawing.suptitle(f"{title}: {summary['target']}, {summary['n_subjects']} subjects", fontsize=11)
        for axes, name in zip(panels, scores):
            gains = np.array([[_gain(matrix[row][column], name) for column in tested] for row in trained])
            axes.imshow(gains, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (row, column), gain in np.ndenumerate(gains):
                cell = matrix[trained[row]][tested[column]]
                score, (low, high) = cell["scores"][name], cell["intervals"][name]
                text = "-" if np.isnan(score) else f"{score:.2f}\n[{low:.2f}, {high:.2f}]"
                colour = "white" if gain > 0.6 else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
            axes.set_xticks(range(len(tested)), tested)
            axes.set_yticks(range(len(trained)), trained)
            axes.set(title=f"{name[0].upper()}{name[1:]}", xlabel="predicted in", ylabel="learnt from")
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)


def _gain(cell: Mapping[str, Any], name: str) -> float:
    """Return how much of the way from a model without images to a perfect one a score goes; nan where there is none, as
    among scans of a single class."""
    nothing = cell["without_images"][name]
    way = PERFECT[name] - nothing
    return float((cell["scores"][name] - nothing) / way) if way else np.nan
