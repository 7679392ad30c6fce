"""The network that goes into the plans, for either backbone and either kind of plans."""

import copy
import json

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_ssl.architectures.backbones.resenc import is_residual_unet, stage_differences
from nnunet_ssl.architectures.fpn import FPNDecoder
from nnunet_ssl.architectures.networks import ResEncFPN, SwinFPN, SwinUNet, build_encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.networks import has_deep_supervision, network_entry
from nnunet_ssl.weights.encoders import PretrainedEncoder, load_decoder, load_encoder

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


def fpn_of(architecture, width=16, classes=1):
    """The tensors of the decoder that masked modelling leaves beside an encoder."""
    encoder = build_encoder(architecture)
    return FPNDecoder(encoder.channels, classes, width=width, stride=encoder.strides[0]).state_dict()


@pytest.mark.parametrize("planned", [PLAIN_PLANS, RESENC_PLANS], ids=["plain", "resenc"])
def test_a_swin_encoder_takes_a_unets_decoder_whatever_the_plans(planned):
    entry = network_entry(SWIN | {"mask_token": True}, planned, "unet")
    network = build(entry, channels=3, classes=4, deep_supervision=True)
    assert isinstance(network, SwinUNet) and has_deep_supervision(entry)
    shapes = [tuple(output.shape) for output in network(torch.zeros(1, 3, 17, 16, 20))]
    assert shapes == [(1, 4, 17, 16, 20), (1, 4, 9, 8, 10), (1, 4, 5, 4, 5)]


@pytest.mark.parametrize("architecture", [SWIN, RESENC], ids=["swin", "resenc"])
@pytest.mark.parametrize("width", [8, 32])
def test_the_decoder_of_masked_modelling_brings_its_network_and_fills_all_but_the_head(architecture, width):
    held = fpn_of(architecture, width)
    entry = network_entry(architecture, RESENC_PLANS, "pretrained", held)
    network = build(entry, classes=4, deep_supervision=False)
    assert isinstance(network, SwinFPN if architecture is SWIN else ResEncFPN) and not has_deep_supervision(entry)
    before = network.decoder.state_dict()["head.weight"].clone()
    pretrained = PretrainedEncoder(tensors={}, decoder=held, architecture=architecture, origin="nnunet_ssl")
    report = load_decoder(network.decoder, pretrained)
    assert report.fraction == 1 and report.excluded == ("head.weight", "head.bias")
    assert torch.equal(network.decoder.state_dict()["head.weight"], before)
    for name, tensor in held.items():
        assert name.startswith("head.") or torch.equal(network.decoder.state_dict()[name], tensor), name
    assert network(torch.zeros(1, 1, 17, 16, 20)).shape == (1, 4, 17, 16, 20)


SMALL_PLANS = RESENC_PLANS | {"arch_kwargs": RESENC_PLANS["arch_kwargs"] | {"features_per_stage": [4, 8, 12, 12]}}


def unet_of(entry):
    """The tensors of nnU-Net's decoder in a file, without the encoder that it holds."""
    state = build(entry).decoder.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}


def test_the_decoder_of_nnunets_residual_network_is_loaded_into_the_planned_one():
    held = unet_of(SMALL_PLANS)
    network = build(network_entry(RESENC, SMALL_PLANS, "pretrained", held), classes=3)
    encoder = {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}
    pretrained = PretrainedEncoder(tensors={}, decoder=held, architecture=RESENC, origin="nnssl")
    report = load_decoder(network.decoder, pretrained)
    assert report.fraction == 1 and not report.unexpected
    assert {name.split(".")[0] for name in report.excluded} == {"seg_layers"}
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in network.encoder.state_dict().items())
    assert torch.equal(network.decoder.transpconvs[0].weight, held["transpconvs.0.weight"])


def test_a_decoder_of_other_depth_is_refused_for_its_stages_work_at_other_scales():
    deeper = copy.deepcopy(SMALL_PLANS)
    numbers = deeper["arch_kwargs"]
    for key in ("features_per_stage", "kernel_sizes", "strides", "n_blocks_per_stage", "n_conv_per_stage_decoder"):
        numbers[key] = [*numbers[key], numbers[key][-1]]
    numbers["n_stages"] += 1
    with pytest.raises(UserError, match="decoder has 3 stages where the planned network has 4"):
        network_entry(RESENC, deeper, "pretrained", unet_of(SMALL_PLANS))


@pytest.mark.parametrize(
    ("architecture", "decoder", "held", "message"),
    [
        (SWIN, "pretrained", {}, "holds no decoder that could be loaded"),
        (RESENC, "pretrained", {"projection.weight": torch.ones(1)}, "holds no decoder that could be loaded"),
        (SWIN, "pretrained", {"head.weight": torch.ones(1)}, "holds no decoder that could be loaded"),
        (RESENC, "pretrained", {"seg_layers.0.weight": torch.ones(1)}, "holds no decoder that could be loaded"),
        (RESENC, "unet", {}, "backbone resenc has nnU-Net's U-Net decoder in any case"),
        (SWIN, "pretrained", fpn_of(SWIN) | {"laterals.1.weight": torch.tensor([float("nan")])}, "are not finite"),
    ],
)
def test_a_decoder_that_is_not_there_or_of_no_use_is_named(architecture, decoder, held, message):
    with pytest.raises(UserError, match=message):
        network_entry(architecture, RESENC_PLANS, decoder, held)


def test_a_decoder_of_which_too_little_fits_is_refused_and_changes_nothing():
    network = build(network_entry(SWIN, RESENC_PLANS))
    held = fpn_of(SWIN | {"embed_dim": 12}, width=32)
    before = {name: tensor.clone() for name, tensor in network.decoder.state_dict().items()}
    pretrained = PretrainedEncoder(tensors={}, decoder=held, architecture=SWIN, origin="nnunet_ssl")
    del held["smooths.0.0.weight"]
    with pytest.raises(UserError, match=r"fills only \d+\.\d% of the network's, less than the 90%"):
        load_decoder(network.decoder, pretrained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.decoder.state_dict().items())


def test_deep_supervision_is_refused_of_the_fpn_and_may_be_turned_off_elsewhere():
    fpn, unet = network_entry(SWIN, RESENC_PLANS), network_entry(SWIN, RESENC_PLANS, "unet")
    with pytest.raises(UserError, match="the FPN decoder has one output"):
        has_deep_supervision(fpn, True)
    assert not has_deep_supervision(fpn, False)
    for entry in (unet, RESENC_PLANS):
        assert [has_deep_supervision(entry, asked) for asked in (None, True, False)] == [True, True, False]
