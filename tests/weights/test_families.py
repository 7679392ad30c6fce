"""Replicas of published layouts: read with equal tensors, named by `inspect`, or refused by their names."""

import foreign
import pytest
import torch
from monai.networks.nets import ViT

from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.weights.cli import describe_encoder
from nnunet_ssl.weights.encoders import load_encoder, read_checkpoint


def read(tmp_path, content, name="checkpoint.pth", **options):
    torch.save(content, tmp_path / name)
    return read_checkpoint(tmp_path / name, **options)


def test_openminds_primus_is_read_whole_and_its_decoder_left_out(tmp_path):
    network = foreign.primus()
    pretrained = read(tmp_path, foreign.primus_checkpoint(network))
    encoder = build_encoder(pretrained.architecture)
    report = load_encoder(encoder, pretrained)

    assert report.fraction == 1
    assert pretrained.architecture["heads"] == 2
    assert pretrained.left_out == {"up_projection": 10}
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    assert "OpenMind, or SSL3D" in describe_encoder(pretrained)


def test_primus_m_is_known_by_its_width_where_no_plan_tells_the_heads(tmp_path):
    state = foreign.primus().state_dict()
    wide = {name: torch.zeros([864 if size == 24 else size for size in tensor.shape]) for name, tensor in state.items()}
    pretrained = read(tmp_path, {"network_weights": wide})

    assert pretrained.architecture["heads"] == 12
    assert pretrained.architecture["grid"] == [4, 4, 4]


def test_a_primus_of_unknown_heads_is_read_but_not_built(tmp_path):
    pretrained = read(tmp_path, {"network_weights": foreign.primus().state_dict()})

    with pytest.raises(UserError, match="does not tell its heads"):
        build_encoder(pretrained.architecture)


@pytest.mark.parametrize("prefix", ["encoder.", "module.student."])
def test_a_team_may_keep_its_primus_anywhere(tmp_path, prefix):
    state = {prefix + name: tensor for name, tensor in foreign.primus().state_dict().items()}
    content = foreign.primus_checkpoint(foreign.primus()) | {"network_weights": state}

    assert load_encoder(build_encoder(read(tmp_path, content).architecture), read(tmp_path, content)).fraction == 1


@pytest.mark.parametrize("aliases", [True, False])
def test_amaes_is_nnunets_encoder_by_other_names(tmp_path, aliases):
    network = foreign.resenc_unet()
    pretrained = read(tmp_path, foreign.amaes_checkpoint(network, aliases), "resenc_unet_b.ckpt")
    encoder = build_encoder(pretrained.architecture)

    assert load_encoder(encoder, pretrained).fraction == 1
    assert (pretrained.origin, pretrained.method, pretrained.step) == ("asparagus", "AMAES", 1000)
    expected = network.encoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())
    assert "AMAES" in describe_encoder(pretrained)


@pytest.mark.parametrize("channels", [1, 2])
def test_brainsegfounder_is_known_by_its_file_and_by_its_heads(tmp_path, channels):
    content = foreign.ssl_head_checkpoint(channels)
    pretrained = read(tmp_path, content, "model_weights_UKB-pretrain.pt")
    encoder = build_encoder({**pretrained.architecture, "in_channels": 1})

    assert pretrained.architecture["merging"] == "monai_1.4"
    assert pretrained.architecture["in_channels"] == channels
    assert load_encoder(encoder, pretrained).fraction > 0.99
    assert "BrainSegFounder" in describe_encoder(pretrained)
    assert read(tmp_path, content, "renamed.pt").architecture["merging"] is None


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder."])
def test_brainiacs_vit_is_refused_by_its_name(tmp_path, prefix):
    vit = ViT(
        in_channels=1, img_size=(32,) * 3, patch_size=(16,) * 3, hidden_size=24, mlp_dim=24, num_layers=1, num_heads=2
    )
    state = {prefix + name: tensor for name, tensor in vit.state_dict().items()}

    with pytest.raises(UserError, match="BrainIAC has it"):
        read(tmp_path, {"state_dict": state})


@pytest.mark.parametrize(
    ("name", "words"),
    [("model.encoder.in_conv.conv1.conv.weight", "FOMO25"), ("module.layer1.0.conv1.weight", "MedicalNet")],
)
def test_other_networks_are_refused_by_their_names(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        read(tmp_path, {"state_dict": {name: torch.zeros(2, 2)}})
