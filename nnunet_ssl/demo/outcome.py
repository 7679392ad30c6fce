"""What the demo shows at its end: a table of what was measured, and a figure with slices and loss curves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nnunet_ssl.evaluation.figures.style import PALETTE, figure, without_scales

SHOWN_CASES = 4
COLUMNS = ("image", "truth", "prediction")

_LOSS = re.compile(r"(train_loss|val_loss) (-?[\d.]+|nan)")


def describe_demo(work: Path) -> str:
    """The table of metrics, as text."""
    lesions, alignment = _result(work, "lesions"), _result(work, "alignment")
    cases = pd.DataFrame(lesions["cases"])[["case", "reference_ml", "predicted_ml", "dice", "lesion_f1"]]
    cases.columns = ["held-out case", "lesion (ml)", "predicted (ml)", "Dice", "lesion-wise F1"]
    dice, apart = lesions["metrics"]["dice"], alignment["cross_subject"]
    return (
        f"{cases.to_string(index=False, float_format=lambda value: f'{value:.2f}')}\n\n"
        f"mean Dice on {lesions['n_cases']} held-out cases  {dice['mean']:.3f}  "
        f"[{dice['interval'][0]:.3f}, {dice['interval'][1]:.3f}]\n"
        f"cross-modality distance  {alignment['cross_modality']['mean']:.4f}  between one subject's modalities\n"
        f"cross-subject distance   {apart['mean']:.4f}  between subjects: well above the line before, no collapse"
    )


def draw(work: Path, path: Path) -> None:
    """Draw some held-out cases (image, truth, prediction; axial, at the lesion's largest extent) and the losses."""
    lesions = _result(work, "lesions")
    cases = sorted(lesions["cases"], key=lambda case: -case["reference_ml"])[:SHOWN_CASES]
    with figure(path, (9.5, 1.9 * len(cases) + 2.8)) as drawing:
        slices, curves = drawing.subfigures(2, 1, squeeze=False, height_ratios=[1.9 * len(cases), 2.8])[:, 0]
        slices.suptitle("Held-out cases (synthetic brains)", fontsize=11)
        rows = slices.subplots(len(cases), len(COLUMNS), squeeze=False)
        for axes, case in zip(rows, cases):
            _draw_case(axes, work, case)
        for axis, title in zip(rows[0], COLUMNS):
            axis.set_title(title)
        pretraining, finetuning = curves.subplots(1, 2)
        _draw_pretraining(pretraining, work / "nnUNet_results" / "Dataset500_FOMO60K" / "mcl_mim" / "progress.csv")
        _draw_finetuning(finetuning, work / "nnUNet_results" / "Dataset501_ATLASv2")


def _result(work: Path, name: str) -> dict[str, Any]:
    return json.loads((work / "evaluation" / f"{name}.json").read_text())


def _draw_case(axes: np.ndarray, work: Path, case: dict[str, Any]) -> None:
    images = work / "nnUNet_raw" / "Dataset501_ATLASv2" / "imagesTs"
    paths = (images / f"{case['case']}_0000.nii.gz", work / "truth", work / "predictions")
    image, truth, prediction = (
        nib.as_closest_canonical(nib.load(path if path.suffix else path / f"{case['case']}.nii.gz")).get_fdata()
        for path in paths
    )
    middle = int(truth.sum(axis=(0, 1)).argmax())
    low, high = np.percentile(image[image > 0], [1, 99])
    for axis, mask, colour in zip(axes, (None, truth, prediction), (None, PALETTE[2], PALETTE[3])):
        axis.imshow(image[:, :, middle].T, cmap="gray", origin="lower", vmin=low, vmax=high)
        if mask is not None and mask[:, :, middle].any():
            axis.contour(mask[:, :, middle].T, [0.5], colors=[colour], linewidths=1.2)
        without_scales(axis)
    axes[0].set_ylabel(f"{case['case']}\n{case['reference_ml']:.0f} ml", fontsize=8)
    axes[-1].set_xlabel(f"Dice {case['dice']:.2f}", fontsize=8)


def _draw_pretraining(axes: Axes, path: Path) -> None:
    """Three figures over what guessing would give, so that all read alike: what is below 1 has been learnt.

    The contrastive loss itself rises while its queue fills, for there are more keys to tell apart.
    """
    table = pd.read_csv(path)
    distances = [f"validation/cross_{between}_distance" for between in ("modality", "subject")]
    if set(distances) <= set(table):  # a single subject is held out of a very small corpus, and has no distance
        table["apart"] = table[distances[0]] / table[distances[1]]
    axes.axhline(1, color="black", linewidth=0.8, alpha=0.5)
    for name, label, colour in (
        ("masked/error_over_mean", "masked loss", PALETTE[1]),
        ("contrastive/loss_over_guessing", "contrastive loss", PALETTE[0]),
        ("apart", "held out: distance of a subject's modalities\n/ distance of subjects", PALETTE[2]),
    ):
        if name not in table:
            continue
        curve = table[["step", name]].dropna()
        axes.plot(curve["step"], curve[name], label=label, color=colour, marker=".")
    axes.set(title="Pre-training: below 1 is learnt", xlabel="step", ylabel="share of what guessing gives")
    axes.set_ylim(0, None)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.42))


def _draw_finetuning(axes: Axes, results: Path) -> None:
    """nnU-Net's losses, read from the logs of the newest training, which may have been interrupted."""
    newest = max(results.rglob("training_log_*.txt"), key=lambda path: path.stat().st_mtime)
    logs = sorted(newest.parent.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime)
    losses: dict[str, list[float]] = {"train_loss": [], "val_loss": []}
    for log in logs:
        for name, value in _LOSS.findall(log.read_text()):
            losses[name].append(float(value))
    for (name, values), colour in zip(losses.items(), PALETTE):
        axes.plot(range(1, len(values) + 1), values, label=name.replace("_", " "), color=colour, marker=".")
    axes.set(title="Fine-tuning in nnU-Net", xlabel="epoch", ylabel="loss (Dice + cross entropy)")
    axes.legend()
