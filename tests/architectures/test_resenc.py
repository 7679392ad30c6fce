"""ResEncEncoder against nnU-Net's own networks and planners, and what an encoder promises."""

import json

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as planners
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn
from torch.nn import functional as F

from nnunet_ssl.architectures.masking import expand_mask
from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.architectures.resenc import PRESETS, ResEncEncoder
from nnunet_ssl.errors import UserError

SMALL = {"features": (4, 6, 8, 10), "blocks": (1, 2, 1, 2)}  # stride 8


def small_encoder(**changes) -> ResEncEncoder:
    """An encoder whose every weight matters: as drawn, the last norm of a block is zero."""
    torch.manual_seed(0)
    encoder = ResEncEncoder(**{**SMALL, **changes})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return encoder


def nnunets_encoder(features, blocks, in_channels=1) -> ResidualEncoder:
    """The encoder of nnU-Net's network, of these sizes, as its ResEnc plans describe it."""
    stages = len(features)
    return ResidualEncoder(
        input_channels=in_channels,
        n_stages=stages,
        features_per_stage=features,
        conv_op=nn.Conv3d,
        kernel_sizes=[[3, 3, 3]] * stages,
        strides=[[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        n_blocks_per_stage=blocks,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        return_skips=True,
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_equal_the_normalised_skips_of_nnunets_network(channels):
    ours = small_encoder(in_channels=channels)
    theirs = nnunets_encoder(**SMALL, in_channels=channels)
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, channels, 32, 16, 24)
    full_resolution, *expected = theirs(x)
    assert full_resolution.shape[2:] == x.shape[2:]
    for own, reference in zip(ours(x), expected, strict=True):
        mean, variance = reference.mean(1, keepdim=True), reference.var(1, keepdim=True, correction=0)
        torch.testing.assert_close(own, (reference - mean) / (variance + 1e-5).sqrt())


def test_training_starts_where_nnunets_does():
    torch.manual_seed(0)
    ours = ResEncEncoder(**SMALL)
    torch.manual_seed(0)
    theirs = nnunets_encoder(**SMALL)
    theirs.apply(ResidualEncoderUNet.initialize)
    for own, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own, reference)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(140, 175, 140), (197, 233, 189)], ids=["cropped brain", "whole head"])
def test_presets_are_what_nnunets_planners_give_for_brains(preset, shape, tmp_path, monkeypatch):
    entry = planned(preset, shape, tmp_path, monkeypatch)
    with torch.device("meta"):
        network = get_network_from_plans(*entry.values(), input_channels=1, output_channels=2, allow_init=False)
        ours = ResEncEncoder(**PRESETS[preset])
    assert isinstance(network, ResidualEncoderUNet)
    assert shapes(ours) == shapes(network.encoder)
    assert layers(ours) == layers(network.encoder)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 90_296_576


def planned(preset, shape, tmp_path, monkeypatch) -> dict:
    """The ``architecture`` entry that nnU-Net plans for images of 1 mm and the median `shape`.

    Its search for a patch that fits the GPU is left out: it takes 3 to 17 s and changes no layer here, but the last
    stride of one axis when that axis is shorter than 128.
    """
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable / "Dataset501_ATLAS" / "imagesTr").mkdir(parents=True)
        monkeypatch.setenv(variable, str(tmp_path / variable))
    dataset = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "nnUNet_raw/Dataset501_ATLAS/dataset.json").write_text(json.dumps({**dataset, "numTraining": 0}))
    fingerprint = tmp_path / "nnUNet_preprocessed/Dataset501_ATLAS/dataset_fingerprint.json"
    fingerprint.write_text(json.dumps({"median_relative_size_after_cropping": 1.0}))
    planner_class = {"resenc_m": planners.nnUNetPlannerResEncM, "resenc_l": planners.nnUNetPlannerResEncL}[preset]
    monkeypatch.setattr(planner_class, "static_estimate_VRAM_usage", staticmethod(lambda *_: 1.0))
    return planner_class(501).get_plans_for_configuration([1.0] * 3, shape, "any", 1e9, {})["architecture"]


def shapes(encoder) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in encoder.state_dict().items()}


def layers(encoder) -> list[str]:
    """Every convolution, pooling, norm and non-linearity with its settings."""
    leaves = (repr(module) for module in encoder.modules() if not list(module.children()))
    return [text.replace("[", "(").replace("]", ")") for text in leaves]


