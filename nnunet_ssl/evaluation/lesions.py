"""How well a predicted lesion mask agrees with its reference: voxels, lesions, volumes and surfaces of one case.

Lesions are counted in two ways. In the ISLES'22 and ATLAS R2.0 challenges, which differ in connectivity only, a
reference lesion is found when at least one of its voxels is predicted, and a predicted lesion is false when it touches
no reference voxel. In ISLES'26 lesions match one to one (see `matching`). What a ratio means when a mask is empty is
settled once, for all of them: both masks empty, 1; exactly one, 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from nnunet_ssl.evaluation.matching import Connectivity, Overlaps, count_matches, find_overlaps
from nnunet_ssl.evaluation.probabilities import pr_auc

CONNECTIVITIES = get_args(Connectivity)
MATCHING_IOU = 0.25  # ISLES'26: its eval_utils.py of 2026-07-24


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a challenge or a publication counts as one lesion, and which metrics it reports.

    Attributes:
        connectivity: of voxels that are one lesion.
        official: the metrics it reports. ATLAS R2.0 counts the volume difference in voxels; here it is in ml always.
        constant_map_when_empty: it scores the probability map, and wants a constant one where nothing is segmented.
        patients_only: every metric but specificity is summarised over the cases that have a lesion. Otherwise a
            healthy control in which nothing is found scores a Dice of 1, and the mean says how many controls there are.
    """

    connectivity: Connectivity
    official: tuple[str, ...]
    constant_map_when_empty: bool = False
    patients_only: bool = False


_CHALLENGE = ("dice", "volume_difference_ml", "count_difference", "lesion_f1")
PRESETS = {
    "isles": Preset(connectivity=26, official=_CHALLENGE),
    "isles26": Preset(
        connectivity=26,
        official=("matched_dice", "recognition_quality", "count_difference", "volume_difference_ml", "pr_auc"),
        constant_map_when_empty=True,
    ),
    "atlas": Preset(connectivity=6, official=_CHALLENGE),
    "fcd": Preset(connectivity=26, official=("dice", "lesion_f1", "detected", "correctly_empty"), patients_only=True),
}


@dataclass(frozen=True, kw_only=True)
class CaseMetrics:
    """The agreement of one case; nan where a quantity does not exist.

    Attributes:
        dice: 2 |A and B| / (|A| + |B|) over voxels.
        lesion_f1: TP / (TP + (FP + FN) / 2), with TP and FN reference lesions and FP predicted ones.
        lesion_precision: TP / (TP + FP).
        lesion_recall: TP / (TP + FN).
        volume_difference_ml: absolute difference of the volumes.
        count_difference: absolute difference of the numbers of lesions.
        hd95_mm: the larger of the two directed 95th percentiles of the distance between surfaces; both masks empty, 0;
            exactly one, nan.
        surface_dice: share of both surfaces that lies within a tolerance of the other.
        recognition_quality: F1 of lesions that match one to one with an intersection over union of at least 0.25.
        matched_dice: what ISLES'26 calls Dice: `dice` if any lesions match so, else 0 (both masks empty, 1).
        pr_auc: area under the voxels' precision-recall curve; nan without a probability map.
        detected: 1 if at least one lesion is found, else 0; nan when there is none to find. Its mean over cases is the
            detection rate.
        correctly_empty: 1 if nothing is predicted where nothing is, 0 if something is; nan when the reference has a
            lesion. Its mean over cases is the specificity.
        reference_lesions, predicted_lesions, found_lesions, false_lesions: counts.
        reference_ml, predicted_ml: volumes.
    """

    dice: float
    lesion_f1: float
    lesion_precision: float
    lesion_recall: float
    volume_difference_ml: float
    count_difference: int
    hd95_mm: float
    surface_dice: float
    recognition_quality: float
    matched_dice: float
    pr_auc: float
    detected: float
    correctly_empty: float
    reference_lesions: int
    predicted_lesions: int
    found_lesions: int
    false_lesions: int
    reference_ml: float
    predicted_ml: float


