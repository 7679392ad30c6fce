"""The figure of gradients over a training: norms by branch, their ratios, and the cosines between them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from nnunet_ssl.evaluation.figures.style import PALETTE, figure
from nnunet_ssl.evaluation.gradients import BranchGradients

LINES = ("-", "--", "-.")
SMOOTHED = 50
"""Longer curves are drawn as running medians over a fiftieth of their rows, the rows themselves faintly behind."""


def draw_gradients(runs: dict[str, BranchGradients], path: Path) -> None:
    """Draw three panels that share the steps. Each run has its colour, each branch or pair of branches its line."""
    with figure(path, (9, 9)) as drawing:
        norms, ratio, cosine = drawing.subplots(3, 1, sharex=True)
        for colour, (name, run) in zip(itertools.cycle(PALETTE), runs.items()):
            for line, (branch, values) in zip(itertools.cycle(LINES), run.norms.items()):
                _draw(norms, values, colour, f"{name}: {branch}", line)
            for line, (pair, values) in zip(itertools.cycle(LINES), run.pairs.items()):
                _draw(ratio, values["ratio"], colour, f"{name}: {pair}", line)
                if (values["ratio"] != values["balanced"]).any():
                    _draw(ratio, values["balanced"], colour, f"{name}: {pair}, after balancing", ":")
                _draw(cosine, values["cosine"], colour, f"{name}: {pair}", line)
        ratio.axhline(1, color="grey", lw=0.8)
        cosine.axhline(0, color="grey", lw=0.8)
        norms.set(title="Norm of each branch's gradient on the encoder", yscale="log")
        ratio.set(title="Norm of one branch over that of another", yscale="log")
        cosine.set(title="Cosine of two branches' gradients", xlabel="step")
        for axes in (norms, ratio, cosine):
            if axes.get_legend_handles_labels()[1]:
                axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw(axes: Axes, values: pd.Series, colour: str, label: str, style: str) -> None:
    curve = values.dropna()
    if curve.empty:
        return
    window = len(curve) // SMOOTHED
    smooth = curve.rolling(window, center=True, min_periods=1).median() if window > 1 else curve
    if window > 1:
        axes.plot(curve.index, curve, color=colour, lw=0.5, alpha=0.25)
    axes.plot(smooth.index, smooth, color=colour, ls=style, lw=1.5, label=label, marker="." if len(curve) < 30 else "")
