"""What a model loses when channels are missing: every subset of channels on held-out cases, beside its specialist."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.segmentations import NAMES, LesionConfig, compare_folders, scored
from nnunet_ssl.evaluation.statistics import holm, mean_interval, paired_wilcoxon
from nnunet_ssl.interface.placeholders import Channels, PartialCase, find_cases
from nnunet_ssl.interface.segmentation import (
    channels_of_model,
    check_processes,
    load_predictor,
    predict_cases,
    refuse_missing,
)

logger = logging.getLogger(__name__)

METRICS = {"dice": 1, "lesion_f1": 1, "volume_difference_ml": -1}
"""What is measured, and whether more of it is better (1) or worse (-1)."""

SPECIALIST = "specialist"
"""The arm of the models that were trained on just the channels of a subset."""


@dataclass(frozen=True)
class Model:
    """A trained model that is measured.

    Attributes:
        arm: its name in tables; models of one arm (seeds) are averaged case by case.
        folder: of nnU-Net's model.
    """

    arm: str
    folder: Path


def subsets_of(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty subset of the channels, in their order, the small ones first."""
    return [subset for size in range(1, len(names) + 1) for subset in itertools.combinations(names, size)]


def predict_subsets(
    models: Sequence[Model],
    specialists: Sequence[Path],
    images: Path,
    output: Path,
    *,
    device: torch.device,
    folds: Sequence[str] | None = None,
    processes: tuple[int, int] = (0, 0),
    **options: Any,
) -> list[tuple[str, tuple[str, ...], Path]]:
    """Predict cases by each model from each subset of the channels, and by each specialist from its own.

    A case takes part in a subset if it has all of its channels. Predictions that are there already, of the same weights
    and images, are kept.

    Args:
        models: all of the same channels.
        specialists: folders of models for some of these channels, which may come in another order.
        images: ``CASE_0000.nii.gz`` and so on, in the order of the models' channels.
        output: gets a folder for each model and subset.
        device: where to predict.
        folds: to average; None for those that are finished.
        processes: for preprocessing and for export; both 0: none but this one.
        options: of nnU-Net's predictor.

    Returns:
        (arm, subset, folder of predictions).

    Raises:
        UserError: models differ in their channels or want all of them, or a specialist has other channels.
    """
    check_processes(*processes)
    channels = _common_channels(models)
    cases = find_cases(images, channels)
    subsets = subsets_of(channels.names)
    how = (images, folds, options, [_stamp(file) for case in cases for file in case.files if file])
    done = []
    for model in models:
        predictor = load_predictor(model.folder, folds, device, **options)
        for subset in subsets:
            folder = output / f"{model.arm}_{_digest(model.folder, *how)}" / "+".join(subset)
            chosen = _cases_of(cases, channels, subset)
            refuse_missing(predictor, chosen, channels)
            _predict(predictor, chosen, channels, folder, processes)
            done.append((model.arm, subset, folder))
    for place in specialists:
        own = channels_of_model(place)
        subset = tuple(name for name in channels.names if name in own.names)
        if len(subset) != len(own.names):
            raise UserError(
                f"{place} is a model of the channels {', '.join(own.names)}, which are not all among those of the "
                f"others ({', '.join(channels.names)})."
            )
        folder = output / f"{SPECIALIST}_{_digest(place, *how)}" / "+".join(subset)
        order = [channels.names.index(name) for name in own.names]
        chosen = [
            PartialCase(case.id, tuple(case.files[channel] for channel in order))
            for case in _cases_of(cases, channels, subset)
        ]
        _predict(load_predictor(place, folds, device, **options), chosen, own, folder, processes)
        done.append((SPECIALIST, subset, folder))
    return done


def measure_missing(
    predictions: Sequence[tuple[str, tuple[str, ...], Path]], reference: Path, config: LesionConfig, processes: int = 1
) -> pd.DataFrame:
    """Compare predictions with their references.

    Returns:
        one row for each arm, subset and case, seeds averaged: ``arm``, ``subset`` (``DWI+ADC``), ``case``,
        ``n_channels`` of the subset, and what :func:`segmentations.compare_folders` measures.
    """
    tables = []
    for arm, subset, folder in predictions:
        table = compare_folders(reference, folder, config, subset=True, processes=processes)
        tables.append(table.assign(arm=arm, subset="+".join(subset), n_channels=len(subset)))
    return pd.concat(tables).groupby(["arm", "subset", "case"], sort=False, as_index=False).mean()


def summarize_missing(cases: pd.DataFrame, config: LesionConfig) -> dict[str, Any]:
    """Summarise a table of :func:`measure_missing`.

    Returns:
        JSON-able: ``arms``, ``subsets``, and for each arm and subset of each metric the mean with its 95 % interval
        over cases (bootstrap) and their number; beside a specialist also the ``loss``, by how much the specialist is
        better on the same cases, with its interval: positive where the arm is worse, for volume differences as well.
        ``comparisons``: see :func:`compare_arms`.
    """
    table: dict[str, dict[str, Any]] = {}
    for (arm, subset), rows in cases.groupby(["arm", "subset"], sort=False):
        rival = cases[(cases["arm"] == SPECIALIST) & (cases["subset"] == subset)]
        cell = {name: _summary_of(rows, rival if arm != SPECIALIST else rival[:0], name, config) for name in METRICS}
        table.setdefault(arm, {})[subset] = cell
    return {
        "arms": list(table),
        "subsets": list(dict.fromkeys(cases["subset"])),
        "preset": config.preset,
        "results": table,
        "comparisons": compare_arms(cases, config),
    }


