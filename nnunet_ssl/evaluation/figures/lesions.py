"""The figure of a segmentation: every case's scores, its volumes, and which lesions are missed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nnunet_ssl.evaluation.figures.style import PALETTE, figure
from nnunet_ssl.evaluation.segmentations import RATES, scored

RATIOS = {
    "dice": "Dice",
    "lesion_f1": "lesion F1",
    "lesion_precision": "lesion\nprecision",
    "lesion_recall": "lesion\nrecall",
    "surface_dice": "surface\nDice",
    "detected": "detection\nrate",
    "correctly_empty": "specificity",
}
OFFICIAL_RATIOS = {"matched_dice": "Dice, 0\nunmatched", "recognition_quality": "RQ", "pr_auc": "PR-AUC"}


def draw_lesions(cases: pd.DataFrame, summary: dict[str, Any], path: Path, *, title: str) -> None:
    """Draw four panels: scores, predicted against reference volume, Dice against volume, and HD95."""
    with figure(path, (11, 8)) as drawing:
        panels = drawing.subplots(2, 2, width_ratios=[1.35, 1])
        drawing.suptitle(f"{title}\n{summary['n_cases']} cases, connectivity {summary['connectivity']}", fontsize=10)
        _draw_scores(panels[0, 0], cases, summary)
        _draw_volumes(panels[0, 1], cases)
        _draw_dice_by_volume(panels[1, 0], cases)
        _draw_hd95(panels[1, 1], cases)


def _draw_scores(axes: Axes, cases: pd.DataFrame, summary: dict[str, Any]) -> None:
    """Each case a dot (rates have none: they are shares of cases), the mean a diamond on its 95 % interval."""
    rng = np.random.default_rng(0)
    ratios = RATIOS | {name: title for name, title in OFFICIAL_RATIOS.items() if name in summary["official"]}
    for place, name in enumerate(ratios):
        entry = summary["metrics"][name]
        values = scored(cases, name, summary["preset"]).to_numpy()
        if name not in RATES:
            axes.scatter(place + rng.uniform(-0.28, 0.28, len(values)), values, s=9, lw=0, alpha=0.45, color=PALETTE[5])
        if entry["n"]:
            low, high = entry["interval"]
            axes.plot([place, place], [low, high], color="black", lw=2.2, solid_capstyle="butt")
            axes.scatter(place, entry["mean"], marker="D", s=34, color=PALETTE[3], edgecolor="black", lw=0.8, zorder=3)
            axes.text(place + 0.1, entry["mean"], f" {entry['mean']:.3f}", va="center", fontsize=8)
        else:
            axes.text(place, 0.5, "n/a", ha="center", va="center", color="grey")
    axes.set_xticks(range(len(ratios)), ratios.values(), fontsize=8)
    axes.set(title="Scores: cases, mean and 95 % interval", ylim=(-0.03, 1.03), xlim=(-0.5, len(ratios) - 0.3))


def _draw_volumes(axes: Axes, cases: pd.DataFrame) -> None:
    reference, predicted = cases["reference_ml"].to_numpy(float), cases["predicted_ml"].to_numpy(float)
    linear = _power_below(np.concatenate([reference, predicted]))
    top = max(reference.max(), predicted.max(), linear) * 1.6
    axes.plot([0, top], [0, top], color="grey", lw=0.8)
    axes.scatter(reference, predicted, s=16, lw=0, alpha=0.7, color=PALETTE[0])
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("symlog", linthresh=linear, linscale=0.5)
    axes.set(xlim=(-0.1 * linear, top), ylim=(-0.1 * linear, top), aspect="equal")
    axes.set(title="Volume", xlabel="reference (ml)", ylabel="predicted (ml)")


def _draw_dice_by_volume(axes: Axes, cases: pd.DataFrame) -> None:
    with_lesion = cases[cases["reference_lesions"] > 0]
    for found, colour, name in ((1.0, PALETTE[0], "a lesion found"), (0.0, PALETTE[3], "no lesion found")):
        rows = with_lesion[with_lesion["detected"] == found]
        axes.scatter(
            rows["reference_ml"], rows["dice"], s=16, lw=0, alpha=0.7, color=colour, label=f"{name} ({len(rows)} cases)"
        )
    if len(with_lesion):
        axes.set_xscale("log")
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.0))
    axes.set(title="Dice by lesion volume", xlabel="reference (ml)", ylabel="Dice", ylim=(-0.03, 1.22))
    axes.set_yticks(np.linspace(0, 1, 6))


def _draw_hd95(axes: Axes, cases: pd.DataFrame) -> None:
    """The share of cases within a distance; cases without a distance keep the curve below 1."""
    known = np.sort(cases["hd95_mm"].dropna().to_numpy(float))
    shares = np.arange(1, len(known) + 1) / len(cases)
    axes.step(np.append(0, known), np.append(0, shares), where="post", color=PALETTE[2], lw=1.6)
    undefined = len(cases) - len(known)
    axes.set(title="HD95", xlabel="HD95 at most (mm)", ylabel="share of cases", ylim=(0, 1.03))
    axes.set_xlim(left=0)
    if undefined:
        note = f"{undefined} cases have none: one mask is empty"
        axes.text(0.98, 0.04, note, transform=axes.transAxes, ha="right", fontsize=8, color="grey")


def _power_below(volumes: np.ndarray) -> float:
    """The power of ten that is no larger than any volume but 0."""
    positive = volumes[volumes > 0]
    return 10.0 ** math.floor(math.log10(positive.min())) if len(positive) else 1.0
