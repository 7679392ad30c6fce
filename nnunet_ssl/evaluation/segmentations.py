"""Two folders of masks, case by case: find and read them, refuse what does not match, summarise what was measured."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.lesions import CONNECTIVITIES, PRESETS, CaseMetrics, compare_masks
from nnunet_ssl.evaluation.matching import Connectivity
from nnunet_ssl.evaluation.probabilities import find_map, read_map
from nnunet_ssl.evaluation.statistics import mean_interval, rate_interval
from nnunet_ssl.imaging.geometry import Volume, read_volume, same_grid

ENDINGS = (".nii.gz", ".nii")
COUNTS = ("reference_lesions", "predicted_lesions", "found_lesions", "false_lesions", "reference_ml", "predicted_ml")
RATES = ("detected", "correctly_empty")
METRICS = tuple(field.name for field in dataclasses.fields(CaseMetrics) if field.name not in COUNTS)

Case = TypeVar("Case")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LesionConfig:
    """How masks are compared.

    Attributes:
        preset: "isles", "isles26", "atlas" or "fcd": the connectivity, and which metrics are official.
        connectivity: 6, 18 or 26; None takes the preset's.
        label: the label that is the lesion; None takes everything above 0.
        tolerance_mm: of the surface Dice.
    """

    preset: str = "isles"
    connectivity: Connectivity | None = None
    label: int | None = None
    tolerance_mm: float = 1.0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"There is no preset '{self.preset}'. Presets: {', '.join(PRESETS)}.")
        if self.connectivity is not None and self.connectivity not in CONNECTIVITIES:
            raise UserError(f"The connectivity is {self.connectivity}; in three dimensions it is 6, 18 or 26.")
        if self.tolerance_mm < 0:
            raise UserError(f"The tolerance is {self.tolerance_mm} mm; a distance cannot be negative.")

    @property
    def neighbours(self) -> Connectivity:
        """The connectivity that is used."""
        return self.connectivity or PRESETS[self.preset].connectivity


def compare_folders(
    reference: Path,
    predicted: Path,
    config: LesionConfig,
    *,
    maps: Path | None = None,
    subset: bool = False,
    processes: int = 1,
) -> pd.DataFrame:
    """Compare every case of two folders.

    Args:
        reference: folder of reference masks, ``<case>.nii.gz``.
        predicted: folder of predicted masks with the same names.
        maps: folder of their probability maps; None takes nnU-Net's from `predicted`, if they are there.
        subset: compare only the cases that were predicted; otherwise a missing prediction is an error.
        processes: cases at a time.

    Returns:
        One row per case, sorted: ``case`` and the fields of :class:`CaseMetrics`.

    Raises:
        UserError: the folders do not hold the same cases, some cases only have a map, the two masks of a case or its
            map do not lie on the same grid, no mask holds the label, or a reference has voxels to ignore.
    """
    pairs = _with_maps(match_cases(reference, predicted, subset=subset), predicted, maps, config)
    work = partial(_compare_files, config=config, ignored=_ignored_label(reference))
    cases = pd.DataFrame(map_cases(work, pairs, processes, "comparing masks"))
    if config.label is not None and not cases[["reference_lesions", "predicted_lesions"]].any(axis=None):
        raise UserError(
            f"No mask in {reference} or {predicted} holds the label {config.label}: every score would be perfect."
        )
    return cases


def map_cases(work: Callable[[Case], Result], cases: Sequence[Case], processes: int, what: str) -> list[Result]:
    """Return what `work` makes of every case, `processes` at a time, and show how far it is."""
    if processes == 1:
        return [work(case) for case in tqdm(cases, desc=what, disable=None)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(tqdm(pool.map(work, cases), total=len(cases), desc=what, disable=None))


def match_cases(reference: Path, predicted: Path, *, subset: bool = False) -> list[tuple[str, Path, Path]]:
    """Return (case, reference file, predicted file) for every case of both folders.

    Raises:
        UserError: a folder is missing or empty, or a case has only one of the two masks.
    """
    references, predictions = _masks_in(reference), _masks_in(predicted)
    missing = sorted(references.keys() - predictions.keys())
    foreign = sorted(predictions.keys() - references.keys())
    if foreign:
        raise UserError(f"{len(foreign)} masks in {predicted} have no reference in {reference}: {_some(foreign)}.")
    if missing and not subset:
        raise UserError(
            f"{len(missing)} of {len(references)} cases have no prediction in {predicted}: {_some(missing)}. "
            "To compare only the predicted ones, for example one fold's, add --chill."
        )
    return [(case, references[case], predictions[case]) for case in sorted(predictions)]


def scored(cases: pd.DataFrame, metric: str, preset: str) -> pd.Series:
    """Return the values (float) of a metric for the cases it is summarised over, with the index of `cases`.

    Those are the cases where it exists and, with a preset of ``patients_only`` and any metric but specificity, those
    whose reference has a lesion.
    """
    counts = cases[metric].notna()
    if PRESETS[preset].patients_only and metric != "correctly_empty":
        counts &= cases["reference_lesions"] > 0
    return cases.loc[counts, metric].astype(np.float64)


def summarize_cases(cases: pd.DataFrame, config: LesionConfig) -> dict[str, Any]:
    """Summarise a table of cases: of each metric the mean, its 95 % interval over cases, spread, median and number.

    Intervals are bootstrapped; those of the two rates are Wilson's.
    """
    known = {name: scored(cases, name, config.preset).to_numpy() for name in METRICS}
    return {
        "n_cases": len(cases),
        "n_empty_references": int((cases["reference_lesions"] == 0).sum()),
        "preset": config.preset,
        "connectivity": config.neighbours,
        "label": config.label,
        "patients_only": PRESETS[config.preset].patients_only,
        "surface_dice_tolerance_mm": config.tolerance_mm,
        "official": list(PRESETS[config.preset].official),
        "metrics": {
            name: {
                "mean": values.mean() if len(values) else float("nan"),
                "interval": rate_interval(values) if name in RATES else mean_interval(values),
                "std": values.std(ddof=1) if len(values) > 1 else float("nan"),
                "median": np.median(values) if len(values) else float("nan"),
                "n": len(values),
            }
            for name, values in known.items()
        },
        "totals": {name: cases[name].sum() for name in COUNTS},
    }


def _with_maps(
    pairs: list[tuple[str, Path, Path]], predicted: Path, maps: Path | None, config: LesionConfig
) -> list[tuple[str, Path, Path, Path | None]]:
    """Add each case's map where the preset wants them or they were asked for; all cases have one, or none has."""
    if maps is None and "pr_auc" not in PRESETS[config.preset].official:
        return [(*pair, None) for pair in pairs]
    folder = maps or predicted
    images = maps is not None and maps.absolute() != predicted.absolute()
    found = [(*pair, find_map(folder, pair[0], images=images)) for pair in pairs]
    without = [case for case, *_, path in found if path is None]
    if without and (maps is not None or len(without) < len(found)):
        raise UserError(
            f"{len(without)} of {len(found)} cases have no probability map in {folder}: {_some(without)}. "
            "Predict with --save_probabilities, or validate with --npz."
        )
    return found