def compare_arms(cases: pd.DataFrame, config: LesionConfig) -> list[dict[str, Any]]:
    """Compare the first arm with each of the others by Dice, for every number of channels.

    Subsets of one size are averaged within a case, so that cases are the independent pairs.

    Returns:
        for each other arm and number of channels ``arm``, ``against``, ``n_channels``, ``n`` cases, the mean
        ``difference``, positive where the first arm is better, with its 95 % ``interval``, and ``p`` of Wilcoxon's
        signed-rank test, ``p_holm`` corrected over all of them.
    """
    arms = [arm for arm in dict.fromkeys(cases["arm"]) if arm != SPECIALIST]
    rows = []
    for other in arms[1:]:
        for size in sorted(set(cases["n_channels"])):
            of_size = cases[cases["n_channels"] == size]
            first, second = (
                scored(of_size[of_size["arm"] == arm].set_index("case"), "dice", config.preset).groupby(level=0).mean()
                for arm in (arms[0], other)
            )
            pairs = pd.concat([first, second], axis=1, join="inner").dropna().to_numpy()
            if not len(pairs):
                continue
            differences = pairs[:, 0] - pairs[:, 1]
            rows.append(
                {"arm": arms[0], "against": other, "n_channels": int(size), "n": len(pairs)}
                | {"difference": float(differences.mean()), "interval": mean_interval(differences)}
                | {"p": paired_wilcoxon(*pairs.T)}
            )
    corrected = holm([row["p"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, corrected)]


def describe_missing(result: Mapping[str, Any]) -> str:
    """Write a summary as the lines that the command prints."""
    lines = []
    for metric in METRICS:
        lines.append(f"{NAMES[metric]}: mean [95 % interval]; loss against the specialist [95 % interval]; cases")
        for subset in result["subsets"]:
            for arm in result["arms"]:
                cell = result["results"][arm].get(subset, {}).get(metric)
                if not cell or not cell["n"]:
                    continue
                low, high = cell["interval"]
                line = f"  {subset:<20} {arm:<16} {cell['mean']:8.4f}  [{low:.4f}, {high:.4f}]"
                if "loss" in cell:
                    low, high = cell["loss_interval"]
                    line += f"  {cell['loss']:+8.4f}  [{low:+.4f}, {high:+.4f}]"
                lines.append(f"{line}  {cell['n']}")
    return "\n".join(lines + _describe_comparisons(result["comparisons"]))


def _describe_comparisons(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    if not comparisons:
        return []
    lines = [f"Dice of {comparisons[0]['arm']} less that of others: mean [95 % interval]; p, after Holm's correction"]
    for row in comparisons:
        low, high = row["interval"]
        channels = f"{row['n_channels']} channel{'s' if row['n_channels'] > 1 else ''}"
        lines.append(
            f"  {channels:<20} {row['against']:<16} {row['difference']:+8.4f}  [{low:+.4f}, {high:+.4f}]"
            f"  {row['p']:.2g}  {row['p_holm']:.2g}"
        )
    return lines


def _summary_of(rows: pd.DataFrame, rival: pd.DataFrame, metric: str, config: LesionConfig) -> dict[str, Any]:
    values = scored(rows.set_index("case"), metric, config.preset)
    summary = {"mean": float(values.mean()), "interval": mean_interval(values), "n": len(values)}
    if len(rival):
        other = scored(rival.set_index("case"), metric, config.preset)
        losses = METRICS[metric] * (other - values).dropna()
        summary |= {"loss": float(losses.mean()), "loss_interval": mean_interval(losses)}
    return summary


def _common_channels(models: Sequence[Model]) -> Channels:
    channels = [channels_of_model(model.folder) for model in models]
    for model, own in zip(models, channels):
        if own.names != channels[0].names:
            raise UserError(
                f"{model.folder} is a model of the channels {', '.join(own.names)}, and {models[0].folder} of "
                f"{', '.join(channels[0].names)}: compare models of one data set."
            )
    return channels[0]


def _cases_of(cases: Sequence[PartialCase], channels: Channels, subset: Sequence[str]) -> list[PartialCase]:
    """The cases that have all channels of a subset, with those alone."""
    there = [name in subset for name in channels.names]
    kept = [
        PartialCase(case.id, tuple(file if wanted else None for file, wanted in zip(case.files, there)))
        for case in cases
        if not set(subset) & set(case.missing(channels))
    ]
    if not kept:
        raise UserError(f"No case has all of the channels {', '.join(subset)}.")
    return kept


def _digest(model: Path, *what: Any) -> str:
    """Return a word for a model's weights and what is done with them, so that no other's predictions are taken."""
    files = [_stamp(file) for file in sorted(model.glob("fold_*/checkpoint_final.pth"))]
    return hashlib.sha256(repr((files, *what)).encode()).hexdigest()[:8]


def _stamp(file: Path) -> tuple[str, int, int]:
    """What changes when a file does."""
    about = file.stat()
    return str(file.resolve()), about.st_size, about.st_mtime_ns


def _predict(
    predictor: Any, cases: Sequence[PartialCase], channels: Channels, folder: Path, processes: tuple[int, int]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("%s: %d cases", folder, len(cases))
    predict_cases(predictor, cases, channels, folder, processes, overwrite=False)
