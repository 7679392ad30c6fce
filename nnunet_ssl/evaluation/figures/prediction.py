"""The figure of a prediction: what was predicted of scans never seen, and how well in each modality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from sklearn.metrics import confusion_matrix

from nnunet_ssl.evaluation.figures.style import PALETTE, colour_of, figure
from nnunet_ssl.evaluation.scan_prediction import Prediction


def draw_prediction(result: Prediction, path: Path, *, title: str) -> None:
    """Draw two panels: truth against prediction, and the first score by modality beside that of all scans."""
    summary, predictions = result.summary, result.predictions
    with figure(path, (10, 4.6)) as drawing:
        left, right = drawing.subplots(1, 2)
        drawing.suptitle(f"{title}: {summary['target']}, {summary['n_subjects']} subjects", fontsize=11)
        if summary["task"] == "regression":
            _draw_values(left, predictions, summary["target"])
        else:
            _draw_confusion(left, predictions, list(summary["classes"]))
        _draw_modalities(right, summary)


def _draw_values(axes: Axes, predictions: pd.DataFrame, target: str) -> None:
    names = np.unique(predictions["modality"].to_numpy(str))
    for name in names:
        rows = predictions[predictions["modality"] == name]
        axes.scatter(rows["truth"], rows["predicted"], s=14, lw=0, alpha=0.7, color=colour_of(name, names), label=name)
    ends = [predictions["truth"].min(), predictions["truth"].max()]
    axes.plot(ends, ends, color="grey", lw=0.8)
    axes.legend(markerscale=1.6, handletextpad=0.2)
    axes.set(title="Scans of subjects never seen", xlabel=target, ylabel=f"predicted {target}")


def _draw_confusion(axes: Axes, predictions: pd.DataFrame, classes: list[str]) -> None:
    shares = confusion_matrix(predictions["truth"], predictions["predicted"], labels=classes, normalize="true")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(shares):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(title="Scans of subjects never seen", xlabel="predicted", ylabel="truth (rows sum to 1)")


def _draw_modalities(axes: Axes, summary: dict[str, Any]) -> None:
    name, entry = next(iter(summary["scores"].items()))
    modalities = {key: one["scores"][name] for key, one in summary["by_modality"].items()}
    colours = [colour_of(key, modalities) for key in modalities]
    axes.bar(range(len(modalities)), list(modalities.values()), color=colours)
    place = len(modalities)
    axes.plot([place, place], entry["interval"], color="black", lw=2.2, solid_capstyle="butt")
    axes.scatter(place, entry["value"], marker="D", s=34, color=PALETTE[3], edgecolor="black", lw=0.8, zorder=3)
    axes.axhline(entry["baseline"], color="grey", lw=1, ls="--")
    axes.text(place + 0.45, entry["baseline"], "without images", ha="right", va="bottom", fontsize=8, color="grey")
    axes.set_xticks(range(place + 1), [*modalities, "all"])
    axes.set(title=f"{name[0].upper()}{name[1:]}", xlim=(-0.5, place + 0.5))
