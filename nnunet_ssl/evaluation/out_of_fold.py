"""What a model said of the cases that it was not trained on: the probabilities of its folds' validation cases.

``nnUNetv2_train --npz`` (or ``--val --npz`` afterwards) leaves them in ``fold_X/validation``. Each case is there once,
by the fold that did not train on it; ``fold_all`` has no such cases. The maps of several models are averaged, as
``nnUNetv2_ensemble`` does.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.probabilities import belongs_to, read_map
from nnunet_ssl.evaluation.results import read_table
from nnunet_ssl.evaluation.segmentations import match_cases
from nnunet_ssl.imaging.geometry import Volume, read_volume, same_grid
from nnunet_ssl.nnunet_folders import dataset_folder

VALIDATION = "validation"
UNMIRRORED = "validation_unmirrored"
SUBJECT = "subject"
COLUMNS = {"centre": "group", "cohort": "group"}
"""What a report calls them."""

_SUBJECT = re.compile(r"(sub-[a-zA-Z0-9]+)(_|$)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HeldOutCase:
    """A case, and what models said of it that were not trained on it.

    Attributes:
        case: its name.
        unit: what it belongs to, subject or centre; units are independent of each other.
        reference: the file of its true mask.
        folders: of each model, where the map and the mask of that name lie.
    """

    case: str
    unit: str
    reference: Path
    folders: tuple[Path, ...]


def find_held_out(
    models: Sequence[Path], reference: Path, *, by: str = SUBJECT, report: Path | None = None, where: str = VALIDATION
) -> list[HeldOutCase]:
    """Find the cases that all the models' folds held out.

    Args:
        models: nnU-Net's folders of trained models.
        reference: folder of the true masks.
        by: "subject", as the cases' names tell (``sub-...``; any other name is a subject of its own), or what the
            conversion's report tells: "centre", "cohort", or the name of a column.
        report: that report.
        where: the folder within each fold.

    Raises:
        UserError: a case is missing in a model or a map in a case, or is in two folds; or the units can't be told.
    """
    found = [_cases_of(model, reference, where) for model in models]
    everything = set().union(*found)
    for model, cases in zip(models, found):
        lost = sorted(everything - cases.keys())
        if lost:
            raise UserError(f"{model} did not hold out {len(lost)} cases that other models did, such as {lost[0]}.")
    units = _units(sorted(everything), by, report)
    return [
        HeldOutCase(
            case=case,
            unit=units[case],
            reference=found[0][case][0],
            folders=tuple(cases[case][1] for cases in found),
        )
        for case in sorted(everything)
    ]


def folder_of_choice(models: Sequence[Path], folder: Path | None) -> Path:
    """Return where what is learned from models is kept: the named folder, else that of the only model.

    Raises:
        UserError: there are several models and no folder.
    """
    if folder is None and len(models) > 1:
        raise UserError("What is learned for several models belongs to none of them: name a folder for it with -o.")
    return folder or models[0]


def reference_of(model: Path) -> Path:
    """Return where nnU-Net keeps the true masks of the data set that a model was trained on."""
    return dataset_folder(model.absolute().parent.name, "nnUNet_preprocessed") / "gt_segmentations"


def report_of(model: Path) -> Path | None:
    """Return the report of the data set's conversion, if this package converted it."""
    try:
        report = dataset_folder(model.absolute().parent.name, "nnUNet_raw") / "conversion" / "report.tsv"
    except UserError:
        return None
    return report if report.is_file() else None


def only_label(models: Sequence[Path]) -> int:
    """Return the label of the lesion, the only one of the models' data set.

    Raises:
        UserError: it is no model's folder; or there are others, so that a threshold of one does not say what the
            others are.
    """
    description = models[0] / "dataset.json"
    if not description.is_file():
        raise UserError(
            f"{models[0]} is no folder of a model that nnU-Net trained: it has no {description.name}. Give "
            "$nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION."
        )
    labels = json.loads(description.read_text())["labels"]
    others = [value for value in labels.values() if value not in (0, [0])]
    if len(others) != 1:
        raise UserError(f"{models[0]} has the labels {', '.join(labels)}; needed is the background and one lesion.")
    return others[0] if isinstance(others[0], int) else others[0][0]


def read_case(held_out: HeldOutCase) -> tuple[Volume, np.ndarray]:
    """Return the true mask (bool), and the lesion's probability on its grid, float32, averaged over the models.

    Raises:
        UserError: a map can't be read, is not the predicted mask's, or does not lie on the grid of the true mask.
    """
    reference = read_volume(held_out.reference)
    maps = []
    for folder in held_out.folders:
        mask = read_volume(folder / held_out.reference.name)
        if not same_grid(mask, reference):
            raise UserError(f"{folder / held_out.reference.name} does not lie on the grid of {held_out.reference}.")
        values = read_map(folder / f"{held_out.case}.npz", mask, None)
        if not belongs_to(values, mask.array > 0):
            raise UserError(
                f"{folder / held_out.case}.npz and {held_out.reference.name} beside it are not of one prediction: "
                "nnUNetv2_train ... --val --npz writes both again."
            )
        maps.append(values)
    mean = maps[0] if len(maps) == 1 else np.asarray(np.mean(maps, axis=0, dtype=np.float32))
    return reference.with_array(reference.array > 0), mean


def _cases_of(model: Path, reference: Path, where: str) -> dict[str, tuple[Path, Path]]:
    """Return each held-out case of a model: the file of its true mask, and the folder of its map."""
    folds = [path for path in sorted(model.glob(f"fold_*/{where}")) if path.parent.name != "fold_all"]
    if not folds:
        raise UserError(f"{model} has no fold_*/{where}: train its folds, with --npz.")
    cases: dict[str, tuple[Path, Path]] = {}
    for fold in folds:
        for case, truth, _ in match_cases(reference, fold, subset=True):
            if case in cases:
                raise UserError(
                    f"{case} was held out by {cases[case][1]} and by {fold}: each case belongs to one fold."
                )
            if not (fold / f"{case}.npz").is_file():
                raise UserError(
                    f"{fold} has no probabilities of {case}: nnUNetv2_train ... --val --npz writes them for a fold."
                )
            cases[case] = (truth, fold)
    return cases


def _units(cases: Sequence[str], by: str, report: Path | None) -> dict[str, str]:
    if by == SUBJECT:
        return {case: match[1] if (match := _SUBJECT.match(case)) else case for case in cases}
    if report is None:
        raise UserError(f"Only a report of this package's conversions tells the {by} of a case; there is none.")
    table = read_table(report, sep="\t", dtype=str).set_index("case")
    column = COLUMNS.get(by, by)
    if column not in table:
        raise UserError(f"{report} has no column {column}; it has {', '.join(table.columns)}.")
    told = table[column].dropna()
    missing = [case for case in cases if case not in told.index]
    if missing:
        raise UserError(f"{report} does not tell the {by} of {len(missing)} cases, such as {missing[0]}.")
    return {case: told[case] for case in cases}
