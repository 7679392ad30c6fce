"""The decoder beside an encoder: found in every kind of file that has one, kept by our own files, loaded exactly."""

import foreign
import pytest
import torch

from nnunet_ssl.architectures.channels import WAYS, any_channels
from nnunet_ssl.architectures.fpn import FPNDecoder
from nnunet_ssl.architectures.networks import SwinFPN, SwinUNet, build_encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.weights.cli import describe_encoder
from nnunet_ssl.weights.decoders import kind_of
from nnunet_ssl.weights.encoders import load_decoder, load_encoder, read_checkpoint, write_encoder

SWIN = {"backbone": "swin", "in_channels": 1, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 3}
RESENC = {"backbone": "resenc", "in_channels": 1, "features": [4, 8, 12], "blocks": [1, 2, 1]}
DESCRIPTION = {"method": "mim", "step": 7, "preprocessing": None, "metadata": {}}
X = torch.randn(1, 1, 64, 32, 32, generator=torch.Generator().manual_seed(0))


def fpn_beside(encoder, width=16):
    return FPNDecoder(encoder.channels, 1, width=width, stride=encoder.strides[0])


@pytest.fixture(params=["swin", "resenc"])
def own(request, tmp_path):
    """A file of our own with a decoder, and the two networks in it."""
    architecture = {"swin": SWIN, "resenc": RESENC}[request.param]
    encoder = build_encoder(architecture)
    decoder = fpn_beside(encoder)
    path = tmp_path / "encoder.safetensors"
    write_encoder(path, encoder.state_dict(), architecture=architecture, **DESCRIPTION, decoder=decoder.state_dict())
    return path, encoder, decoder


def test_an_own_file_gives_both_networks_back(own):
    path, encoder, decoder = own
    pretrained = read_checkpoint(path)
    assert pretrained.tensors.keys() <= encoder.state_dict().keys()
    assert kind_of(pretrained.decoder) == "fpn"
    assert pretrained.decoder.keys() == decoder.state_dict().keys()
    assert all(torch.equal(tensor, decoder.state_dict()[name]) for name, tensor in pretrained.decoder.items())
    report = load_encoder(build_encoder(pretrained.architecture), pretrained)
    assert report.fraction == 1 and not report.unexpected
    assert pretrained.left_out == {"decoder": len(decoder.state_dict())}


def test_a_file_without_a_decoder_opens_as_before(tmp_path):
    write_encoder(tmp_path / "e.safetensors", build_encoder(SWIN).state_dict(), architecture=SWIN, **DESCRIPTION)
    pretrained = read_checkpoint(tmp_path / "e.safetensors")
    assert pretrained.decoder == {} and pretrained.left_out == {} and kind_of(pretrained.decoder) is None
    assert "decoder        none" in describe_encoder(pretrained)


def test_a_decoders_numbers_that_are_not_finite_spoil_only_its_own_use(own):
    path, encoder, decoder = own
    state = decoder.state_dict()
    state["smooths.0.1.bias"][0] = float("nan")
    architecture = read_checkpoint(path).architecture
    write_encoder(path, encoder.state_dict(), architecture=architecture, **DESCRIPTION, decoder=state)
    pretrained = read_checkpoint(path)
    assert load_encoder(build_encoder(architecture), pretrained).fraction == 1
    with pytest.raises(UserError, match=r"1 of the 16 numbers of its tensor decoder\.smooths\.0\.1\.bias"):
        load_decoder(fpn_beside(encoder), pretrained)


@pytest.mark.parametrize("backbone", ["swin", "resenc"])
def test_a_checkpoint_of_a_pre_training_holds_it_too(stored, backbone):
    """Also of runs whose encoder files have none."""
    sizes = ["swin.embed_dim=8", "swin.depths=1,1", "swin.num_heads=1,2", "swin.window_size=3"]
    sizes += ["resenc.features=4,8,8", "resenc.blocks=1,1,1", f"backbone={backbone}", "masked.width=8"]
    recipe = load_config("mcl_mim", [*sizes, "patch_size=32,32,32", "queue_size=32", "contrastive.dim=8"])
    learner = Learner(recipe)
    state = {"format": "nnunet_ssl", "architecture": recipe.architecture(), "learner": learner.state_dict()}
    pretrained = read_checkpoint(stored(state))
    expected = learner.query.decoder.state_dict()
    assert pretrained.decoder.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pretrained.decoder.items())


