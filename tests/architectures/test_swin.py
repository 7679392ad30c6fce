"""SwinEncoder against MONAI's SwinTransformer, and what MONAI's does not promise."""

import pytest
import torch

from nnunet_ssl.architectures.origins import from_monai
from nnunet_ssl.architectures.swin import SwinEncoder

SMALL = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}

SIZES = [
    (64, 64, 64),  # every grid divides by the window
    (40, 56, 34),  # none does
    (33, 47, 61),  # nor does the input by the patch
]


def small_encoder(**changes) -> SwinEncoder:
    torch.manual_seed(0)
    return SwinEncoder(**{**SMALL, **changes})


@pytest.mark.parametrize("size", SIZES)
def test_maps_equal_monai(twins, size):
    ours, theirs = twins
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    for own, reference in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(own, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_monai(twins, size):
    ours, theirs = twins
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = [torch.randn_like(level) for level in theirs(x)]
    for encoder, volume in zip((ours, theirs), inputs, strict=True):
        sum((level * weight).sum() for level, weight in zip(encoder(volume), weights, strict=True)).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-10)
    own = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(own[from_monai(name)], parameter.grad, rtol=1e-10, atol=1e-10)


def test_parameter_counts_are_those_of_the_paper():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(SwinEncoder(conv_norm="instance", mask_token=False)) == 20_522_274
    assert count(SwinEncoder()) == 20_525_202
