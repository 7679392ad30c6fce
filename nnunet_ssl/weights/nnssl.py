"""A residual encoder as a checkpoint of nnssl, which nnU-Net's ``nnUNetv2_preprocess_like_nnssl`` reads.

The loader there takes two modules of the file's network, ``encoder.stem`` and ``encoder.stages``, strictly, under all
names that dynamic-network-architectures gives a parameter; ``nnssl_adaptation_plan`` tells it how to build the network
and what scans the weights have seen.
"""

from __future__ import annotations

import pydoc
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.weights.encoders import load_encoder
from nnunet_ssl.weights.pretrained import PretrainedEncoder

NNSSLS_PLANS_NAME = "nnsslPlans"
"""What nnssl calls its plans."""

UNKNOWN_PATCH = [160, 160, 160]
"""What nnssl recommends for fine-tuning where a file does not tell the patch size of its pre-training."""


def nnssl_checkpoint(pretrained: PretrainedEncoder) -> dict[str, Any]:
    """Return a checkpoint with the encoder inside nnU-Net's ResidualEncoderUNet.

    Its decoder is drawn from seed 0: nnU-Net starts the decoder anew in any case, but its class has one.

    Raises:
        UserError: the encoder is a Swin, or does not fit its own architecture.
    """
    if pretrained.architecture["backbone"] != "resenc":
        raise UserError(
            f"nnssl's format can describe residual encoders only, and this is a {pretrained.architecture['backbone']} "
            "encoder. Export it as safetensors, or a Swin with MONAI's names: --format monai"
        )
    encoder = build_encoder(pretrained.architecture)
    load_encoder(encoder, pretrained)
    arguments = unet_arguments(pretrained.architecture)
    imported = {key: pydoc.locate(arguments[key]) for key in _NAMED}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        in_channels = pretrained.architecture["in_channels"]
        network = ResidualEncoderUNet(in_channels, num_classes=1, **arguments | imported)
    network.encoder.load_state_dict(encoder.state_dict())
    return {
        "network_weights": network.state_dict(),
        "nnssl_adaptation_plan": _adaptation_plan(pretrained, arguments),
        "citations": pretrained.metadata.get("citations", []),
    }


_NAMED = ("conv_op", "norm_op", "nonlin")
"""Arguments whose value is a class, which plans name by its path."""


def unet_arguments(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return ResidualEncoderUNet's arguments as plans hold them: :class:`resenc.ResEncEncoder` in nnU-Net's words."""
    stages = len(architecture["features"])
    return {
        "n_stages": stages,
        "features_per_stage": list(architecture["features"]),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "n_blocks_per_stage": list(architecture["blocks"]),
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def _adaptation_plan(pretrained: PretrainedEncoder, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the plan; where the weights came from nnssl, what it told of the pre-training is kept."""
    before = pretrained.metadata.get("nnssl_adaptation_plan", {})
    patch_size = pretrained.metadata.get("config", {}).get("patch_size", UNKNOWN_PATCH)
    return {
        "architecture_plans": {
            "arch_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
            "arch_kwargs": arguments,
            "arch_kwargs_requiring_import": [*_NAMED, "dropout_op"],
        },
        "pretrain_plan": before.get("pretrain_plan") or _pretrain_plan(pretrained, patch_size),
        "pretrain_num_input_channels": pretrained.architecture["in_channels"],
        "recommended_downstream_patchsize": before.get("recommended_downstream_patchsize", patch_size),
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }


def _pretrain_plan(pretrained: PretrainedEncoder, patch_size: list[int]) -> dict[str, Any]:
    """Describe the preparation in nnssl's words. An unknown spacing is None, which nnU-Net's reader understands.

    The clipping of ``nnssl_prepare`` has no name there; ZScoreNormalization is the scheme that comes next to it.
    """
    known = pretrained.preprocessing or {}
    spacing, forward = known.get("spacing"), known.get("transpose_forward", [0, 1, 2])
    style = {None: "noresample", (1.0, 1.0, 1.0): "onemmiso"}.get(spacing and tuple(spacing), "fixed")
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": "nnunet_ssl",
        "plans_name": NNSSLS_PLANS_NAME,
        "original_median_spacing_after_transp": spacing,
        "image_reader_writer": known.get("image_reader_writer", "NibabelIOWithReorient"),
        "transpose_forward": forward,
        "transpose_backward": np.argsort(forward).tolist(),
        "experiment_planner_used": "nnssl_prepare",
        "configurations": {
            style: {
                "data_identifier": f"{NNSSLS_PLANS_NAME}_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "spacing_style": style,
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [True],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resampling,
                "resampling_fn_mask": "resample_data_or_seg_to_shape",
                "resampling_fn_mask_kwargs": {**resampling, "is_seg": True, "order": 1},
                "spacing": spacing,
                "patch_size": patch_size,
            }
        },
    }
