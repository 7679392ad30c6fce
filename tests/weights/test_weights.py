"""Own files: what is written is read back, what is loaded is reported, what does not fit is refused."""

import pytest
import torch
from safetensors.torch import save_file

from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.weights.encoders import load_encoder, read_checkpoint, write_encoder
from nnunet_ssl.weights.pretrained import PretrainedEncoder

SWIN = {
    "backbone": "swin",
    "in_channels": 1,
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [1, 2],
    "window_size": 3,
    "patch_size": 2,
    "mlp_ratio": 2.0,
    "conv_norm": "group",
    "mask_token": True,
}
RESENC = {"backbone": "resenc", "in_channels": 1, "features": [4, 8, 12], "blocks": [1, 2, 1]}
DESCRIPTION = {
    "method": "mcl_mim",
    "step": 200_000,
    "preprocessing": {"spacing": [1.0, 1.0, 1.0]},
    "metadata": {"config": {"patch_size": [96, 96, 96]}},
}


def pretrained_of(encoder, architecture) -> PretrainedEncoder:
    return PretrainedEncoder(tensors=encoder.state_dict(), architecture=architecture, origin="nnunet_ssl")


@pytest.mark.parametrize("architecture", [SWIN, RESENC], ids=["swin", "resenc"])
def test_own_file_round_trip(tmp_path, architecture):
    encoder, other = build_encoder(architecture), build_encoder(architecture)
    path = tmp_path / "encoder.safetensors"
    write_encoder(path, encoder.state_dict(), architecture=architecture, **DESCRIPTION)
    pretrained = read_checkpoint(path)
    assert {key: getattr(pretrained, key) for key in DESCRIPTION} == DESCRIPTION
    assert (pretrained.architecture, pretrained.origin) == (architecture, "nnunet_ssl")
    assert load_encoder(other, pretrained).fraction == 1
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_tensor_with_two_names_is_written_once_and_loaded_under_both(tmp_path):
    encoder = build_encoder(RESENC)
    write_encoder(tmp_path / "e.safetensors", encoder.state_dict(), architecture=RESENC, **DESCRIPTION)
    pretrained = read_checkpoint(tmp_path / "e.safetensors")
    written = sum(tensor.numel() for tensor in pretrained.tensors.values())
    assert written == sum(parameter.numel() for parameter in encoder.parameters())
    report = load_encoder(build_encoder(RESENC), pretrained)
    assert not report.missing and not report.unexpected


def test_written_file_is_readable_for_the_group(tmp_path):
    write_encoder(tmp_path / "e.safetensors", {"a": torch.zeros(1)}, architecture=SWIN, **DESCRIPTION)
    reference = tmp_path / "reference"
    reference.touch()
    assert (tmp_path / "e.safetensors").stat().st_mode == reference.stat().st_mode


@pytest.mark.parametrize("architecture", [SWIN, RESENC], ids=["swin", "resenc"])
def test_state_dict_without_a_header_gets_the_same_architecture(tmp_path, architecture):
    torch.save(build_encoder(architecture).state_dict(), tmp_path / "encoder.pth")
    assert read_checkpoint(tmp_path / "encoder.pth").architecture == architecture


