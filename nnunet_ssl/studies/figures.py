"""The figures of a study: sample efficiency, arms by data set or modality, means with intervals, branches by depth."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nnunet_ssl.evaluation.figures.style import PALETTE, QUIET, figure
from nnunet_ssl.evaluation.gradients import ENCODER, PARTS
from nnunet_ssl.evaluation.segmentations import NAMES
from nnunet_ssl.studies.study import Experiment, Study

MARKERS = ("o", "s", "^")
"""Of the arms up to the palette's length, of as many beyond, and so on."""
ACROSS = 4
"""Panels side by side."""


def draw_fractions(study: Study, experiment: Experiment, summary: pd.DataFrame, path: Path) -> None:
    """Draw the first metric against the share of the training subjects, with intervals; published figures dashed."""
    metric = experiment.metrics[0]
    panels = _panels(study, experiment, summary)
    with figure(path, (5.2 * len(panels) + 1.6, 4.4)) as drawing:
        for axes, (dataset, part) in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels):
            rows = _rows(summary, dataset=dataset, part=part, metric=metric)
            for place, arm in enumerate(experiment.arms):
                curve = rows[rows["arm"] == arm].sort_values("fraction")
                nudge = (place - (len(experiment.arms) - 1) / 2) * 0.8
                repeat, place_of_colour = divmod(place, len(PALETTE))
                colour, marker = PALETTE[place_of_colour], MARKERS[repeat % len(MARKERS)]
                style = {"color": colour, "marker": marker, "ms": 4, "lw": 1.5, "elinewidth": 0.7}
                axes.errorbar(
                    curve["fraction"] + nudge, curve["mean"], _reach(curve), label=study.arms[arm].label, **style
                )
                _draw_published(axes, experiment, dataset, arm, colour)
            axes.set_xticks(sorted(experiment.fractions))
            axes.set(title=_title(study, dataset, part), xlabel="training subjects (%)", ylabel=NAMES[metric])
        axes.legend(
            loc="upper left", bbox_to_anchor=(1, 1), title="dashed: published" if experiment.published else None
        )


def draw_heat_map(means: pd.DataFrame, path: Path, title: str) -> None:
    """Draw a table of means, with labels, as a heat map; colour: the difference from the first row."""
    values = means.to_numpy()
    change = values - values[0]
    reach = max(0.01, np.nanmax(np.abs(change), initial=0.0))
    with figure(path, (1.5 * values.shape[1] + 2.6, 0.5 * values.shape[0] + 1.6)) as drawing:
        axes = drawing.subplots()
        image = axes.imshow(change, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            dark = abs(change[row, column]) > 0.7 * reach
            text = "-" if np.isnan(value) else f"{value:.3f}"
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(values.shape[1]), [label.replace(" ", "\n", 1) for label in means.columns])
        axes.set_yticks(range(values.shape[0]), list(means.index))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(title)
        drawing.colorbar(image, label=f"difference from {means.index[0]}")


def draw_intervals(table: pd.DataFrame, path: Path, *, reference: float | None = None) -> None:
    """Draw means, or differences of means, with their intervals: a panel for each thing measured, a line for each row.

    Args:
        table: ``panel``, ``row``, ``mean``, ``low`` and ``high``; NaN where there is no interval.
        path: of the figure.
        reference: where the grey line is; None for the mean of a panel's first row.
    """
    panels, rows = (list(dict.fromkeys(table[column])) for column in ("panel", "row"))
    height = -(-len(panels) // ACROSS)
    with figure(path, (2.4 * min(len(panels), ACROSS) + 2.4, height * (0.26 * len(rows) + 0.9))) as drawing:
        grid = drawing.subplots(height, min(len(panels), ACROSS), sharey=True, squeeze=False)
        for axes, panel in itertools.zip_longest(grid.flat, panels):
            if panel is None:
                axes.set_visible(False)
                continue
            own = table[table["panel"] == panel]
            places = [rows.index(row) for row in own["row"]]
            axes.axvline(own["mean"].iloc[0] if reference is None else reference, color=QUIET, lw=0.8)
            axes.errorbar(own["mean"], places, xerr=_reach(own), fmt="o", ms=4, elinewidth=1, color=PALETTE[0])
            axes.locator_params(axis="x", nbins=4)
            axes.set_title("\n".join(textwrap.wrap(panel.replace("_", " "), 30)), fontsize=8)
        grid[0, 0].set_yticks(range(len(rows)), rows)
        grid[0, 0].invert_yaxis()


def draw_dominance(labels: Mapping[str, str], gradients: pd.DataFrame, path: Path) -> None:
    """Draw, over the whole training and by depth, how branches' gradients compare in size and in direction.

    Args:
        labels: of the arms, by name.
        gradients: rows of :func:`nnunet_ssl.evaluation.gradients.summarise_seeds` with their arm.
        path: of the figure.
    """
    whole = _rows(gradients, part=PARTS[0])
    pairs, depths = (list(dict.fromkeys(whole[column])) for column in ("pair", "depth"))
    arms = [arm for arm in labels if arm in set(whole["arm"])]
    with figure(path, (4.2 * len(pairs) + 2.6, 6)) as drawing:
        grid = drawing.subplots(2, len(pairs), sharex=True, squeeze=False)
        for column, pair in zip(grid.T, pairs):
            for place, arm in enumerate(arms):
                nudge = (place - (len(arms) - 1) / 2) * 0.6 / len(arms)
                style = {"color": PALETTE[place % len(PALETTE)], "fmt": "o", "ms": 4, "elinewidth": 1}
                for axes, quantity in zip(column, ("ratio", "cosine")):
                    own = _rows(whole, pair=pair, arm=arm, quantity=quantity)
                    places = [depths.index(depth) + nudge for depth in own["depth"]]
                    axes.errorbar(places, own["mean"], _reach(own), label=labels[arm], **style)
            column[0].axhline(1, color="grey", lw=0.8)
            column[1].axhline(0, color="grey", lw=0.8)
            column[0].set(title=f"norm of {pair.replace('/', ' over ')}", yscale="log")
            column[1].set(title="cosine between them", xlabel="and by depth, finest first")
            column[1].set_xticks(
                range(len(depths)), ["whole encoder" if depth == ENCODER else depth for depth in depths]
            )
        grid[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))


def _reach(table: pd.DataFrame) -> np.ndarray:
    """How far intervals go below and above their means: (2, rows), as matplotlib wants it."""
    return np.abs(table[["low", "high"]].to_numpy().T - table["mean"].to_numpy())


def _draw_published(axes: Axes, experiment: Experiment, dataset: str, arm: str, colour: str) -> None:
    if experiment.published is None or arm not in experiment.published.values:
        return
    figures = dict(zip(experiment.columns, experiment.published.values[arm]))
    fractions = sorted(experiment.fractions)
    axes.plot(fractions, [figures[dataset, fraction] for fraction in fractions], color=colour, ls="--", lw=1, alpha=0.6)


def _panels(study: Study, experiment: Experiment, summary: pd.DataFrame) -> list[tuple[str, str]]:
    """(data set, part), in the experiment's order, of what is there."""
    present = set(zip(summary["dataset"], summary["part"]))
    return [
        pair for name in experiment.datasets for part in study.datasets[name].parts if (pair := (name, part)) in present
    ]


def _rows(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def _title(study: Study, dataset: str, part: str) -> str:
    return study.datasets[dataset].label + {"validation": "", "test": " (test set)"}.get(part, f" ({part})")
