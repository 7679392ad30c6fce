"""The picture of a run, progress.png, from its table of figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd

from nnunet_ssl.pretraining.gradients import COSINE, PREFIX, branch_names
from nnunet_ssl.pretraining.objectives import known
from nnunet_ssl.pretraining.run.panels import BLUE, GREEN, GREY, ORANGE, Curve, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKED_UP_TO = 40
"""Points up to which a curve shows each of them."""

COMMON = (
    Panel(
        "Cosine distance of held-out embeddings",
        (
            Curve("validation/cross_modality_distance", "between a subject's modalities", GREEN),
            Curve("validation/cross_subject_distance", "between subjects", GREY),
        ),
        limits=(0, None),
    ),
    Panel("Learning rate", (Curve("schedule/learning_rate", "", GREY),)),
    Panel("Steps per second", (Curve("speed/steps_per_second", "", GREY),), limits=(0, None)),
    Panel("Waiting for data, share of the time", (Curve("speed/waiting", "", GREY),), limits=(0, 1)),
)
"""What every run shows, whatever it learns."""

ERROR_BY_MODALITY = "validation/error/"


def progress(table: pd.DataFrame, title: str) -> Figure:
    """Draw the figures of a run over its steps, as far as `table` has them.

    Args:
        table: a row per interval; the column "step" and those that the panels of objectives, or :data:`COMMON`, name.
        title: of the page.
    """
    from matplotlib.figure import Figure

    of_objectives = dict.fromkeys(panel for objective in known() for panel in objective.panels)
    everything = (*of_objectives, *_gradients(table), *COMMON, _errors_by_modality(table))
    panels = [panel for panel in everything if _present(panel, table)]
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


def _gradients(table: pd.DataFrame) -> tuple[Panel, Panel]:
    """The norms of all branches' gradients, and the cosines between them."""
    norms = [Curve(f"{PREFIX}{name}", name, colour) for name, colour in zip(branch_names(table), _colours())]
    cosines = [name for name in table if name.startswith(COSINE)]
    labels = [name.removeprefix(COSINE).strip("/") for name in cosines]
    return (
        Panel(
            "Gradient norm on the encoder",
            (*norms, Curve(f"{PREFIX}total", "heads included", GREY)),
            logarithmic=True,
        ),
        Panel(
            "Cosine between the branches' gradients",
            tuple(Curve(*one) for one in zip(cosines, labels, _colours())),
            reference=0.0,
        ),
    )


def _errors_by_modality(table: pd.DataFrame) -> Panel:
    names = [name for name in table if name.startswith(ERROR_BY_MODALITY)]
    curves = [Curve(name, name.removeprefix(ERROR_BY_MODALITY), colour) for name, colour in zip(names, _colours())]
    return Panel("Squared error on hidden voxels, held out", tuple(curves), limits=(0, None))


def _colours() -> Iterator[str]:
    """Blue and orange first, as the objectives have them, then others, without end."""
    from matplotlib import color_sequences
    from matplotlib.colors import to_hex

    return itertools.cycle((BLUE, ORANGE, *(to_hex(one) for one in color_sequences["tab10"][2:])))


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
