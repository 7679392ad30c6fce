"""The network that goes into the plans, for either backbone and either kind of plans."""

import copy
import json

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_ssl.architectures.backbones.resenc import is_residual_unet, stage_differences
from nnunet_ssl.architectures.networks import SwinFPN, build_encoder
from nnunet_ssl.trainers.networks import has_deep_supervision, network_entry
from nnunet_ssl.weights.encoders import PretrainedEncoder, load_encoder

SWIN = {"backbone": "swin", "in_channels": 1, "embed_dim": 6, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}
RESENC = {"backbone": "resenc", "in_channels": 1, "features": [4, 8, 12], "blocks": [1, 2, 3]}
COMMON = {
    "n_stages": 4,
    "features_per_stage": [32, 64, 128, 256],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 4,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 3,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
IMPORTS = ["conv_op", "norm_op", "dropout_op", "nonlin"]
PLAIN_PLANS = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": COMMON | {"n_conv_per_stage": [2] * 4, "n_conv_per_stage_decoder": [2] * 3},
    "_kw_requires_import": IMPORTS,
}
RESENC_PLANS = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "arch_kwargs": COMMON | {"n_blocks_per_stage": [1, 3, 4, 6], "n_conv_per_stage_decoder": [1] * 3},
    "_kw_requires_import": IMPORTS,
}


def build(entry, channels=1, classes=2, deep_supervision=False):
    """Build a network as stock nnU-Net does, from what a plans file keeps of the entry."""
    entry = json.loads(json.dumps(entry))
    return get_network_from_plans(
        entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], channels, classes,
        deep_supervision=deep_supervision,
    )  # fmt: skip


def weights(architecture):
    return PretrainedEncoder(
        tensors=build_encoder(architecture).state_dict(), architecture=architecture, origin="nnunet_ssl"
    )


@pytest.mark.parametrize("planned", [PLAIN_PLANS, RESENC_PLANS], ids=["plain", "resenc"])
def test_a_swin_checkpoint_brings_its_network_whatever_the_plans(planned):
    entry = network_entry(SWIN | {"mask_token": True}, planned)
    network = build(entry, channels=3, classes=4)
    assert isinstance(network, SwinFPN) and not has_deep_supervision(entry)
    assert network(torch.zeros(1, 3, 17, 16, 20)).shape == (1, 4, 17, 16, 20)
    assert network.encoder.mask_token is None


def test_a_residual_checkpoint_takes_nnunets_resenc_network_as_planned():
    entry = network_entry(RESENC, RESENC_PLANS)
    assert entry == RESENC_PLANS and is_residual_unet(entry) and has_deep_supervision(entry)


def test_a_residual_checkpoint_fills_the_stages_planned_for_another_network():
    before = copy.deepcopy(PLAIN_PLANS)
    entry = network_entry(RESENC, PLAIN_PLANS)
    assert before == PLAIN_PLANS
    network = build(entry, deep_supervision=True)
    assert [output.shape[2] for output in network(torch.zeros(1, 1, 16, 16, 16))] == [16, 8, 4]
    report = load_encoder(network.encoder, weights(RESENC), minimum_fraction=0)
    assert not report.unexpected and not report.mismatched
    assert {name.split(".")[1] for name in report.missing} == {"3"}, "only the fourth stage is new"
    assert entry["arch_kwargs"]["features_per_stage"] == [4, 8, 12, 12]
    assert entry["arch_kwargs"]["n_blocks_per_stage"] == [1, 2, 3, 3]


def test_every_stage_that_does_not_fit_is_named_with_the_reason():
    network = copy.deepcopy(RESENC_PLANS)
    network["arch_kwargs"] |= {
        "features_per_stage": [4, 16, 12, 12],
        "n_blocks_per_stage": [1, 2, 2, 3],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
    }
    lines = stage_differences(RESENC, network)
    assert [line.split(":")[0] for line in lines] == ["stage 0", "stage 1", "stage 1", "stage 2", "stage 3"]
    for line, part in zip(lines, ("kernel", "8 in the checkpoint, 16", "[1, 2, 2]", "blocks", "has 3 stages")):
        assert part in line
    shorter = stage_differences(RESENC | {"features": [4] * 6, "blocks": [1] * 6}, RESENC_PLANS)
    assert "stage 5: in the checkpoint only, the network has 4 stages" in shorter


def test_stages_that_fit_are_not_mentioned():
    assert stage_differences(RESENC, network_entry(RESENC, PLAIN_PLANS)) == [
        "stage 3: from random weights, the checkpoint has 3 stages"
    ]