@settings(max_examples=25, deadline=None)
@given(size=st.tuples(*[st.integers(9, 40)] * 3))
def test_any_size_gives_the_maps_of_the_padded_volume_without_what_lies_in_the_padding(size):
    encoder = small_encoder()
    x = torch.randn(1, 1, *size)
    padded = F.pad(x, [pad for length in reversed(size) for pad in (0, -length % 8)])
    for level, reference, channels, stride in zip(encoder(x), encoder(padded), encoder.channels, encoder.strides):
        places = tuple(-(-length // stride) for length in size)
        assert level.shape == (1, channels, *places)
        assert torch.equal(level, reference[:, :, : places[0], : places[1], : places[2]])


def test_a_volume_of_one_place_is_refused():
    with pytest.raises(UserError, match=r"\(8, 8, 8\) voxels is too small.*longer than 8 voxels"):
        small_encoder()(torch.randn(1, 1, 8, 8, 8))
    assert small_encoder()(torch.randn(1, 1, 9, 8, 1))[-1].shape == (1, 10, 2, 1, 1)


def test_hidden_voxels_have_no_influence():
    encoder = small_encoder()
    x = torch.randn(2, 1, 20, 24, 17, requires_grad=True)
    mask = torch.rand(2, 3, 3, 3) < 0.5
    hidden = expand_mask(mask, x.shape[2:], 8)[:, None]
    maps = encoder(x, mask)
    changed = encoder(torch.where(hidden, torch.full_like(x, torch.nan), x), mask)
    by_hand = encoder(x * ~hidden)
    for level, other, reference in zip(maps, changed, by_hand, strict=True):
        assert torch.equal(level, other)
        assert torch.equal(level, reference)
    sum(level.square().sum() for level in maps).backward()
    assert x.grad[hidden].abs().max() == 0
    assert (x.grad[~hidden] != 0).float().mean() > 0.99


def test_the_input_is_left_as_it_was():
    x = torch.randn(1, 1, 16, 16, 16)
    before = x.clone()
    small_encoder()(x, torch.rand(1, 2, 2, 2) < 0.5)
    assert torch.equal(x, before)


def test_checkpointing_keeps_less_and_changes_no_gradient():
    kept, gradients = [], []
    for checkpointing in (False, True):
        encoder = small_encoder(checkpointing=checkpointing)
        held = {}

        def hold(tensor, held=held):
            held[tensor.data_ptr()] = tensor.numel()
            return tensor

        x = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            maps = encoder(x)
        kept.append(sum(held.values()))
        sum(level.square().sum() for level in maps).backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert kept[1] < 0.6 * kept[0]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.compiled
def test_the_encoder_compiles_into_one_graph():
    encoder = small_encoder(features=(4, 6), blocks=(1, 1))
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    x, mask = torch.randn(1, 1, 5, 4, 4), torch.rand(1, 3, 2, 2) < 0.5
    for arguments in ((x,), (x, mask)):
        for own, reference in zip(compiled(*arguments), encoder(*arguments), strict=True):
            assert torch.equal(own, reference)


def test_an_architecture_survives_json():
    architecture = {"backbone": "resenc", "in_channels": 2, **{name: list(sizes) for name, sizes in SMALL.items()}}
    encoder = build_encoder(json.loads(json.dumps(architecture)))
    assert (encoder.channels, encoder.strides) == ((6, 8, 10), (2, 4, 8))
    assert encoder(torch.randn(1, 2, 16, 16, 16))[0].shape == (1, 6, 8, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": (4, 8)}, r"features \(4, 8\) and blocks \(1, 2, 1, 2\)"),
        ({"features": (4,), "blocks": (1,)}, "at least two stages"),
        ({"blocks": (1, 0, 1, 1)}, r"blocks \(1, 0, 1, 1\)"),
        ({"mask_token": True}, "'resenc' encoder does not fit.*mask_token"),
    ],
)
def test_sizes_that_do_not_fit_are_explained(changes, message):
    with pytest.raises(UserError, match=message):
        build_encoder({"backbone": "resenc", **SMALL, **changes})


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(
        ValueError, match=r"shape \(1, 2, 2, 2\); for input of size \(24, 16, 16\) it is \(1, 3, 2, 2\)"
    ):
        small_encoder()(torch.randn(1, 1, 24, 16, 16), torch.zeros(1, 2, 2, 2, dtype=torch.bool))
