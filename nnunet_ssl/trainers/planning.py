"""nnU-Net plans with the geometry of pre-training: RAS, 1 mm, patches of 96^3 (arXiv 2511.11311, fine-tuning recipe).

Stock nnU-Net looks normalisation schemes up in its own package, in prediction as well, so the plans name one of its
own: a z-score within the non-zero voxels. Pre-training clips to the 0.5-99.5 percentiles before; that is the one
difference.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, preprocess_dataset
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import CONFIGURATION, PLANS_NAME, dataset_folder, dataset_id

SPACING = (1.0, 1.0, 1.0)
PATCH_SIZE = (96, 96, 96)
BATCH_SIZE = 8  # 4 volumes x 2 patches

logger = logging.getLogger(__name__)


class PretrainingPlanner(ExperimentPlanner):
    """nnU-Net's planner for one fixed geometry.

    The network in the plans is nnU-Net's own, with the six stages of a pre-trained residual encoder: its coarsest map
    is 3^3, as in pre-training. Stock trainers use it; those of this package follow the checkpoint's backbone.
    """

    def __init__(self, dataset_name: str) -> None:
        super().__init__(dataset_name, plans_name=PLANS_NAME, overwrite_target_spacing=SPACING, suppress_transpose=True)
        self.UNet_featuremap_min_edge_length = 3
        self.UNet_vram_target_GB = 1000  # do not shrink the patch
        self.lowres_creation_threshold = 0

    def determine_reader_writer(self) -> type[NibabelIOWithReorient]:
        if self.dataset_json["file_ending"] not in NibabelIOWithReorient.supported_file_endings:
            raise UserError(
                f"{self.dataset_name} has {self.dataset_json['file_ending']} files; pre-training's orientation (RAS) "
                f"is read from {' or '.join(NibabelIOWithReorient.supported_file_endings)} only."
            )
        return NibabelIOWithReorient

    def generate_data_identifier(self, configuration_name: str) -> str:
        return f"{self.plans_identifier}_{configuration_name}"

    def get_plans_for_configuration(self, spacing: Sequence[float], median_shape: Any, *args: Any) -> dict[str, Any]:
        if len(spacing) == 2:
            return {}
        plan = super().get_plans_for_configuration(spacing, PATCH_SIZE, *args)
        channels = len(plan["normalization_schemes"])
        return plan | {
            "median_image_size_in_voxels": median_shape,
            "batch_size": BATCH_SIZE,
            "normalization_schemes": ["ZScoreNormalization"] * channels,
            "use_mask_for_norm": [True] * channels,
        }

    def save_plans(self, plans: dict[str, Any]) -> None:
        del plans["configurations"]["2d"]
        super().save_plans(plans)


def plan_and_preprocess(dataset: str, processes: int) -> None:
    """Write ``nnUNetSSLPlans.json`` for a data set in nnU-Net's raw format and preprocess its training cases by it.

    Args:
        dataset: id or name.
        processes: cases at a time.

    Raises:
        UserError: there is no such data set, or its files are not NIfTI.
    """
    name = dataset_folder(dataset, "nnUNet_raw").name
    identifier = dataset_id(name)
    extract_fingerprint_dataset(identifier, num_processes=processes, clean=False)
    planner = PretrainingPlanner(name)
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints the plans, and a 2-D configuration we do not have
        planner.plan_experiment()
    preprocess_dataset(identifier, PLANS_NAME, [CONFIGURATION], [processes])
    logger.info(
        "%s: %s at 1 mm, patches of 96^3. Next: nnUNetv2_train %d %s 0 -tr nnUNetTrainerMCLMIM -p %s",
        name, PLANS_NAME, identifier, CONFIGURATION, PLANS_NAME,
    )  # fmt: skip
