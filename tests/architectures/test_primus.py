"""PrimusEncoder against dynamic-network-architectures' own class, and what it does beyond it."""

import foreign
import pytest
import torch

from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.architectures.primus import PrimusEncoder, PrimusNetwork
from nnunet_ssl.errors import UserError

SIZES = {**foreign.PRIMUS, "mask_token": False}


def ours_of(theirs, grid):
    network = PrimusNetwork(1, theirs.up_projection.decode[-1].out_channels, **SIZES, grid=grid).eval()
    state = theirs.state_dict()
    network.encoder.load_state_dict({k: v for k, v in state.items() if k.startswith(("eva", "down"))}, strict=True)
    network.decoder.load_state_dict({k[len("up_projection.") :]: v for k, v in state.items() if k.startswith("up_")})
    return network


@pytest.mark.parametrize("shape", [(32, 32, 32), (16, 32, 48)])
def test_features_and_logits_are_those_of_the_original(shape):
    theirs = foreign.primus(input_shape=shape, num_classes=3)
    ours = ours_of(theirs, [length // 8 for length in shape])
    x = torch.randn(2, 1, *shape)

    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_another_patch_gets_the_resized_position_embedding_as_nnunet_resizes_it():
    theirs, larger = foreign.primus((32, 32, 32)), foreign.primus((48, 32, 40))
    positions = theirs.eva.pos_embed.detach().transpose(1, 2).reshape(1, -1, 4, 4, 4)
    resized = torch.nn.functional.interpolate(positions, size=(6, 4, 5), mode="trilinear")
    state = {**theirs.state_dict(), "eva.pos_embed": resized.flatten(2).transpose(1, 2)}
    larger.load_state_dict(state)
    x = torch.randn(1, 1, 48, 32, 40)

    torch.testing.assert_close(ours_of(theirs, [4, 4, 4])(x), larger(x), rtol=1e-5, atol=1e-6)


def test_a_size_that_is_no_multiple_of_8_is_padded_and_cut():
    network = PrimusNetwork(2, 3, **SIZES, grid=[2, 2, 2]).eval()

    assert network(torch.randn(1, 2, 17, 8, 30)).shape == (1, 3, 17, 8, 30)
    assert network.encoder(torch.randn(1, 2, 17, 8, 30))[0].shape == (1, 24, 3, 1, 4)


def test_what_lies_in_hidden_tokens_is_not_seen_and_what_lies_beside_is():
    torch.manual_seed(0)
    encoder = PrimusEncoder(1, **foreign.PRIMUS, grid=[2, 2, 2]).eval()
    mask = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    mask[0, 0, 1, 0] = True
    x = torch.randn(1, 1, 16, 16, 16)
    inside, outside = x.clone(), x.clone()
    inside[0, 0, :8, 8:, :8] += 1
    outside[0, 0, 8:, 8:, :8] += 1
    seen = encoder(x, mask)[0]

    torch.testing.assert_close(encoder(inside, mask)[0], seen)
    assert not torch.allclose(encoder(outside, mask)[0], seen)
    with pytest.raises(ValueError, match="mask has shape"):
        encoder(x, mask[:, :1])


def test_recomputing_blocks_changes_no_gradient():
    x = torch.randn(1, 1, 16, 16, 16)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = PrimusEncoder(1, **SIZES, grid=[2, 2, 2], checkpointing=checkpointing)
        encoder(x)[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])

    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


def test_a_prediction_does_not_keep_a_training_from_the_same_grid():
    network = PrimusNetwork(1, 2, **SIZES, grid=[2, 2, 2])
    x = torch.randn(1, 1, 40, 8, 24)  # of no other test
    with torch.inference_mode():
        network(x)
    network(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_an_export_does_not_keep_a_training_from_the_same_grid():
    """What is cached while fake tensors are traced would make fake tensors of all maps after it."""
    encoder = PrimusEncoder(1, **SIZES, grid=[2, 2, 2])
    x = torch.randn(1, 1, 8, 40, 24)  # of no other test
    exported = torch.export.export(encoder, (x,), strict=False)
    own = encoder(x)[0]
    assert type(own) is torch.Tensor
    torch.testing.assert_close(exported.module()(x)[0], own)


@pytest.mark.parametrize("heads", [None, 5, 8])
def test_heads_that_the_rotary_embedding_cannot_have_are_refused(heads):
    with pytest.raises(UserError, match="heads"):
        build_encoder({"backbone": "primus", "embed_dim": 24, "depth": 1, "heads": heads, "grid": [2, 2, 2]})
