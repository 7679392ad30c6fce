"""Every kind of checkpoint that can be read gives the features that its own network computes."""

import json
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from monai.inferers.inferer import SlidingWindowInferer
from monai.losses.dice import DiceCELoss
from monai.metrics.hausdorff_distance import HausdorffDistanceMetric
from monai.metrics.meandice import DiceMetric
from monai.transforms import Activations, AsDiscrete, Compose
from torch.nn import functional as F

from nnunet_ssl.architectures.networks import SwinFPN, build_encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.weights.encoders import load_encoder, read_checkpoint

SIZES = {"embed_dim": 12, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 6), "window_size": 3}
X = torch.randn(2, 1, 40, 36, 33, generator=torch.Generator().manual_seed(0))


def rebuilt(path, merging=None):
    """Return what was read, and the encoder that it fills completely."""
    pretrained = read_checkpoint(path, merging=merging)
    encoder = build_encoder(pretrained.architecture)
    report = load_encoder(encoder, pretrained)
    assert report.fraction == 1 and not report.unexpected, report
    return pretrained, encoder


def assert_same_maps(encoder, network, x=X, tolerance=1e-10):
    with torch.no_grad():
        for own, reference in zip(encoder.double()(x.double()), network.double()(x.double()), strict=True):
            torch.testing.assert_close(own, reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("prefix", ["", "module.", "swinViT.", "module.swinViT.", "_orig_mod.backbone.swinViT."])
@pytest.mark.parametrize("holder", [None, "state_dict"])
def test_monai_state_dict(stored, prefix, holder):
    theirs = foreign.monai_encoder(**SIZES)
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    if "swinViT" in prefix:
        state[prefix.replace("swinViT", "encoder1") + "layer.conv1.conv.weight"] = torch.randn(3)
    pretrained, encoder = rebuilt(stored({holder: state} if holder else state), merging="monai")
    assert pretrained.origin == "monai"
    assert pretrained.architecture["num_heads"] == [1, 2, 4, 6]
    assert_same_maps(encoder, theirs)


def test_monai_without_conv_blocks_and_with_its_old_names(stored):
    theirs = foreign.monai_encoder(**SIZES, use_v2=False)
    names = {"linear1": "fc1", "linear2": "fc2"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        state[f"module.{name}"] = tensor
    pretrained, encoder = rebuilt(stored({"state_dict": state}), merging="monai")
    assert pretrained.architecture["conv_norm"] is None
    assert_same_maps(encoder, theirs)


@pytest.mark.parametrize("mode", ["contrastive", "masked", "both"])
def test_umbra_checkpoint_of_every_mode(stored, mode):
    theirs = foreign.umbra_encoder()
    pretrained, encoder = rebuilt(stored(foreign.umbra_checkpoint(theirs, mode), "last.ckpt"))
    assert (pretrained.origin, pretrained.step) == ("umbra", 200_000)
    assert pretrained.architecture["conv_norm"] == "group"
    assert pretrained.metadata["branches"] == {"both": ["contrastive", "masked"]}.get(mode, [mode])
    assert pretrained.method == {"contrastive": "contrastive_only", "masked": "mae_only", "both": "combined"}[mode]
    assert torch.equal(encoder.mask_token, theirs.patch_embed.mask_token_injector.mask_token.flatten())
    assert_same_maps(encoder, theirs)


@pytest.mark.parametrize("groups", [2, 4, 8, 16])
def test_umbras_groups_are_those_of_the_file(stored, groups):
    theirs = foreign.umbra_encoder(groups=groups)
    content = foreign.umbra_checkpoint(theirs, "masked")
    content["hyper_parameters"]["gn_groups"] = groups
    pretrained, encoder = rebuilt(stored(content))
    assert pretrained.architecture["conv_groups"] == groups and not pretrained.assumed
    assert_same_maps(encoder, theirs)


def test_umbras_bare_encoder_gets_its_default_groups_and_says_so(stored):
    theirs = foreign.umbra_encoder()
    pretrained, encoder = rebuilt(stored(theirs.state_dict()))
    assert pretrained.architecture["conv_groups"] == 8 and "UMBRA's default" in pretrained.assumed["conv_groups"]
    assert pretrained.method is None
    assert_same_maps(encoder, theirs)


@pytest.mark.parametrize("groups", [0, 5, "8", 24, None])
def test_groups_that_cannot_be_built_are_refused(stored, groups):
    content = foreign.umbra_checkpoint(foreign.umbra_encoder(), "masked")
    content["hyper_parameters"]["gn_groups"] = groups
    with pytest.raises(UserError, match=r"cannot have .* groups in the norms of \[16, 32, 64, 128\] channels"):
        read_checkpoint(stored(content))


def test_umbras_finetuning_checkpoint_with_its_modules_pickled(stored):
    """Lightning keeps every argument of the module: networks, MONAI's losses, metrics, inferers and transforms."""
    theirs = foreign.umbra_encoder(groups=4)
    content = foreign.umbra_checkpoint(theirs, "masked")
    content["hyper_parameters"] = {
        "model": theirs,
        "loss_fn": DiceCELoss(sigmoid=True),
        "metrics": {"dice": DiceMetric(), "hausdorff": HausdorffDistanceMetric(percentile=0.95)},
        "inferer": SlidingWindowInferer(roi_size=96, overlap=0.25),
        "postprocess": Compose([Activations(sigmoid=True), AsDiscrete(threshold=0.5)]),
        "load_encoder_from": Path("/checkpoints/pretrained.ckpt"),
        "encoder_prefix_in_ckpt": "model.encoder",
        "gn_groups": 4,
        "use_swinunetr": False,
    }
    pretrained, encoder = rebuilt(stored(content))
    assert (pretrained.origin, pretrained.method) == ("umbra", "finetuned")
    assert "branches" not in pretrained.metadata
    assert json.dumps(pretrained.metadata)
    assert_same_maps(encoder, theirs)


def test_umbras_finetuned_swin_unetr(stored):
    theirs = foreign.monai_encoder(**SIZES)
    state = {f"model.swinViT.{name}": tensor for name, tensor in theirs.state_dict().items()}
    settings = {"use_swinunetr": True, "encoder_prefix_in_ckpt": "model.encoder", "gn_groups": 8}
    pretrained, encoder = rebuilt(stored({"state_dict": state, "hyper_parameters": settings}))
    assert (pretrained.origin, pretrained.method, pretrained.architecture["merging"]) == ("umbra", "finetuned", "monai")
    assert_same_maps(encoder, theirs)


def norms_of_another_kind(change):
    """MONAI's tensors, with others beside those of the conv blocks."""
    state = foreign.monai_encoder(**SIZES).state_dict()
    for stage, width in enumerate((12, 24, 48, 96), start=1):
        for norm in ("norm1", "norm2"):
            change(state, stage, f"layers{stage}c.0.layer.{norm}", width)
    return state


def affine(state, stage, norm, width):
    state |= {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}


def batch_norm(state, stage, norm, width):
    affine(state, stage, norm, width)
    state |= {f"{norm}.running_mean": torch.zeros(width), f"{norm}.num_batches_tracked": torch.tensor(3)}


def half_affine(state, stage, norm, width):
    if stage % 2:
        affine(state, stage, norm, width)


def without_biases(state, stage, norm, width):
    state |= {f"{norm}.weight": torch.ones(width)}


@pytest.mark.parametrize("change", [affine, batch_norm, half_affine, without_biases])
@pytest.mark.parametrize("extra", [{}, {"encoder_m.a": torch.zeros(1)}], ids=["as MONAI's", "as UMBRA's"])
def test_norms_of_an_unknown_kind_are_refused(stored, change, extra):
    with pytest.raises(UserError, match=r"the norms of \w+( encoder's)? conv blocks (are of an|have weights)"):
        read_checkpoint(stored({"state_dict": norms_of_another_kind(change) | extra}), merging="monai")


def test_a_contrastive_umbra_checkpoint_without_its_settings_is_not_called_masked(stored):
    content = foreign.umbra_checkpoint(foreign.umbra_encoder(), "contrastive")
    del content["hyper_parameters"]
    pretrained = read_checkpoint(stored(content))
    assert (pretrained.method, pretrained.metadata["branches"]) == (None, ["contrastive"])


def test_our_pretraining_checkpoint(stored, tiny_recipe):
    learner = Learner(tiny_recipe)
    state = {
        "format": "nnunet_ssl",
        "method": "mcl_mim",
        "step": 7,
        "architecture": tiny_recipe.architecture(),
        "preprocessing": {"spacing": [1.0, 1.0, 1.0]},
        "metadata": {},
        "learner": learner.state_dict(),
    }
    for parameter in learner.key.parameters():
        parameter.data.zero_()  # must not be taken for the encoder
    pretrained, encoder = rebuilt(stored(state))
    assert (pretrained.method, pretrained.step) == ("mcl_mim", 7)
    assert pretrained.architecture == tiny_recipe.architecture()
    assert {"key.encoder", "query.decoder", "queue"} <= set(pretrained.left_out)
    assert_same_maps(encoder, learner.query.encoder)


@pytest.fixture
def tiny_recipe():
    sizes = ["swin.embed_dim=8", "swin.depths=1,1", "swin.num_heads=1,2", "swin.window_size=3"]
    return load_config("mcl_mim", [*sizes, "patch_size=32,32,32", "queue_size=32", "contrastive.dim=8"])


def nnunet_checkpoint(network, arch_kwargs) -> dict:
    """What nnU-Net saves, NumPy's scalars in its log included."""
    configuration = {
        "spacing": np.array([1.0, 1.0, 1.0]),
        "normalization_schemes": ["ZScoreNormalization"],
        "architecture": {"network_class_name": "...", "arch_kwargs": arch_kwargs},
    }
    return {
        "network_weights": network.state_dict(),
        "optimizer_state": {"state": {}},
        "logging": {"mean_fg_dice": [np.float32(0.5), np.float64(0.6)]},
        "_best_ema": np.float64(0.6),
        "current_epoch": 3,
        "init_args": {
            "plans": {"dataset_name": "Dataset501_ATLASv2", "configurations": {"3d_fullres": configuration}},
            "configuration": "3d_fullres",
            "fold": 0,
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainerMCLMIM",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


@pytest.mark.parametrize("extra", [{}, {"merging": "monai_1.4", "conv_groups": 4}], ids=["before mergings", "today"])
def test_our_finetuned_nnunet_checkpoint(stored, extra):
    sizes = {**SIZES, "conv_norm": "group", **extra}
    network = SwinFPN(1, 2, **sizes)
    pretrained, encoder = rebuilt(stored(nnunet_checkpoint(network, sizes)))
    assert (pretrained.origin, pretrained.method) == ("nnunet", "nnUNetTrainerMCLMIM")
    assert pretrained.preprocessing["spacing"] == [1.0, 1.0, 1.0]
    assert pretrained.left_out.keys() == {"decoder"}
    assert_same_maps(encoder, network.encoder)


def test_nnunets_own_residual_encoder(stored):
    network = foreign.resenc_unet()
    content = nnunet_checkpoint(network, {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]})
    pretrained, encoder = rebuilt(stored(content))
    assert (pretrained.origin, pretrained.architecture["features"]) == ("nnunet", [4, 8, 12])
    with torch.no_grad():
        reference = network.double().encoder(X.double()[..., :32, :32, :32])[1:]
        for own, map_ in zip(encoder.double()(X.double()[..., :32, :32, :32]), reference, strict=True):
            normalised = F.layer_norm(map_.movedim(1, -1), map_.shape[1:2]).movedim(-1, 1)
            torch.testing.assert_close(own, normalised, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_nnssl_checkpoint_with_wrappers(stored, wrapper):
    network = foreign.resenc_unet()
    content = foreign.nnssl_checkpoint(network)
    content["network_weights"] = {wrapper + name: value for name, value in content["network_weights"].items()}
    pretrained, _ = rebuilt(stored(content))
    assert pretrained.origin == "nnssl"
    assert pretrained.preprocessing["spacing"] == [1.0, 1.0, 1.0]


def test_nnssl_encoder_lies_where_the_plan_says(stored):
    network = foreign.resenc_unet()
    content = foreign.nnssl_checkpoint(network, key_to_encoder="online_encoder.stages")
    weights = network.encoder.state_dict()
    content["network_weights"] = {f"online_encoder.{name}": value for name, value in weights.items()} | {
        f"target_encoder.{name}": torch.zeros_like(value) for name, value in weights.items()
    }
    pretrained, _ = rebuilt(stored(content))
    assert pretrained.left_out == {"target_encoder": len(weights)}


def test_several_encoders_are_not_guessed_between(stored):
    weights = foreign.resenc_unet().encoder.state_dict()
    state = {f"{name}.{key}": value for name in ("first", "second") for key, value in weights.items()}
    with pytest.raises(UserError, match=r"several encoders, at first\., second\."):
        read_checkpoint(stored(state))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"down_projection.proj.weight": torch.zeros(2)}, "stem and the positions have shapes"),
        ({"down_projection.proj.weight": torch.zeros(24, 1, 16, 16, 16)}, r"tokens of \[16, 16, 16\] voxels"),
        ({"eva.pos_embed": torch.zeros(1, 60, 24)}, "60 positions"),
        ({"register_tokens": torch.zeros(1, 4, 24)}, "register tokens"),
    ],
)
def test_a_primus_of_another_kind_is_refused(stored, change, words):
    content = foreign.primus_checkpoint(foreign.primus())
    content["network_weights"].update(change)
    with pytest.raises(UserError, match=words):
        read_checkpoint(stored(content))


