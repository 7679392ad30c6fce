"""The geometry of a view, against scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform

from nnunet_ssl.pretraining.views import spatial
from nnunet_ssl.pretraining.views.spatial import affine_matrix, resample, resample_all, source_box

NOTHING = {"flip_axis": None, "rotation": (0, 0, 0), "scale": (1, 1, 1), "shear": (0, 0, 0), "spacing": (1, 1, 1)}


def drawn_matrix(rng, spacing=(1, 1, 1)):
    """Any map within the paper's ranges."""
    return affine_matrix(
        flip_axis=rng.choice([None, 0, 1, 2]),
        rotation=rng.uniform(-0.3, 0.3, 3),
        scale=rng.uniform(0.9, 1.1, 3),
        shear=rng.uniform(-0.3, 0.3, 3),
        spacing=spacing,
    )


def warped_by_scipy(volume, matrix, centre, patch_size):
    offset = centre - matrix @ ((np.array(patch_size) - 1) / 2)
    return affine_transform(volume, matrix, offset, patch_size, order=1, mode="nearest")


def positions(matrix, centre, patch_size):
    """Where each voxel of a view lies in the volume: (3, X, Y, Z)."""
    offsets = np.indices(patch_size) - (np.array(patch_size).reshape(3, 1, 1, 1) - 1) / 2
    return np.tensordot(matrix, offsets, 1) + np.reshape(centre, (3, 1, 1, 1))


def test_no_transform_is_the_identity():
    np.testing.assert_array_equal(affine_matrix(**NOTHING), np.eye(3))


def test_the_parameters_mean_what_they_say():
    quarter = affine_matrix(**NOTHING | {"rotation": (np.pi / 2, 0, 0)})
    np.testing.assert_allclose(quarter @ [0, 1, 0], [0, 0, 1], atol=1e-12)
    np.testing.assert_array_equal(affine_matrix(**NOTHING | {"scale": (1, 1.1, 1)}), np.diag([1, 1.1, 1]))
    leaning = affine_matrix(**NOTHING | {"shear": (0.1, 0.2, 0.3)})
    np.testing.assert_array_equal(leaning, [[1, 0.1, 0.2], [0, 1, 0.3], [0, 0, 1]])
    np.testing.assert_array_equal(affine_matrix(**NOTHING | {"flip_axis": 2}), np.diag([1, 1, -1]))


def test_rotations_and_flips_keep_lengths_in_millimetres():
    spacing = np.array([3.0, 1.0, 0.5])
    for flip_axis in (None, 2):
        matrix = affine_matrix(**NOTHING | {"rotation": (0.2, -0.3, 0.1), "flip_axis": flip_axis, "spacing": spacing})
        in_mm = spacing[:, None] * matrix / spacing[None, :]
        np.testing.assert_allclose(in_mm @ in_mm.T, np.eye(3), atol=1e-12)
        assert not np.allclose(matrix @ matrix.T, np.eye(3), atol=0.1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), patch_size=st.tuples(*[st.integers(1, 17)] * 3))
def test_a_view_is_what_scipy_interpolates(seed, patch_size):
    """Inside, across and beyond the edge of the volume, which repeats; patches of odd and even size."""
    rng = np.random.default_rng(seed)
    volume = rng.normal(size=(14, 11, 12)).astype(np.float32)
    matrix, centre = drawn_matrix(rng, spacing=(1, 2, 0.7)), rng.uniform(-6, 18, 3)
    view = resample(torch.from_numpy(volume), matrix, centre, patch_size)
    assert view.dtype == torch.float32
    np.testing.assert_allclose(view, warped_by_scipy(volume, matrix, centre, patch_size), atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), patch_size=st.tuples(*[st.integers(1, 17)] * 3))