def compare_masks(
    reference: np.ndarray,
    predicted: np.ndarray,
    *,
    spacing: Sequence[float],
    connectivity: Connectivity = 26,
    tolerance_mm: float = 1.0,
    probabilities: np.ndarray | None = None,
) -> CaseMetrics:
    """Compare a predicted mask with its reference.

    Args:
        reference: bool (X, Y, Z).
        predicted: bool, the same shape.
        spacing: voxel size in mm, in the order of the axes.
        connectivity: 6, 18 or 26 neighbours make one lesion.
        tolerance_mm: for the surface Dice.
        probabilities: float, the same shape: how likely each voxel is lesion.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != predicted.shape:
        raise ValueError(f"The masks have different shapes: {reference.shape} and {predicted.shape}.")
    overlaps = find_overlaps(reference, predicted, connectivity)
    hd95, surface_dice = compare_surfaces(reference, predicted, spacing, tolerance_mm)
    return CaseMetrics(
        **compare_lesions(overlaps, float(np.prod(spacing)) / 1000),
        hd95_mm=hd95,
        surface_dice=surface_dice,
        pr_auc=float("nan") if probabilities is None else pr_auc(reference, probabilities),
    )


def compare_lesions(overlaps: Overlaps, voxel_ml: float) -> dict[str, Any]:
    """Return the fields of :class:`CaseMetrics` that follow from the lesions' sizes and what they share."""
    n_reference, n_predicted = len(overlaps.reference), len(overlaps.predicted)
    voxels = [int(sizes.sum()) for sizes in (overlaps.reference, overlaps.predicted)]
    reference_ml, predicted_ml = (count * voxel_ml for count in voxels)
    found, matched = overlaps.found, count_matches(overlaps, MATCHING_IOU)
    false, missed = n_predicted - overlaps.supported, n_reference - found
    voxel_dice = _ratio(2 * int(overlaps.shared.sum()), sum(voxels))
    return {
        "dice": voxel_dice,
        "lesion_f1": _ratio(found, found + (false + missed) / 2),
        "lesion_precision": _ratio(found, found + false, empty=float(n_reference == 0)),
        "lesion_recall": _ratio(found, n_reference, empty=float(n_predicted == 0)),
        "volume_difference_ml": abs(reference_ml - predicted_ml),
        "count_difference": abs(n_reference - n_predicted),
        "recognition_quality": _ratio(2 * matched, n_reference + n_predicted),
        "matched_dice": voxel_dice if matched or not n_reference + n_predicted else 0.0,
        "detected": float(found > 0) if n_reference else float("nan"),
        "correctly_empty": float("nan") if n_reference else float(n_predicted == 0),
        "reference_lesions": n_reference,
        "predicted_lesions": n_predicted,
        "found_lesions": found,
        "false_lesions": false,
        "reference_ml": reference_ml,
        "predicted_ml": predicted_ml,
    }


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Dice coefficient of two boolean masks; both empty, 1."""
    shared, *sizes = (int(np.count_nonzero(mask)) for mask in (first & second, first, second))
    return _ratio(2 * shared, sum(sizes))


def compare_surfaces(
    reference: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], tolerance_mm: float
) -> tuple[float, float]:
    """Return HD95 in mm and the surface Dice, both by MONAI.

    MONAI takes HD95 between the centres of the voxels at the surface, and the surface Dice over the area of surface
    elements between voxels, as Nikolov et al. (arXiv 1809.04430) define it.
    """
    if not reference.any() or not predicted.any():
        both_empty = not reference.any() and not predicted.any()
        return (0.0, 1.0) if both_empty else (float("nan"), 0.0)
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    ours, theirs = (torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (predicted, reference))
    voxel = [float(size) for size in spacing]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 warns of an argument that it passes itself
        hd95 = compute_hausdorff_distance(ours, theirs, include_background=True, percentile=95, spacing=voxel)
        surface = compute_surface_dice(
            ours, theirs, [tolerance_mm], include_background=True, spacing=voxel, use_subvoxels=True
        )
    return float(hd95), float(surface)


def _ratio(part: float, whole: float, *, empty: float = 1.0) -> float:
    return float(part / whole) if whole else empty
