"""The parameters of an encoder by depth."""

import pytest
import torch
from torch import nn

from nnunet_ssl.architectures.backbones.base import parameters_by_depth
from nnunet_ssl.architectures.networks import build_encoder

SWIN = {"backbone": "swin", "in_channels": 1, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 3}
RESENC = {"backbone": "resenc", "in_channels": 1, "features": [4] * 11, "blocks": [1] * 11}
PRIMUS = {"backbone": "primus", "in_channels": 1, "embed_dim": 24, "depth": 6, "heads": 2, "grid": [2, 2, 2]}
STAGES = [f"stage{number}" for number in range(1, 12)]
DEPTHS = {
    "swin": (SWIN, ["embedding", "stage1", "stage2"]),
    "swin without mask token": ({**SWIN, "mask_token": False}, ["embedding", "stage1", "stage2"]),
    "resenc": (RESENC, ["stem", *STAGES]),
    "primus": (PRIMUS, ["embedding", "blocks1to2", "blocks3to4", "block5", "block6", "norm"]),
    "primus of two blocks": ({**PRIMUS, "depth": 2}, ["embedding", "block1", "block2", "norm"]),
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_every_parameter_of_a_backbone_lies_at_one_of_its_depths(kind):
    architecture, expected = DEPTHS[kind]
    encoder = build_encoder(architecture)
    depths = parameters_by_depth(encoder)
    assert list(depths) == expected, "finest first, and nothing is left for other"
    places = [place for members in depths.values() for place in members]
    assert sorted(places) == list(range(len([*encoder.parameters()])))
    names = [name for name, _ in encoder.named_parameters()]
    for depth, members in depths.items():
        if depth.startswith("stage"):
            assert {names[place].split(".")[1] for place in members} == {str(int(depth[5:]) - 1)}, depth
    assert all(place in depths[expected[0]] for place, name in enumerate(names) if "token" in name or "pos_" in name)


@pytest.mark.parametrize("kind", ["swin", "resenc", "primus"])
def test_gradients_of_a_depth_come_from_its_modules_alone(kind):
    """What reaches only the finest map reaches only the depths before it."""
    encoder = build_encoder(DEPTHS[kind][0] if kind != "resenc" else {**RESENC, "features": [4] * 3, "blocks": [1] * 3})
    encoder(torch.randn(1, 1, 16, 16, 16))[0].square().sum().backward()
    gradients = [parameter.grad for parameter in encoder.parameters()]
    depths = parameters_by_depth(encoder)
    reached = [depth for depth, members in depths.items() if any(gradients[place] is not None for place in members)]
    expected = {"swin": ["embedding"], "resenc": ["stem", "stage1", "stage2"], "primus": DEPTHS["primus"][1]}
    assert reached == expected[kind]


class Foreign(nn.Module):
    """An encoder from elsewhere, which has an attribute by a name that means depths to others."""

    depths = (1, 1)
    channels, strides = (2, 2), (1, 1)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.first, self.second = nn.Conv3d(1, 2, 1), nn.Sequential(nn.Conv3d(2, 2, 1), nn.Conv3d(2, 2, 1))

    def parts(self):
        return [self.first, self.second]


def test_an_encoder_that_does_not_tell_its_depths_is_divided_by_its_parts():
    names = [name for name, _ in Foreign().named_parameters()]
    depths = parameters_by_depth(Foreign())
    assert {depth: [names[place] for place in members] for depth, members in depths.items()} == {
        "part1": ["first.weight", "first.bias"],
        "part2": ["second.0.weight", "second.0.bias", "second.1.weight", "second.1.bias"],
        "other": ["scale"],
    }
    assert list(depths)[-1] == "other"