@pytest.mark.parametrize("mode", ["masked", "both"])
def test_umbras_decoder_rebuilds_here_what_it_rebuilds_there(stored, mode):
    theirs, their_decoder = foreign.umbra_encoder(), foreign.UmbraDecoder()
    pretrained = read_checkpoint(stored(foreign.umbra_checkpoint(theirs, mode, their_decoder), "last.ckpt"))
    encoder = build_encoder(pretrained.architecture)
    load_encoder(encoder, pretrained)
    decoder = fpn_beside(encoder, width=32)
    assert load_decoder(decoder, pretrained).fraction == 1
    decoder.load_state_dict(pretrained.decoder, strict=True)  # the head, too: the same volume
    with torch.no_grad():
        ours = decoder.double()(encoder.double()(X.double()), X.shape[2:])
        expected = their_decoder.double()(theirs.double()(X.double()))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_umbras_decoder_is_not_taken_where_nothing_has_trained_it_or_its_norms_differ(stored):
    contrastive = foreign.umbra_checkpoint(foreign.umbra_encoder(), "contrastive")
    other_groups = foreign.umbra_checkpoint(foreign.umbra_encoder(groups=4), "masked")
    other_groups["hyper_parameters"]["gn_groups"] = 4
    unknown = foreign.umbra_checkpoint(foreign.umbra_encoder(), "contrastive")
    del unknown["hyper_parameters"]
    for content in (contrastive, other_groups, unknown):
        assert read_checkpoint(stored(content)).decoder == {}


def test_nnssls_decoder_is_found_without_the_encoder_that_it_holds(stored):
    network = foreign.resenc_unet()
    pretrained = read_checkpoint(stored(foreign.nnssl_checkpoint(network)))
    state = network.decoder.state_dict()
    expected = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}
    assert kind_of(pretrained.decoder) == "unet" and pretrained.decoder.keys() == expected.keys()
    other = foreign.resenc_unet()
    torch.nn.init.zeros_(other.decoder.transpconvs[0].weight)
    assert load_decoder(other.decoder, pretrained).fraction == 1
    assert torch.equal(other.decoder.transpconvs[0].weight, network.decoder.transpconvs[0].weight)


@pytest.mark.parametrize(("kind", "network"), [("fpn", SwinFPN), ("unet", SwinUNet)])
def test_a_fine_tuned_networks_decoder_is_found_and_loaded_for_other_classes(stored, kind, network):
    sizes = {key: value for key, value in SWIN.items() if key not in ("backbone", "in_channels")}
    source, target = network(1, 2, **sizes), network(1, 5, **sizes)
    configuration = {"spacing": [1.0] * 3, "architecture": {"arch_kwargs": sizes}}
    content = {"network_weights": source.state_dict(), "trainer_name": "nnUNetTrainerMIM"}
    content["init_args"] = {"configuration": "3d", "plans": {"configurations": {"3d": configuration}}}
    pretrained = read_checkpoint(stored(content))
    assert kind_of(pretrained.decoder) == kind
    assert load_decoder(target.decoder, pretrained).fraction == 1
    for name, tensor in target.decoder.state_dict().items():
        is_head = name.startswith(("head.", "seg_layers."))
        assert is_head or torch.equal(tensor, source.decoder.state_dict()[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_the_decoder_of_a_network_for_any_channels_is_loaded_whole_into_another(stored, way):
    """Its skip at full resolution, too, which a network may use on one channel at a time."""
    sizes = {key: value for key, value in SWIN.items() if key not in ("backbone", "in_channels")}
    kwargs = sizes | {"channels": way, "network": "nnunet_ssl.architectures.networks.SwinUNet"}
    source, target = any_channels(2, 2, **kwargs), any_channels(2, 5, **kwargs)
    configuration = {"spacing": [1.0] * 3, "architecture": {"arch_kwargs": kwargs}}
    content = {"network_weights": source.state_dict(), "trainer_name": "nnUNetTrainerMIM"}
    content["init_args"] = {"configuration": "3d", "plans": {"configurations": {"3d": configuration}}}
    report = load_decoder(target.decoder, read_checkpoint(stored(content)))
    assert report.fraction == 1 and not report.unexpected
    for name, tensor in target.decoder.state_dict().items():
        assert name.startswith("seg_layers.") or torch.equal(tensor, source.decoder.state_dict()[name]), name


def test_monais_decoder_is_none_of_ours(stored):
    state = {f"swinViT.{name}": one for name, one in foreign.monai_encoder(**foreign.SMALL).state_dict().items()}
    state["decoder5.transp_conv.conv.weight"] = torch.zeros(1)
    assert read_checkpoint(stored(state), merging="monai").decoder == {}


def test_the_description_tells_of_it(own):
    path, _, decoder = own
    numbers = sum(tensor.numel() for tensor in decoder.state_dict().values())
    shown = f"the FPN of masked modelling: {len(decoder.state_dict())}, of {numbers:,} numbers"
    assert f"decoder        {shown}" in describe_encoder(read_checkpoint(path))
