"""The options of a preparation, and the nnU-Net plans file that holds a store to them for its life."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nnunet_ssl.corpus.naming import StoreNames
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside
from nnunet_ssl.nnunet_folders import CONFIGURATION, PLANS_NAME


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """What is done to the scans.

    Attributes:
        spacing: voxel size in mm, in nnU-Net's order of axes for RAS images: superior, anterior, right.
        dtype: float16 halves the bytes. It costs at most 2^-11 of a standard deviation up to |z| = 2, 2^-10 up to 4.
        patch_size: the crops that chunks and blocks of the files are chosen for, in voxels.
        skull_strip: None, or "hd-bet" to strip the sessions that are not stripped yet.
        register: None, or "rigid" to register the scans of a session that do not agree, or lie on another grid.
        stripped: datasets known to be stripped, not_stripped: known not to be; the others are judged by their images.
    """

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    dtype: Literal["float16", "float32"] = "float16"
    patch_size: tuple[int, int, int] = (96, 96, 96)
    skull_strip: Literal["hd-bet"] | None = None
    register: Literal["rigid"] | None = None
    stripped: tuple[str, ...] = ()
    not_stripped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not min(self.spacing) > 0:
            raise UserError(f"The voxel size must be positive, not {self.spacing} mm.")
        both = set(self.stripped) & set(self.not_stripped)
        if both:
            raise UserError(f"Said to be stripped and not to be stripped: {', '.join(sorted(both))}.")

    def is_stripped(self, dataset: str) -> bool | None:
        """What was said of a data set; None if nothing was."""
        return True if dataset in self.stripped else False if dataset in self.not_stripped else None


def make_plans(dataset_name: str, config: PreparationConfig, plans_name: str = PLANS_NAME) -> dict[str, Any]:
    """Write the options as an nnU-Net plans file; ``preprocessing`` is what checkpoints carry on."""
    return {
        "dataset_name": dataset_name,
        "plans_name": plans_name,
        "original_median_spacing_after_transp": list(config.spacing),
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "nnssl_prepare",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {
            CONFIGURATION: {
                "data_identifier": f"{plans_name}_{CONFIGURATION}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(config.patch_size),
                "spacing": list(config.spacing),
                "normalization_schemes": ["PercentileZScoreNormalization"],
                "use_mask_for_norm": [True],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
                "resampling_fn_seg": "resample_torch_fornnunet",
                "resampling_fn_seg_kwargs": {"is_seg": True, "num_threads": 1},
                "batch_dice": False,
                "architecture": {},
            }
        },
        "preprocessing": {
            "orientation": "RAS",
            "axes": ["superior", "anterior", "right"],
            "spacing": list(config.spacing),
            "normalization": "clip to the 0.5-99.5 percentiles of the foreground, z-score inside it, zero outside",
            "crop": "union of the foregrounds of a session",
            "skull_strip": config.skull_strip,
            "dtype": config.dtype,
            **({"register": config.register} if config.register else {}),  # stores without it were begun before
        },
    }


def settle_plans(names: StoreNames, plans: dict[str, Any]) -> dict[str, Any]:
    """Write the plans of a new store; for a begun one make sure that they are the same.

    Raises:
        UserError: the store was begun with other options.
    """
    if not names.is_begun:
        with written_beside(names.plans) as temporary:
            temporary.write_text(json.dumps(plans, indent=4))
        return plans
    begun = json.loads(names.plans.read_text())
    if begun == plans:
        return plans
    differences = [f"{name}: {old} there, {new} now" for name, old, new in _differences(begun, plans)]
    raise UserError(
        f"The store in {names.folder} was begun with other options ({'; '.join(differences)}). Call with the "
        "same ones, or remove that folder, or index the corpus under another id."
    )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _differences(old.get(key), new.get(key), key)
    elif old != new:
        yield name, old, new
