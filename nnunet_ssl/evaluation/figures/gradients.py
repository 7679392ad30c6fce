"""The figure of gradients over a training, and by depth: norms by branch, their ratios, the cosines between them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from nnunet_ssl.evaluation.figures.style import PALETTE, figure
from nnunet_ssl.evaluation.gradients import BranchGradients

LINES = ("-", "--", "-.")
SMOOTHED = 50
"""Longer curves are drawn as running medians over a fiftieth of their rows, the rows themselves faintly behind."""


def draw_gradients(runs: dict[str, BranchGradients], path: Path) -> None:
    """Draw three panels that share the steps, and two that share the depths, where runs recorded them. Each run has its
    colour, each branch or pair of branches its line."""
    depths = list(dict.fromkeys(depth for run in runs.values() for depth in run.depths))
    with figure(path, (9, 14 if depths else 9)) as drawing:
        parts = drawing.subfigures(2, 1, height_ratios=[3, 2], squeeze=False)[:, 0] if depths else [drawing]
        if depths:
            _draw_by_depth(parts[1], runs, depths)
        norms, ratio, cosine = parts[0].subplots(3, 1, sharex=True)
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
        _add_legends(norms, ratio, cosine)


def _draw_by_depth(drawing: Figure | SubFigure, runs: dict[str, BranchGradients], depths: list[str]) -> None:
    share, cosine = drawing.subplots(2, 1, sharex=True)
    for colour, (name, run) in zip(itertools.cycle(PALETTE), runs.items()):
        places = [depths.index(depth) for depth in run.depths]
        for line, branch in zip(itertools.cycle(LINES), run.norms):
            shares = [level.shares[branch].median() for level in run.depths.values()]
            share.plot(places, shares, color=colour, ls=line, marker="o", ms=3, label=f"{name}: {branch}")
        for line, pair in zip(itertools.cycle(LINES), run.pairs):
            cosines = [level.pairs[pair]["cosine"].mean() for level in run.depths.values()]
            cosine.plot(places, cosines, color=colour, ls=line, marker="o", ms=3, label=f"{name}: {pair}")
    cosine.axhline(0, color="grey", lw=0.8)
    share.set(title="Share of each branch in the sum of the norms, by depth (median)", ylim=(0, 1))
    cosine.set(title="Cosine of two branches' gradients, by depth (mean)", xlabel="depth, finest first")
    cosine.set_xticks(range(len(depths)), depths, rotation=30 if len(depths) > 6 else 0)
    _add_legends(share, cosine)


def _add_legends(*panels: Axes) -> None:
    for axes in panels:
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
