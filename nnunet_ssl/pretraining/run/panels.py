"""What progress.png shows, as data: curves by the columns of a run's table, in panels."""

from __future__ import annotations

from dataclasses import dataclass

BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#e0701a", "#2a9d63", "#7a7f87"


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


def both(column: str, colour: str) -> tuple[Curve, Curve]:
    """The curve of the training's own figure, and the dashed one of the held-out subjects."""
    return Curve(column, "training", colour), Curve(f"validation/{column}", "held out", colour, dashed=True)