NAMES = {
    "dice": "Dice",
    "lesion_f1": "lesion-wise F1",
    "lesion_precision": "lesion-wise precision",
    "lesion_recall": "lesion-wise recall",
    "volume_difference_ml": "volume difference (ml)",
    "count_difference": "lesion count difference",
    "hd95_mm": "HD95 (mm)",
    "surface_dice": "surface Dice",
    "recognition_quality": "F1 of matches (RQ)",
    "matched_dice": "Dice, 0 without match",
    "pr_auc": "PR-AUC",
    "detected": "detection rate",
    "correctly_empty": "specificity",
}


def describe_lesions(summary: dict[str, Any]) -> str:
    """Write a summary as the few lines that the command prints; official metrics of the preset come first."""
    lines = [
        f"{summary['n_cases']} cases ({summary['n_empty_references']} without a lesion), preset {summary['preset']}, "
        f"connectivity {summary['connectivity']}; mean [95 % interval], median, number of cases"
    ]
    if summary["patients_only"] and summary["n_empty_references"]:
        lines.append("all but specificity over the cases with a lesion")
    official = summary["official"]
    for name in [*official, *(name for name in METRICS if name not in official)]:
        entry = summary["metrics"][name]
        if entry["n"]:
            low, high = entry["interval"]
            star = "*" if name in official else " "
            lines.append(
                f"{star} {NAMES[name]:<24} {entry['mean']:8.4f}  [{low:.4f}, {high:.4f}]  "
                f"{entry['median']:8.4f}  {entry['n']}"
            )
    if "pr_auc" in official and not summary["metrics"]["pr_auc"]["n"]:
        lines.append(
            "no PR-AUC: there are no probability maps. Predict with --save_probabilities (validate with --npz)"
        )
    return "\n".join(lines)


