"""The figure of gradients over a training: norms by branch, their ratio, and the cosine between them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from nnunet_ssl.evaluation.figures.style import PALETTE, figure
from nnunet_ssl.evaluation.gradients import CONTRASTIVE, COSINE, MASKED

SMOOTHED = 50
"""Longer curves are drawn as running medians over a fiftieth of their rows, the rows themselves faintly behind."""


def draw_gradients(runs: dict[str, pd.DataFrame], path: Path) -> None:
    """Draw three panels that share the steps; each run has its colour."""
    with figure(path, (9, 9)) as drawing:
        norms, ratio, cosine = drawing.subplots(3, 1, sharex=True)
        for place, (name, table) in enumerate(runs.items()):
            colour = PALETTE[place % len(PALETTE)]
            _draw(norms, table, CONTRASTIVE, colour, f"{name}: contrastive", "-")
            _draw(norms, table, MASKED, colour, f"{name}: masked", "--")
            _draw(ratio, table, "ratio", colour, name, "-")
            if (table["ratio"] != table["balanced"]).any():
                _draw(ratio, table, "balanced", colour, f"{name}: after balancing", ":")
            _draw(cosine, table, COSINE, colour, name, "-")
        ratio.axhline(1, color="grey", lw=0.8)
        cosine.axhline(0, color="grey", lw=0.8)
        norms.set(title="Norm of each branch's gradient on the encoder", yscale="log")
        ratio.set(title="Contrastive norm over masked norm", yscale="log")
        cosine.set(title="Cosine of the two gradients", xlabel="step")
        for axes in (norms, ratio, cosine):
            if axes.get_legend_handles_labels()[1]:
                axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw(axes: Axes, table: pd.DataFrame, column: str, colour: str, label: str, style: str) -> None:
    curve = table[["step", column]].dropna()
    if curve.empty:
        return
    window = len(curve) // SMOOTHED
    smooth = curve[column].rolling(window, center=True, min_periods=1).median() if window > 1 else curve[column]
    if window > 1:
        axes.plot(curve["step"], curve[column], color=colour, lw=0.5, alpha=0.25)
    axes.plot(curve["step"], smooth, color=colour, ls=style, lw=1.5, label=label, marker="." if len(curve) < 30 else "")