def test_other_strides_are_refused(stored):
    content = nnunet_checkpoint(foreign.resenc_unet(), {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]})
    with pytest.raises(UserError, match=r"strides \[\[1, 1, 1\], \[1, 2, 2\]"):
        read_checkpoint(stored(content))


def test_normalised_patch_embedding_is_refused(stored):
    state = foreign.monai_encoder(**SIZES).state_dict() | {"patch_embed.norm.weight": torch.ones(12)}
    with pytest.raises(UserError, match="patch_norm"):
        read_checkpoint(stored(state))


@pytest.mark.parametrize(
    "name", ["layers2c.0.inner.conv1.conv.weight", "layers1.0.blocks.0.attn.q_norm.weight", "layers3.0.gate.weight"]
)
def test_parts_of_a_stage_that_would_be_left_out_are_refused(stored, name):
    state = foreign.monai_encoder(**SIZES).state_dict() | {name: torch.ones(12)}
    with pytest.raises(UserError, match="parts that SwinEncoder's have not"):
        read_checkpoint(stored({"state_dict": state}), merging="monai")


def test_foreign_network_is_refused_with_its_names(stored):
    with pytest.raises(UserError, match=r"no encoder of a kind known here; its first tensors are fc\.weight"):
        read_checkpoint(stored({"state_dict": {"fc.weight": torch.zeros(2)}}))


def test_wrong_origin_is_refused(stored):
    path = stored(foreign.monai_encoder(**SIZES).state_dict())
    with pytest.raises(UserError, match="no encoder of a kind known here"):
        read_checkpoint(path, "nnssl")
    with pytest.raises(UserError, match="no origin 'timm'; there are: nnunet_ssl, umbra, monai, nnunet, nnssl"):
        read_checkpoint(path, "timm")


def test_a_missing_stage_is_noticed(stored):
    state = {
        name: value for name, value in foreign.monai_encoder(**SIZES).state_dict().items() if "layers2" not in name
    }
    with pytest.raises(UserError, match="not complete"):
        read_checkpoint(stored(state))
