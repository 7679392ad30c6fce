"""Folders of models as nnU-Net leaves them, with a network of two stages and random weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [2, 2, 2]],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


def plans(reader: str = "NibabelIOWithReorient", channels: int = 1) -> dict:
    """nnU-Net's plans for images of 2 mm in patches of 16 voxels."""
    return {
        "dataset_name": "Dataset709_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 2.0, 2.0],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": reader,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): {} for channel in range(channels)},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": [16, 16, 16],
                "median_image_size_in_voxels": [20, 20, 20],
                "spacing": [2.0, 2.0, 2.0],
                "normalization_schemes": ["ZScoreNormalization"] * channels,
                "use_mask_for_norm": [False] * channels,
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": RESAMPLING | {"order": 3},
                "resampling_fn_seg_kwargs": RESAMPLING | {"is_seg": True},
                "resampling_fn_probabilities_kwargs": RESAMPLING,
                "architecture": ARCHITECTURE,
                "batch_dice": False,
            }
        },
    }


def write_model(
    folder: Path,
    *,
    folds=(0,),
    reader: str = "NibabelIOWithReorient",
    channels=("T1",),
    trainer: str = "nnUNetTrainer",
    lesion_bias: float = 0.0,
    contrast: float = 1.0,
    seed: int = 0,
    dataset_entries: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model of background and lesion.

    Args:
        dataset_entries: of dataset.json, beside or in place of the usual ones; None takes one out.
        lesion_bias: added to the lesion's logit.
        contrast: by which the last layer's weights are multiplied, so that the network is sure of something.
    """
    described = plans(reader, len(channels))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(described))
    dataset = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    } | dict(dataset_entries or {})
    dataset = {key: value for key, value in dataset.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    for fold in folds:
        torch.manual_seed(seed + fold)
        network = get_network_from_plans(
            ARCHITECTURE["network_class_name"],
            ARCHITECTURE["arch_kwargs"],
            ARCHITECTURE["_kw_requires_import"],
            len(channels),
            2,
            deep_supervision=False,
        )
        weights = network.state_dict()
        last = max(name for name in weights if "seg_layers" in name and name.endswith("weight"))
        weights[last] *= contrast
        weights[last.replace("weight", "bias")] += torch.tensor([0.0, lesion_bias])
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        content = {
            "network_weights": weights,
            "optimizer_state": {"state": {}, "momentum": torch.zeros(1000)},
            "trainer_name": trainer,
            "init_args": {"plans": described, "configuration": "3d_fullres", "fold": fold, "dataset_json": dataset},
            "inference_allowed_mirroring_axes": (0, 1, 2),
            "logging": {"train_losses": [np.float32(1.0)]},
        }
        torch.save(content, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder
