"""The picture of masked image modelling: held-out scans, what the encoder sees of them, and what it guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
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