def test_the_box_holds_all_that_a_view_needs(seed, patch_size):
    rng = np.random.default_rng(seed)
    volume = torch.from_numpy(rng.normal(size=(14, 11, 12)).astype(np.float32))
    matrix, centre = drawn_matrix(rng, spacing=(1, 2, 0.7)), rng.uniform(-6, 18, 3)
    box = source_box(matrix, centre, patch_size, volume.shape)
    assert (box[:, 0] >= 0).all() and (box[:, 1] <= volume.shape).all() and (box[:, 0] < box[:, 1]).all()
    crop = volume[tuple(slice(*ends) for ends in box)]
    from_crop = resample(crop, matrix, centre - box[:, 0], patch_size)
    torch.testing.assert_close(from_crop, resample(volume, matrix, centre, patch_size), atol=2e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_box_holds_no_layer_that_a_view_does_not_need(seed):
    rng = np.random.default_rng(seed)
    matrix, centre, patch_size = drawn_matrix(rng), rng.uniform(40, 60, 3), (9, 12, 7)
    box = source_box(matrix, centre, patch_size, (100, 100, 100))
    where = positions(matrix, centre, patch_size).reshape(3, -1)
    np.testing.assert_array_equal(box[:, 0], np.floor(where.min(axis=1)))
    np.testing.assert_array_equal(box[:, 1], np.ceil(where.max(axis=1)) + 1)


@pytest.mark.parametrize("patch_size", [(8, 8, 8), (7, 8, 9)])
def test_a_view_without_transform_is_the_patch_itself(patch_size):
    volume = torch.randn(20, 20, 20)
    start = np.array([3, 5, 0])
    centre = start + (np.array(patch_size) - 1) / 2
    box = source_box(np.eye(3), centre, patch_size, volume.shape)
    np.testing.assert_array_equal(box, np.stack([start, start + patch_size], axis=1))
    view = resample(volume, np.eye(3), centre, patch_size)
    torch.testing.assert_close(view, volume[tuple(slice(*ends) for ends in box)], atol=1e-5, rtol=0)


def test_half_precision_is_interpolated_in_single():
    rng = np.random.default_rng(0)
    volume = torch.from_numpy(rng.normal(size=(14, 11, 12)).astype(np.float16))
    matrix, centre = drawn_matrix(rng), np.array([6.0, 5.0, 5.5])
    expected = resample(volume.float(), matrix, centre, (9, 9, 9))
    assert torch.equal(resample(volume, matrix, centre, (9, 9, 9)), expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6), parts=st.integers(1, 6), equal=st.booleans())
def test_views_of_one_batch_are_what_each_is_alone(seed, count, parts, equal):
    """Crops of any sizes side by side, within and beyond them, in one call or in several."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 15, (1 if equal else count, 3)).repeat(count if equal else 1, axis=0)
    crops = [torch.from_numpy(rng.normal(size=size).astype(np.float16)) for size in sizes]
    matrices = np.stack([drawn_matrix(rng, spacing=(1, 2, 0.7)) for _ in crops])
    centres, patch_size = rng.uniform(-6, 18, (count, 3)), tuple(rng.integers(1, 12, 3))
    limit = int(sizes.max(axis=0).prod()) * parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(spatial.VOXELS_AT_ONCE, "cpu", limit)
        together = resample_all(torch.cat([one.flatten() for one in crops]), sizes, matrices, centres, patch_size)
    alone = [resample(*one, patch_size) for one in zip(crops, matrices, centres)]
    torch.testing.assert_close(together, torch.stack(alone), atol=2e-5, rtol=0)


def test_the_number_of_calls_on_a_device_does_not_grow_with_the_batch(launches):
    """But for what is as large as the sum of the crops: only when they take more memory than they may."""

    def warp(count):
        rng = np.random.default_rng(0)
        sizes = rng.integers(8, 15, (count, 3))
        voxels = torch.empty(int(sizes.prod(axis=1).sum()), dtype=torch.float16, device="meta")
        matrices = np.stack([drawn_matrix(rng) for _ in sizes])
        return lambda: resample_all(voxels, sizes, matrices, sizes / 2, (9, 9, 9))

    assert launches(warp(3)) == launches(warp(40)) < 40


def test_numbers_of_a_flattened_grid_stand_for_places():
    index = torch.arange(3 * 4 * 5).view(6, 10)
    places = torch.unravel_index(index, (3, 4, 5))
    assert torch.equal(spatial.unravelled(index, (3, 4, 5)), torch.stack(places, dim=-1))
