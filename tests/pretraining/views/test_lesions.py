"""Synthetic lesions: what is drawn, where it lies, and what it changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate

from nnunet_ssl.pretraining.views.lesions import KINDS, LesionRanges, _places, draw_lesions, lesion_shapes, put

RANGES = LesionRanges(diameter=(2.0, 8.0), contrast=(0.5, 2.5), opposite=0.5)
SIZE = (24, 28, 20)
CPU = torch.device("cpu")


def drawn(ranges=RANGES, *, views=2, seed=0, step=0, places=range(4)):
    return draw_lesions(views, ranges, seed=seed, step=step, places=places)


def heads(count, seed=0):
    """Noise in ellipsoids that differ, zero around them."""
    generator = torch.Generator().manual_seed(seed)
    lines = [torch.linspace(-1, 1, length) for length in SIZE]
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)
    axes = 0.7 + 0.3 * torch.rand(count, 1, 1, 1, 3, generator=generator)
    brain = ((grid / axes).norm(dim=-1) < 1)[:, None]
    return torch.randn(brain.shape, generator=generator) * brain, brain


def cropped(mask):
    """The part of a mask that holds it, which says its shape wherever it lies."""
    places = mask[0].nonzero()
    low, high = places.min(dim=0).values, places.max(dim=0).values + 1
    return mask[0][tuple(slice(a, b) for a, b in zip(low, high))]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), views=st.sampled_from([1, 2]), opposite=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_lesion_lies_inside_the_brain_and_changes_no_other_voxel(seed, views, opposite):
    lesions = drawn(replace(RANGES, opposite=opposite), seed=seed, views=views)
    scans, brain = heads(len(lesions.of_view), seed)
    given_scans, given_brain = scans.clone(), brain.clone()
    result = put(lesions, scans, brain)
    assert torch.equal(scans, given_scans) and torch.equal(brain, given_brain)
    assert result.placed.all()
    assert not (result.masks & ~brain).any()
    assert torch.equal(result.views != scans, result.masks), "each of its voxels shows it, and no other one does"


def test_a_lesion_is_the_same_in_both_of_its_heads():
    lesions = drawn(places=range(6))
    count = len(lesions.kind)
    result = put(lesions, *heads(2 * count))
    assert len(set(np.round(lesions.diameter, 6))) == count
    for lesion, second in enumerate(lesions.second):
        assert lesions.of_view[lesion] == lesions.of_view[second] == lesion
        assert second % count != lesion % count, "the other view of a pair is the same head"
        shape = cropped(result.masks[lesion])
        assert torch.equal(shape, cropped(result.masks[second]))
        assert shape.sum() == max(1, round(np.pi / 6 * lesions.diameter[lesion] ** 3))


def test_where_it_lies_and_how_strong_it_is_belong_to_the_head():
    lesions = drawn()
    assert len(set(lesions.where)) == len(lesions.where)
    assert len(set(np.abs(lesions.contrast))) == len(lesions.contrast)


@pytest.mark.parametrize("opposite", [0, 1])
def test_a_lesion_is_as_often_dark_in_the_other_head_as_was_asked_for(opposite):
    lesions = drawn(replace(RANGES, opposite=float(opposite)), places=range(30))
    signs = np.sign(lesions.contrast)
    assert (signs[:30] == signs[lesions.second] * (-1 if opposite else 1)).all()
    assert set(signs[:30]) == {-1, 1}


def test_sizes_and_contrasts_stay_in_their_ranges_and_sizes_are_log_uniform():
    lesions = drawn(places=range(400))
    assert (lesions.diameter >= 2).all() and (lesions.diameter <= 8).all()
    assert np.mean(lesions.diameter < 4) == pytest.approx(0.5, abs=0.08)  # the geometric mean of the range
    assert (np.abs(lesions.contrast) >= 0.5).all() and (np.abs(lesions.contrast) <= 2.5).all()
    assert set(lesions.kind) == set(range(len(KINDS)))


def test_draws_follow_from_seed_step_and_place_alone():
    whole, half = drawn(places=range(8)), drawn(places=range(4, 8))
    for name in ("coarse", "stretch", "diameter", "kind"):
        assert np.array_equal(getattr(whole, name)[4:], getattr(half, name))
    by_view = whole.where.reshape(2, 8)[:, 4:]
    assert np.array_equal(by_view.ravel(), half.where)
    assert whole.half == half.half, "boxes do not depend on which lesions a process draws"
    for other in (drawn(seed=1), drawn(step=1)):
        assert not np.isin(other.where, whole.where).any() and not np.isin(other.diameter, whole.diameter).any()


def test_a_lesion_changes_the_mean_by_its_contrast_and_leaves_as_much_texture_as_its_kind():
    lesions = drawn(places=range(12))
    scans, brain = heads(24)
    changes = put(lesions, scans, brain)
    _, weights = lesion_shapes(lesions, CPU)
    for view, lesion in enumerate(lesions.of_view):
        edge, texture_gone = list(KINDS.values())[lesions.kind[lesion]]
        mask, spread = changes.masks[view], scans[view][brain[view]].std(correction=0)
        weight = weights[lesion][weights[lesion] > 0]
        before, after = scans[view][mask], changes.views[view][mask]
        expected = before + weight * (texture_gone * (before.mean() - before) + float(lesions.contrast[view]) * spread)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
        if mask.sum() > 1:
            assert weight.max() == 1 and weight.min() < 1, "it is strongest inside and fades towards its edge"
            assert weight.min() == pytest.approx(0.1 / (edge + 0.1), rel=1e-3)


def test_places_are_those_where_every_voxel_finds_brain():
    """Against counting by convolution; 0 is the first place, just below 1 the last."""
    lesions = drawn(views=1, places=range(6))
    shapes = lesion_shapes(lesions, CPU)[0]
    _, brain = heads(3, seed=3)
    for where, last in ((0.0, 0), (1 - 1e-9, -1)):
        corner, placed = _places(shapes, brain[:, 0], np.full(3, where))
        assert placed.all()
        for view in range(3):
            outside = correlate((~brain[view, 0]).numpy().astype(float), shapes[view].numpy().astype(float), "valid")
            assert corner[view].tolist() == np.argwhere(outside.round() == 0)[last].tolist()


def test_a_view_without_room_for_its_lesion_stays_as_it_is():
    lesions = drawn(places=range(2))
    scans, brain = heads(4)
    brain[1] = False
    brain[2] = (
        torch.rand(brain[2].shape, generator=torch.Generator().manual_seed(0)) < 0.3
    )  # no lesion fits into crumbs
    result = put(lesions, scans, brain)
    assert result.placed.tolist() == [True, False, False, True]
    assert torch.equal(result.views[1:3], scans[1:3]) and not result.masks[1:3].any()
    assert result.views.isfinite().all()
