"""The figure of missing channels: subsets by arms, and how far each lies behind the specialist of its subset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ssl.evaluation.figures.style import figure
from nnunet_ssl.evaluation.missing import METRICS
from nnunet_ssl.evaluation.segmentations import NAMES


def draw_missing(result: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each metric: the mean of arms (columns) by subsets (rows); colour: the loss.

    Without a specialist the loss is against the best arm of the row.
    """
    arms, subsets = result["arms"], result["subsets"]
    size = (len(METRICS) * (0.9 * len(arms) + 1.5) + 0.9, 0.34 * len(subsets) + 1.4)
    with figure(path, size) as drawing:
        panels = drawing.subplots(1, len(METRICS), sharey=True)
        for axes, (metric, better) in zip(panels, METRICS.items()):
            cells = [[result["results"][arm].get(subset, {}).get(metric, {}) for arm in arms] for subset in subsets]
            values = np.array([[cell.get("mean", np.nan) for cell in row] for row in cells], dtype=float)
            losses = np.array([[cell.get("loss", np.nan) for cell in row] for row in cells], dtype=float)
            best = np.nanmax(better * values, axis=1, keepdims=True, initial=-np.inf)
            shown = np.where(np.isnan(losses).all(), best - better * values, losses)
            reach = max(1e-6, float(np.nanmax(np.abs(shown), initial=0.0)))
            axes.imshow(shown, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
            for (row, column), value in np.ndenumerate(values):
                dark = abs(shown[row, column]) > 0.7 * reach
                text = "-" if np.isnan(value) else f"{value:.2f}"
                axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
            axes.set_xticks(range(len(arms)), arms, rotation=30, ha="right")
            axes.set_yticks(range(len(subsets)), subsets)
            axes.set_title(NAMES[metric])
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
