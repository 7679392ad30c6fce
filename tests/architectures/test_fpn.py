"""FPNDecoder: sizes, parameters, and a voxel shuffle that puts every channel where it belongs."""

import pytest
import torch

from nnunet_ssl.architectures.fpn import FPNDecoder, shuffle_voxels


def test_parameter_count_is_the_papers():
    decoder = FPNDecoder((48, 96, 192, 384, 768), 1)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 158_728


@pytest.mark.parametrize("size", [(32, 32, 32), (33, 40, 47)])
def test_output_has_the_size_of_the_input(size):
    decoder = FPNDecoder((12, 24, 48), 3, width=8)
    features = [torch.randn(2, 12 * 2**i, *(-(-s // 2 ** (i + 1)) for s in size)) for i in range(3)]
    assert decoder(features, size).shape == (2, 3, *size)


def test_shuffle_undoes_the_cutting_into_cells():
    volume = torch.randn(2, 3, 6, 8, 10)
    cells = volume.reshape(2, 3, 3, 2, 4, 2, 5, 2).permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(2, 24, 3, 4, 5)
    assert torch.equal(shuffle_voxels(cells, 2), volume)


def test_every_level_reaches_the_output():
    decoder = FPNDecoder((12, 24, 48), 1, width=8)
    features = [torch.randn(1, 12 * 2**i, 8 // 2**i, 8 // 2**i, 8 // 2**i, requires_grad=True) for i in range(3)]
    decoder(features, (16, 16, 16)).square().sum().backward()
    assert all(level.grad.abs().max() > 0 for level in features)
