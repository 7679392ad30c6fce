"""The pictures of a run: progress.png from its table of figures, reconstruction.png from held-out scans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#e0701a", "#2a9d63", "#7a7f87"
MARKED_UP_TO = 40
"""Points up to which a curve shows each of them."""


@dataclass(frozen=True)
class Curve:
    """A column of the table, and how it looks."""

    column: str
    label: str
    colour: str
    dashed: bool = False  # held-out subjects, where the panel also shows the training's own figure


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis; those whose column is missing are left out, and the panel with the last of them."""

    title: str
    curves: tuple[Curve, ...]
    logarithmic: bool = False
    limits: tuple[float | None, float | None] = (None, None)
    reference: float | None = None  # a line to compare with


def _both(column: str, colour: str, *, training: str = "training", held_out: str = "held out") -> tuple[Curve, Curve]:
    return Curve(column, training, colour), Curve(f"validation/{column}", held_out, colour, dashed=True)


PANELS = (
    Panel("Contrastive loss (InfoNCE)", _both("loss/contrastive", BLUE)),
    Panel("Masked loss", _both("loss/masked", ORANGE)),
    Panel("Masked error / error of predicting the mean", _both("masked/error_over_mean", ORANGE), reference=1.0),
    Panel("Own key found before all negatives, share", _both("contrastive/accuracy", BLUE), limits=(0, 1)),
    Panel(
        "Cosine distance of held-out embeddings",
        (
            Curve("validation/cross_modality_distance", "between a subject's modalities", GREEN),
            Curve("validation/cross_subject_distance", "between subjects", GREY),
        ),
        limits=(0, None),
    ),
    Panel(
        "Directions in use (effective rank)",
        (
            Curve("queue/effective_rank", "keys in the queue", BLUE),
            Curve("validation/effective_rank", "embeddings", GREEN),
        ),
        limits=(0, None),
    ),
    Panel(
        "Gradient norm on the encoder",
        (
            Curve("gradient/contrastive", "contrastive", BLUE),
            Curve("gradient/masked", "masked", ORANGE),
            Curve("gradient/total", "heads included", GREY),
        ),
        logarithmic=True,
    ),
    Panel("Cosine between the branches' gradients", (Curve("gradient/cosine", "", BLUE),), reference=0.0),
    Panel("Learning rate", (Curve("schedule/learning_rate", "", GREY),)),
    Panel("Steps per second", (Curve("speed/steps_per_second", "", GREY),), limits=(0, None)),
    Panel("Waiting for data, share of the time", (Curve("speed/waiting", "", GREY),), limits=(0, 1)),
)

ERROR_BY_MODALITY = "validation/error/"


def progress(table: pd.DataFrame, title: str) -> Figure:
    """Draw the figures of a run over its steps, as far as `table` has them.

    Args:
        table: a row per interval; the column "step" and those named in :data:`PANELS`.
        title: of the page.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in (*PANELS, _errors_by_modality(table)) if _present(panel, table)]
    columns = min(3, max(1, len(panels)))
    rows = math.ceil(len(panels) / columns) or 1
    figure = Figure(figsize=(5.2 * columns, 3.1 * rows + 0.8))
    bottom, top = 0.55 / figure.get_figheight(), 1 - 0.95 / figure.get_figheight()
    left, right = 0.6 / figure.get_figwidth(), 1 - 0.4 / figure.get_figwidth()
    figure.subplots_adjust(left, bottom, right, top, wspace=0.2, hspace=0.42)
    figure.text(left, 1 - 0.42 / figure.get_figheight(), title, fontsize=14, weight="bold")
    for place, panel in enumerate(panels):
        axis = figure.add_subplot(rows, columns, place + 1)
        _draw(axis, panel, table)
        if place + columns >= len(panels):
            axis.set_xlabel("step")
    return figure


def _present(panel: Panel, table: pd.DataFrame) -> list[Curve]:
    return [curve for curve in panel.curves if curve.column in table and table[curve.column].notna().any()]


def _errors_by_modality(table: pd.DataFrame) -> Panel:
    from matplotlib import colormaps

    names = [name for name in table if name.startswith(ERROR_BY_MODALITY)]
    colours = colormaps["tab10"].colors
    curves = [
        Curve(name, name.removeprefix(ERROR_BY_MODALITY), colours[place % len(colours)])
        for place, name in enumerate(names)
    ]
    return Panel("Squared error on hidden voxels, held out", tuple(curves), limits=(0, None))


def _draw(axis: Axes, panel: Panel, table: pd.DataFrame) -> None:
    from matplotlib.ticker import LogLocator

    curves = _present(panel, table)
    if panel.reference is not None:
        axis.axhline(panel.reference, color="black", linewidth=0.8, alpha=0.5)
    for curve in curves:
        points = table[["step", curve.column]].dropna()
        axis.plot(
            points["step"],
            points[curve.column],
            label=curve.label,
            color=curve.colour,
            linestyle="--" if curve.dashed else "-",
            linewidth=1.5,
            marker="o" if len(points) <= MARKED_UP_TO else "",
            markersize=3,
        )
    axis.set_title(panel.title, fontsize=11, loc="left")
    axis.set_xlim(0, max(1, table["step"].max()))
    axis.locator_params(axis="x", nbins=5, integer=True)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    if panel.logarithmic:
        axis.set_yscale("log", nonpositive="mask")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    else:
        axis.ticklabel_format(axis="y", scilimits=(-3, 4))
    if panel.limits != (None, None):
        axis.set_ylim(*panel.limits)
    if any(curve.label for curve in curves):
        axis.legend(fontsize=8, frameon=False, ncols=2 if len(curves) > 4 else 1)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """One slice of a held-out patch, as (height, width) arrays of one intensity scale."""

    modality: str
    whole: np.ndarray
    hidden: np.ndarray  # bool
    prediction: np.ndarray


def reconstructions(examples: Sequence[Reconstruction], title: str) -> Figure:
    """Show, a row for each example: the scan, what the network saw of it, and the scan with its guess filled in."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    grey = colormaps["gray"].with_extremes(bad="#35506b")
    figure = Figure(figsize=(6.6, 2.15 * len(examples) + 0.7), facecolor="white")
    height = figure.get_figheight()
    figure.subplots_adjust(0.05, 0.1 / height, 0.99, 1 - 0.7 / height, wspace=0.03, hspace=0.03)
    figure.text(0.05, 1 - 0.3 / height, title, fontsize=11, weight="bold")
    for row, example in enumerate(examples):
        low, high = np.quantile(example.whole, (0.01, 0.99))
        seen = np.ma.masked_array(example.whole, example.hidden)
        filled = np.where(example.hidden, example.prediction, example.whole)
        for column, image in enumerate((example.whole, seen, filled)):
            axis = figure.add_subplot(len(examples), 3, 3 * row + column + 1)
            axis.imshow(image, cmap=grey, vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(("held-out scan", "what the encoder sees", "completed")[column], fontsize=10)
            if column == 0:
                axis.set_ylabel(example.modality, fontsize=10)
    return figure
