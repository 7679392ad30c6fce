"""Every recipe on nnU-Net's residual encoder; what is particular to a backbone in the configuration and in a run."""

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from nnunet_ssl.architectures.networks import PAPER_ENCODER, build_encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.config import from_dict, load_config
from nnunet_ssl.pretraining.loop import pretrain
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.weights.encoders import load_encoder, read_checkpoint

FAST = ["mim", "mcl_mim", "mcl_ibot"]  # every branch once
SLOW = [
    pytest.param(recipe, marks=pytest.mark.slow)
    for recipe in ("cl", "mcl", "cl_mim", "mcl_mim_balanced", "mcl_path", "mcl_dense")
]

FEATURES, BLOCKS = [4, 8, 8, 8, 8, 8], [1, 1, 1, 1, 1, 1]
RESENC = ["backbone=resenc", "resenc.features=4,8,8,8,8,8", "resenc.blocks=1,1,1,1,1,1"]


@pytest.fixture
def train(tiny, nnunet_folders):
    """A function that trains with a tiny residual encoder and returns the folder of results."""

    def run(recipe, *overrides, resume=False):
        config = load_config(recipe, [*tiny, *RESENC, *overrides])
        pretrain(config, 500, resume, torch.device("cpu"))
        return nnunet_folders["nnUNet_results"] / "Dataset500_FOMO60K" / config.recipe

    return run


@pytest.mark.parametrize("recipe", [*FAST, *SLOW])
def test_every_recipe_ends_with_an_encoder_that_fits_nnunets_network(write_prepared, train, recipe):
    write_prepared()
    folder = train(recipe)
    pretrained = read_checkpoint(folder / "encoder.safetensors")
    assert pretrained.architecture == {"backbone": "resenc", "in_channels": 1, "features": FEATURES, "blocks": BLOCKS}
    encoder = build_encoder(pretrained.architecture)
    assert load_encoder(encoder, pretrained).fraction == 1
    unet = ResidualEncoderUNet(
        input_channels=1,
        n_stages=6,
        features_per_stage=FEATURES,
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, 2, 2, 2, 2],
        n_blocks_per_stage=BLOCKS,
        num_classes=2,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    assert unet.encoder.load_state_dict(encoder.state_dict(), strict=True)

    initial = Learner(load_config(folder / "config.yaml")).query.encoder.state_dict()
    assert any(not torch.equal(tensor, initial[name]) for name, tensor in pretrained.tensors.items())


PRIMUS = ["backbone=primus", "primus.embed_dim=24", "primus.depth=2", "primus.heads=2", "primus.grid=4,4,4"]


@pytest.mark.parametrize(
    "recipe", ["mim", *(pytest.param(one, marks=pytest.mark.slow) for one in ("mcl_mim", "mcl_path", "mcl_dense"))]
)
def test_primus_learns_and_is_read_by_its_original(write_prepared, train, recipe):
    write_prepared()
    pretrained = read_checkpoint(train(recipe, *PRIMUS) / "encoder.safetensors")
    original = Primus(1, 24, (8, 8, 8), 1, 2, 2, input_shape=(32, 32, 32), init_values=0.1, scale_attn_inner=True)
    if recipe.endswith("mim"):
        assert pretrained.tensors.pop("mask_token").any()
    missing = original.load_state_dict(pretrained.tensors, strict=False).missing_keys
    assert all(name.startswith(("up_projection", "mask_token")) for name in missing)


def test_a_recipe_that_primus_cannot_learn_by_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="the maps are 0 to 0"):
        load_config("mcl_ibot", PRIMUS)


def test_a_run_is_not_continued_on_another_backbone(write_prepared, train):
    write_prepared()
    train("mim", "steps=2")
    with pytest.raises(UserError, match="cannot be continued with these settings: backbone was resenc, is swin"):
        train("mim", "backbone=swin", resume=True)
    with pytest.raises(UserError, match=r"resenc.blocks was \[1, 1, 1, 1, 1, 1\], is \[1, 1, 2, 1, 1, 1\]"):
        train("mim", "resenc.blocks=1,1,2,1,1,1", resume=True)


@pytest.mark.compiled
@pytest.mark.slow
def test_compiling_with_checkpointing_changes_no_gradient(tiny):
    overrides = [*tiny, "backbone=resenc", "resenc.features=4,8", "resenc.blocks=1,1", "patch_size=8"]
    gradients = []
    for options in ([], ["compile=true", "checkpointing=true"]):
        query = Learner(load_config("mim", [*overrides, *options])).query
        generator = torch.Generator().manual_seed(0)
        views = torch.randn(1, 1, 8, 8, 8, generator=generator)
        mask = torch.rand(1, 4, 4, 4, generator=generator) < 0.5
        query.encode(views, mask)[-1].square().sum().backward()
        gradients.append([parameter.grad for parameter in query.encoder.parameters()])
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-3)


def test_every_parameter_of_the_encoder_learns_from_either_branch(tiny):
    for recipe in ("mcl", "mim"):
        query = Learner(load_config(recipe, [*tiny, *RESENC])).query
        for parameter in query.encoder.parameters():  # as drawn, zero norms stop the gradient of what is before them
            nn.init.normal_(parameter, std=0.3)
        maps = query.encode(torch.randn(2, 1, 64, 32, 32))
        output = (
            query.head("projection", maps[-1])[:, 0] if recipe == "mcl" else query.head("decoder", maps, (64, 32, 32))
        )
        output.square().mean().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in query.encoder.parameters())


def test_swin_is_the_default_and_is_the_papers():
    assert load_config("mcl_mim").architecture() == {**PAPER_ENCODER, "mask_token": True}


def test_a_preset_is_written_out_in_the_architecture():
    config = load_config("mcl_mim", ["backbone=resenc"])
    assert config.architecture() == {
        "backbone": "resenc",
        "in_channels": 1,
        "features": [32, 64, 128, 256, 320, 320],
        "blocks": [1, 3, 4, 6, 6, 6],
    }
    assert config.stride == 32
    assert from_dict(config.as_dict()) == config


def test_the_stride_follows_the_stages():
    config = load_config("mim", ["backbone=resenc", "resenc.features=8,16,32", "resenc.blocks=1,1,1", "patch_size=16"])
    assert config.stride == build_encoder(config.architecture()).strides[-1] == 4


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("mim", ["backbone=resnet"], "backbone is 'resnet'; it can be swin, resenc"),
        ("mim", ["resenc.preset=resenc_xl"], "resenc.preset is 'resenc_xl'; it can be resenc_m, resenc_l"),
        ("mim", ["resenc.features=4,8,16"], r"resenc.features \[4, 8, 16\] and resenc.blocks .* one number for each"),
        ("mim", ["resenc.blocks=[1]", "resenc.features=[4]"], "two stages at least"),
        ("mim", ["resenc.block=1"], "did you mean 'resenc.blocks'"),
        ("mcl", ["backbone=resenc", "patch_size=32"], "which the encoder of backbone resenc cannot"),
        ("mcl_ibot", ["backbone=resenc", "masked.tokens.level=5"], "the maps are 0 to 4"),
    ],
)
def test_a_bad_choice_is_explained(recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(recipe, overrides)
