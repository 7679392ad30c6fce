"""Masks on the bottleneck grid, and the error over what they hide."""

import pytest
import torch

from nnunet_ssl.pretraining.objectives.masked import (
    bottleneck_grid,
    draw_masks,
    error_of_the_mean,
    reconstruction_error,
    voxel_mask,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_grid_covers_the_patch():
    assert bottleneck_grid((96, 96, 96), 32) == (3, 3, 3)
    assert bottleneck_grid((100, 64, 32), 32) == (4, 2, 1)


def test_the_share_of_hidden_cells_is_uniform_between_the_two_ratios():
    masks = draw_masks(20_000, (10, 10, 10), (0.5, 0.75), generator())
    share = masks.float().mean(dim=(1, 2, 3))
    assert share.min() >= 0.5
    assert share.max() <= 0.75
    quarters = torch.histc(share, bins=5, min=0.5, max=0.75) / len(share)
    torch.testing.assert_close(quarters, torch.full((5,), 0.2), atol=0.02, rtol=0)


def test_every_cell_is_hidden_equally_often():
    masks = draw_masks(20_000, (3, 3, 3), (0.5, 0.75), generator())
    torch.testing.assert_close(masks.float().mean(dim=0), torch.full((3, 3, 3), 0.625), atol=0.02, rtol=0)


def test_something_is_hidden_and_something_visible_even_on_two_cells():
    masks = draw_masks(100, (2, 1, 1), (0.05, 0.95), generator())
    assert (masks.sum(dim=(1, 2, 3)) == 1).all()


def test_masks_follow_from_the_generator():
    draws = [draw_masks(8, (3, 3, 3), (0.5, 0.75), generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_cell_covers_its_stride_of_voxels_and_the_last_one_what_is_left():
    mask = torch.zeros(1, 2, 2, 1, dtype=torch.bool)
    mask[0, 1, 0, 0] = True
    voxels = voxel_mask(mask, (40, 64, 20), 32)
    expected = torch.zeros(1, 1, 40, 64, 20, dtype=torch.bool)
    expected[:, :, 32:, :32] = True
    assert torch.equal(voxels, expected)


def test_only_hidden_voxels_count():
    target = torch.randn(2, 1, 8, 8, 8, generator=generator())
    mask = draw_masks(2, (2, 2, 2), (0.5, 0.75), generator())
    hidden = voxel_mask(mask, (8, 8, 8), 4)
    prediction = torch.where(hidden, target + 3.0, target - 100.0)
    torch.testing.assert_close(reconstruction_error(prediction, target, mask, 4), torch.tensor([9.0, 9.0]))


def test_each_view_weighs_the_same_however_much_of_it_is_hidden():
    target = torch.zeros(2, 1, 8, 2, 2)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])[:, :, None, None]
    prediction = torch.stack([torch.full((1, 8, 2, 2), 1.0), torch.full((1, 8, 2, 2), 2.0)])
    assert reconstruction_error(prediction, target, mask, 2).tolist() == [1.0, 4.0]


def test_the_error_of_the_mean_is_the_variance_of_the_hidden_voxels():
    target = torch.randn(3, 1, 8, 8, 8, generator=generator())
    mask = draw_masks(3, (2, 2, 2), (0.5, 0.75), generator())
    hidden = voxel_mask(mask, (8, 8, 8), 4)
    expected = [target[n][hidden[n]].var(unbiased=False).item() for n in range(3)]
    assert error_of_the_mean(target, mask, 4).tolist() == pytest.approx(expected, rel=1e-5)
