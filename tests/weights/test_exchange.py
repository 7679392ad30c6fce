"""What is exported is what others load: MONAI's class and nnU-Net's class, strictly, with the same features."""

import itertools
import pydoc

import foreign
import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.weights.encoders import load_encoder, read_checkpoint, write_encoder
from nnunet_ssl.weights.monai_names import from_monai, monai_state_dict, to_monai
from nnunet_ssl.weights.nnssl import nnssl_checkpoint
from nnunet_ssl.weights.pretrained import PretrainedEncoder

SIZES = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 3}
X = torch.randn(1, 1, 40, 36, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def swin(**changes) -> PretrainedEncoder:
    architecture = {"backbone": "swin", "in_channels": 1, **SIZES, "conv_norm": "instance", **changes}
    encoder = build_encoder(architecture)
    return PretrainedEncoder(tensors=encoder.state_dict(), architecture=architecture, origin="nnunet_ssl")


@pytest.mark.parametrize("conv_norm", ["instance", None])
def test_monai_loads_the_export_strictly_and_computes_the_same(conv_norm):
    pretrained = swin(conv_norm=conv_norm, mask_token=True)
    theirs = foreign.monai_encoder(**SIZES, use_v2=conv_norm is not None)
    theirs.load_state_dict(monai_state_dict(pretrained), strict=True)
    ours = build_encoder(pretrained.architecture)
    load_encoder(ours, pretrained)
    with torch.no_grad():
        for own, reference in zip(ours.double()(X), theirs.double()(X), strict=True):
            torch.testing.assert_close(own, reference, rtol=0, atol=1e-10)


def test_monai_with_its_norms_replaced_loads_a_group_norm_export():
    pretrained = swin(conv_norm="group", mask_token=False)
    theirs = foreign.umbra_encoder(**SIZES)
    theirs.patch_embed = theirs.patch_embed.patch_embed
    theirs.load_state_dict(monai_state_dict(pretrained), strict=True)


def test_monai_has_four_stages():
    with pytest.raises(UserError, match="four stages; this encoder has 2"):
        monai_state_dict(swin(depths=(1, 1), num_heads=(1, 2)))


def test_names_are_undone():
    for name in foreign.monai_encoder(**SIZES).state_dict():
        assert to_monai(from_monai(name)) == name


def test_nnssl_round_trip_key_by_key(stored, tmp_path):
    """In as nnssl publishes it, through our own file, and out again: the same names, aliases and numbers."""
    network = foreign.resenc_unet()
    content = foreign.nnssl_checkpoint(network)
    read = read_checkpoint(stored(content))
    own = {key: getattr(read, key) for key in ("architecture", "method", "step", "preprocessing", "metadata")}
    write_encoder(tmp_path / "encoder.safetensors", read.tensors, **own)
    exported = nnssl_checkpoint(read_checkpoint(tmp_path / "encoder.safetensors"))

    before, after = content["network_weights"], exported["network_weights"]
    assert after.keys() == before.keys()
    encoder = [name for name in before if name.startswith(("encoder.", "decoder.encoder."))]
    assert len(encoder) > len(before) / 2
    for name in encoder:
        assert torch.equal(after[name], before[name]), name
    for key in ("pretrain_plan", "key_to_encoder", "key_to_stem", "pretrain_num_input_channels", "key_to_lpe"):
        assert exported["nnssl_adaptation_plan"][key] == content["nnssl_adaptation_plan"][key]
    assert exported["citations"] == content["citations"]


def test_nnssl_export_builds_and_loads_as_nnunet_does_it(stored):
    """Build from the plan's arguments, load strictly, and compute the features of the network it came from."""
    network = foreign.resenc_unet().double()
    exported = nnssl_checkpoint(read_checkpoint(stored(foreign.nnssl_checkpoint(network))))
    path = stored(exported, "exported.pth")
    exported = torch.load(path, weights_only=True)  # nnU-Net opens it so
    plan = exported["nnssl_adaptation_plan"]
    architecture = plan["architecture_plans"]
    arguments = dict(architecture["arch_kwargs"])
    for key in architecture["arch_kwargs_requiring_import"]:
        arguments[key] = arguments[key] and pydoc.locate(arguments[key])
    assert pydoc.locate(architecture["arch_class_name"]) is ResidualEncoderUNet
    rebuilt = ResidualEncoderUNet(plan["pretrain_num_input_channels"], num_classes=1, **arguments)
    rebuilt.load_state_dict(exported["network_weights"], strict=True)
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        weights = {
            name.removeprefix(f"{key}."): value
            for name, value in exported["network_weights"].items()
            if name.startswith(key)
        }
        rebuilt.get_submodule(key).load_state_dict(weights, strict=True)
    x = X[..., :32, :32, :32]
    with torch.no_grad():
        for own, reference in zip(rebuilt.double().encoder(x), network.encoder(x), strict=True):
            torch.testing.assert_close(own, reference, rtol=0, atol=1e-6)  # the export is in float32


def test_nnssl_export_of_our_own_pretraining_tells_its_preparation():
    architecture = {"backbone": "resenc", "in_channels": 1, "features": [4, 8, 12], "blocks": [1, 1, 1]}
    pretrained = PretrainedEncoder(
        tensors=build_encoder(architecture).state_dict(),
        architecture=architecture,
        origin="nnunet_ssl",
        preprocessing={"spacing": [1.0, 1.0, 1.0], "orientation": "RAS"},
        metadata={"config": {"patch_size": [96, 96, 96]}},
    )
    plan = nnssl_checkpoint(pretrained)["nnssl_adaptation_plan"]
    assert plan["recommended_downstream_patchsize"] == [96, 96, 96]
    ((style, configuration),) = plan["pretrain_plan"]["configurations"].items()
    assert (style, configuration["spacing"], configuration["patch_size"]) == ("onemmiso", [1, 1, 1], [96, 96, 96])
    assert plan["pretrain_plan"]["image_reader_writer"] == "NibabelIOWithReorient"


@pytest.mark.parametrize("forward", list(itertools.permutations(range(3))))
def test_nnssl_gets_a_pair_of_transpositions_that_undo_each_other(forward):
    architecture = {"backbone": "resenc", "in_channels": 1, "features": [4, 8, 12], "blocks": [1, 1, 1]}
    pretrained = PretrainedEncoder(
        tensors=build_encoder(architecture).state_dict(),
        architecture=architecture,
        origin="nnunet",
        preprocessing={"spacing": [1.0, 1.0, 1.0], "transpose_forward": list(forward)},
    )
    plan = nnssl_checkpoint(pretrained)["nnssl_adaptation_plan"]["pretrain_plan"]
    assert [plan["transpose_forward"][place] for place in plan["transpose_backward"]] == [0, 1, 2]


def test_nnssl_cannot_describe_a_swin_encoder():
    with pytest.raises(UserError, match="residual encoders only, and this is a swin encoder"):
        nnssl_checkpoint(swin())