def _masks_in(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    masks: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        end = next((end for end in ENDINGS if path.name.endswith(end)), None)
        if end is None or path.name.startswith("."):
            continue
        if other := masks.get(path.name.removesuffix(end)):
            raise UserError(f"{path} and {other.name} are masks of one case: remove one of them.")
        masks[path.name.removesuffix(end)] = path
    if not masks:
        raise UserError(f"{folder} holds no mask: no file ends in {' or '.join(ENDINGS)}.")
    return masks


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _ignored_label(reference: Path) -> int | None:
    """What the data set calls ignore, if its dataset.json lies beside the folder of its masks, where nnU-Net has it.

    Raises:
        UserError: the file is no data set's.
    """
    description = reference.absolute().parent / "dataset.json"
    if not description.is_file():
        return None
    try:
        ignored: int | None = json.loads(description.read_text())["labels"].get("ignore")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{description} has no labels that nnU-Net could read: mend it, or move it away.") from error
    return ignored


def _compare_files(
    pair: tuple[str, Path, Path, Path | None], config: LesionConfig, ignored: int | None
) -> dict[str, Any]:
    case, reference_path, predicted_path, map_path = pair
    reference, predicted = read_volume(reference_path), read_volume(predicted_path)
    if ignored is not None and (reference.array == ignored).any():
        raise UserError(
            f"{reference_path} has voxels to ignore (label {ignored}), which would count as lesion or as background: "
            "nnUNetv2_evaluate_folder leaves them out."
        )
    if not same_grid(reference, predicted):
        raise UserError(
            f"The masks of {case} do not lie on the same grid. {reference_path}: {_geometry(reference)}. "
            f"{predicted_path}: {_geometry(predicted)}. Predict on, or resample to, the reference's grid."
        )
    lesion = _lesion(predicted, config.label)
    metrics = compare_masks(
        _lesion(reference, config.label),
        lesion,
        spacing=reference.spacing,
        connectivity=config.neighbours,
        tolerance_mm=config.tolerance_mm,
        probabilities=None if map_path is None else _fitting_map(map_path, predicted, lesion, config.label),
    )
    return {"case": case, **dataclasses.asdict(metrics)}


def _fitting_map(path: Path, predicted: Volume, lesion: np.ndarray, label: int | None) -> np.ndarray:
    """Read a map and make sure that it belongs to its mask: it is higher inside than outside.

    Raises:
        UserError: it is not, as where the map is mirrored or another case's.
    """
    values = read_map(path, predicted, label)
    if lesion.any() and not lesion.all() and values[lesion].mean() <= values[~lesion].mean():
        raise UserError(f"{path} is no higher inside the predicted mask than outside: it is another prediction's.")
    return values


def _lesion(volume: Volume, label: int | None) -> np.ndarray:
    return volume.array > 0 if label is None else volume.array == label


def _geometry(volume: Volume) -> str:
    shape = " x ".join(map(str, volume.array.shape))
    spacing = " x ".join(f"{size:.3g}" for size in volume.spacing)
    origin = ", ".join(f"{place:.1f}" for place in volume.affine[:3, 3])
    return f"{shape} voxels of {spacing} mm, {volume.orientation}, first voxel at ({origin})"