@pytest.mark.parametrize("architecture", [SWIN, RESENC], ids=["swin", "resenc"])
@pytest.mark.parametrize("channels", [2, 4])
def test_an_image_given_n_times_yields_the_maps_of_the_image_given_once(architecture, channels):
    source = build_encoder(architecture)
    wide = build_encoder({**architecture, "in_channels": channels})
    report = load_encoder(wide, pretrained_of(source, architecture))
    assert len(report.adapted) == 1 and report.fraction == 1
    x = torch.randn(1, 1, 24, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for own, reference in zip(wide.double()(x.repeat(1, channels, 1, 1, 1)), source.double()(x), strict=True):
            torch.testing.assert_close(own, reference, rtol=0, atol=1e-7)  # the division was done in float32


@pytest.mark.parametrize("architecture", [SWIN, RESENC], ids=["swin", "resenc"])
@pytest.mark.parametrize(("theirs", "ours"), [(4, 1), (2, 1), (4, 2), (2, 3)])
def test_a_stem_of_several_channels_is_averaged_and_said_so(architecture, theirs, ours):
    source = build_encoder({**architecture, "in_channels": theirs})
    encoder = build_encoder({**architecture, "in_channels": ours})
    report = load_encoder(encoder, pretrained_of(source, {**architecture, "in_channels": theirs}))
    (name,) = [name for name in ("patch_embed.proj.weight", "stem.convs.0.conv.weight") if name in source.state_dict()]
    expected = source.state_dict()[name].mean(dim=1, keepdim=True) / ours
    torch.testing.assert_close(encoder.state_dict()[name], expected.expand_as(encoder.state_dict()[name]))
    assert report.fraction == 1 and f"{name}: averaged over the file's {theirs} channels" in str(report)


def trunk(names):
    """Every tensor that no residual connection leads around, of all but the last stage."""
    starts = ("patch_embed.", "stem.", *(f"stages.{stage}.merging." for stage in range(2)))
    return [name for name in names if name.startswith(starts)]


@pytest.mark.parametrize("architecture", [{**SWIN, "depths": [1, 1, 1], "num_heads": [1, 2, 2]}, RESENC])
@pytest.mark.parametrize("change", ["missing", "of another shape"])
def test_no_encoder_is_used_without_what_all_else_depends_on(architecture, change):
    """Whatever its share of the numbers."""
    complete = build_encoder(architecture).state_dict()
    names = trunk(complete)
    assert names
    for name in names:
        twins = [other for other in complete if complete[other].data_ptr() == complete[name].data_ptr()]
        source = {other: tensor for other, tensor in complete.items() if other not in twins}
        if change != "missing":
            source |= {other: complete[name][:1].clone() for other in twins}
        pretrained = PretrainedEncoder(tensors=source, architecture=architecture, origin="nnunet_ssl")
        encoder = build_encoder(architecture)
        before = {other: tensor.clone() for other, tensor in encoder.state_dict().items()}
        with pytest.raises(UserError, match="all features depend on"):
            load_encoder(encoder, pretrained, minimum_fraction=0.01)
        assert all(torch.equal(tensor, before[other]) for other, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("architecture", [SWIN, RESENC], ids=["swin", "resenc"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e300], ids=str)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_numbers_that_are_not_finite_are_refused_by_the_tensors_name(tmp_path, architecture, number, suffix):
    tensors = {name: tensor.clone().double() for name, tensor in build_encoder(architecture).state_dict().items()}
    name = list(tensors)[-1]
    tensors[name].view(-1)[-1] = number
    path = tmp_path / f"encoder.{suffix}"
    if suffix == "pth":
        torch.save(tensors, path)
    else:
        write_encoder(path, tensors, architecture=architecture, **DESCRIPTION)
    with pytest.raises(UserError, match=r"1 of the \d+ numbers of its tensor .* are not finite") as caught:
        read_checkpoint(path)
    assert name in str(caught.value)


def test_what_lies_beside_the_encoder_may_be_anything(tmp_path):
    tensors = build_encoder(SWIN).state_dict()
    torch.save(
        {
            "learner": {f"query.encoder.{name}": tensor for name, tensor in tensors.items()}
            | {"queue": torch.full((3,), float("nan"))}
        },
        tmp_path / "checkpoint.pth",
    )
    assert read_checkpoint(tmp_path / "checkpoint.pth").left_out == {"queue": 1}


def test_report_names_what_became_of_each_tensor():
    source = build_encoder(SWIN).state_dict()
    del source["mask_token"]
    source["stages.0.conv.norm1.weight"] = torch.zeros(3)
    source["queue"] = torch.zeros(2)
    pretrained = PretrainedEncoder(tensors=source, architecture=SWIN, origin="nnunet_ssl")
    encoder = build_encoder(SWIN)
    token = encoder.mask_token.clone()
    report = load_encoder(encoder, pretrained)
    assert report.missing == ("mask_token",)
    assert report.mismatched == ("stages.0.conv.norm1.weight: (3,) in the file, (8,) here",)
    assert report.unexpected == ("queue",)
    total = sum(parameter.numel() for parameter in encoder.parameters())
    assert report.fraction == pytest.approx(1 - 16 / total)
    assert torch.equal(encoder.mask_token, token)
    assert "  missing: 1\n    mask_token\n" in str(report)


def test_too_little_is_an_error_that_changes_nothing_unless_allowed():
    source = {name: tensor + 1 for name, tensor in build_encoder(SWIN).state_dict().items() if "stages.1" not in name}
    pretrained = PretrainedEncoder(tensors=source, architecture=SWIN, origin="nnunet_ssl")
    encoder = build_encoder(SWIN)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(UserError, match=r"fill only \d+\.\d% of the encoder, less than the 90%"):
        load_encoder(encoder, pretrained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert load_encoder(encoder, pretrained, minimum_fraction=0.1).fraction < 0.9
    assert torch.equal(encoder.mask_token, source["mask_token"])


def test_unreadable_header(tmp_path):
    header = {"format": "nnunet_ssl", "architecture": "{not JSON"}
    save_file({"stages.0.blocks.0.attn.qkv.weight": torch.zeros(1)}, tmp_path / "e.safetensors", metadata=header)
    with pytest.raises(UserError, match="header cannot be read"):
        read_checkpoint(tmp_path / "e.safetensors")
