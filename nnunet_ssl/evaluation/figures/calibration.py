"""The figure of a calibration: what probabilities are worth, before and after, and true against predicted volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from nnunet_ssl.evaluation.calibration import CaseCounts, volume_interval
from nnunet_ssl.evaluation.figures.style import PALETTE, figure


def draw_calibration(counts: Sequence[CaseCounts], result: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Draw two panels: the reliability diagram, and volumes with the interval's reach."""
    with figure(path, (10, 4.8)) as drawing:
        left, right = drawing.subplots(1, 2)
        drawing.suptitle(f"{title}, {result['n_cases']} held-out cases", fontsize=10)
        _draw_reliability(left, result)
        _draw_volumes(right, counts, result["volume"])


def _draw_reliability(axes: Axes, result: Mapping[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8)
    names = {"before": "as predicted", "after": f"calibrated (temperature {result['temperature']:.2f})"}
    for (when, name), colour in zip(names.items(), (PALETTE[3], PALETTE[0])):
        rows = result["reliability"][when]
        shown = [[row[key] for row in rows] for key in ("predicted", "observed")]
        error = result["calibration_error"][when]
        axes.plot(*shown, marker="o", ms=4, color=colour, label=f"{name}, error {error:.3f}")
    axes.legend(loc="upper left")
    axes.set(title="Reliability of voxels", xlabel="predicted probability", ylabel="share that is lesion")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")


def _draw_volumes(axes: Axes, counts: Sequence[CaseCounts], volume: Mapping[str, Any]) -> None:
    predicted, true = (np.array([getattr(case, name) for case in counts]) for name in ("predicted_ml", "true_ml"))
    top = max(predicted.max(), true.max(), volume["offset_ml"]) * 1.5
    line = np.geomspace(volume["offset_ml"] / 10, top, 100)
    low, high = zip(*(volume_interval(value, volume["reach"]) for value in line))
    axes.fill_between(line, low, high, color=PALETTE[5], alpha=0.25, lw=0)
    axes.plot(line, line, color="grey", lw=0.8)
    axes.scatter(predicted, true, s=14, lw=0, alpha=0.7, color=PALETTE[0])
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("symlog", linthresh=volume["offset_ml"], linscale=0.5)
    axes.set(title=f"Volumes, and intervals that hold {volume['coverage_promised']:.0%}")
    axes.set(xlabel="predicted (ml)", ylabel="reference (ml)", xlim=(0, top), ylim=(0, top))
