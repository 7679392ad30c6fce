import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from nnunet_ssl.evaluation.lesions import PRESETS, compare_masks, dice
from nnunet_ssl.evaluation.matching import find_overlaps

MILLIMETRE = (1.0, 1.0, 1.0)
masks = arrays(bool, (5, 4, 3))


def mask(*boxes, shape=(12, 12, 12)):
    """A mask of boxes, each three (first, last + 1) ranges."""
    array = np.zeros(shape, dtype=bool)
    for box in boxes:
        array[tuple(slice(*side) for side in box)] = True
    return array


def test_a_case_computed_by_hand():
    # Reference: a 2x2x2 lesion and a 1-voxel lesion. Predicted: a 2x2x2 box shifted by 1 (4 voxels shared), and two
    # single voxels that touch nothing. Voxels of 1 x 2 x 3 mm hold 0.006 ml.
    reference = mask([(2, 4), (2, 4), (2, 4)], [(9, 10), (9, 10), (9, 10)])
    predicted = mask([(3, 5), (2, 4), (2, 4)], [(0, 1), (0, 1), (0, 1)], [(0, 1), (0, 1), (11, 12)])
    result = compare_masks(reference, predicted, spacing=(1, 2, 3))
    assert result.dice == pytest.approx(2 * 4 / (9 + 10))
    assert (result.reference_lesions, result.predicted_lesions) == (2, 3)
    assert (result.found_lesions, result.false_lesions) == (1, 2)
    assert result.lesion_f1 == pytest.approx(1 / (1 + (2 + 1) / 2))
    assert result.lesion_precision == pytest.approx(1 / 3)
    assert result.lesion_recall == pytest.approx(1 / 2)
    assert result.volume_difference_ml == pytest.approx(0.006)
    assert result.count_difference == 1
    assert (result.reference_ml, result.predicted_ml) == (pytest.approx(0.054), pytest.approx(0.060))
    assert result.detected == 1
    assert np.isnan(result.correctly_empty)


def test_one_prediction_over_two_lesions_finds_both():
    reference = mask([(2, 4), (2, 4), (2, 4)], [(7, 9), (2, 4), (2, 4)])
    predicted = mask([(2, 9), (2, 4), (2, 4)])
    result = compare_masks(reference, predicted, spacing=MILLIMETRE)
    assert (result.found_lesions, result.false_lesions, result.lesion_f1) == (2, 0, 1.0)
    assert result.count_difference == 1


@pytest.mark.parametrize(("connectivity", "lesions"), [(6, 3), (18, 2), (26, 1)])
def test_connectivity_decides_what_is_one_lesion(connectivity, lesions):
    # Second voxel shares an edge with the first, the third only a corner with the second.
    array = np.zeros((5, 5, 5), dtype=bool)
    array[1, 1, 1] = array[2, 2, 1] = array[3, 3, 2] = True
    overlaps = find_overlaps(array, array, connectivity)
    assert len(overlaps.reference) == len(overlaps.predicted) == overlaps.found == overlaps.supported == lesions


def test_presets_follow_the_challenges():
    assert (PRESETS["isles"].connectivity, PRESETS["atlas"].connectivity) == (26, 6)
    names = {field.name for field in dataclasses.fields(compare_masks(mask(), mask(), spacing=MILLIMETRE))}
    assert all(set(preset.official) <= names for preset in PRESETS.values())


def test_both_masks_empty_is_perfect_agreement():
    result = compare_masks(mask(), mask(), spacing=MILLIMETRE)
    ratios = (result.dice, result.lesion_f1, result.lesion_precision, result.lesion_recall, result.surface_dice)
    assert ratios == (1, 1, 1, 1, 1)
    assert (result.hd95_mm, result.volume_difference_ml, result.count_difference) == (0, 0, 0)
    assert result.correctly_empty == 1
    assert np.isnan(result.detected)


@pytest.mark.parametrize("reference_is_empty", [True, False])
def test_one_mask_empty_scores_zero_and_has_no_distance(reference_is_empty):
    full, empty = mask([(1, 3), (1, 3), (1, 3)]), mask()
    pair = (empty, full) if reference_is_empty else (full, empty)
    result = compare_masks(*pair, spacing=MILLIMETRE)
    ratios = (result.dice, result.lesion_f1, result.lesion_precision, result.lesion_recall, result.surface_dice)
    assert ratios == (0, 0, 0, 0, 0)
    assert np.isnan(result.hd95_mm)
    assert (result.correctly_empty == 0) if reference_is_empty else (result.detected == 0)


def test_distances_are_in_millimetres_along_each_axis():
    for axis, size in enumerate((1.0, 2.0, 3.0)):
        one = mask([(2, 3), (2, 3), (2, 3)])
        other = np.roll(one, 4, axis=axis)
        assert compare_masks(one, other, spacing=(1.0, 2.0, 3.0)).hd95_mm == pytest.approx(4 * size)


def test_hd95_leaves_out_the_farthest_twentieth():
    # A plate of 10 x 10 voxels agrees except for one voxel in a hundred, 5 mm away.
    reference = mask([(5, 6), (1, 11), (1, 11)])
    predicted = reference | mask([(10, 11), (5, 6), (5, 6)])
    assert compare_masks(reference, predicted, spacing=MILLIMETRE).hd95_mm == 0
    assert compare_masks(reference, mask([(7, 8), (1, 11), (1, 11)]), spacing=MILLIMETRE).hd95_mm == 2


def test_surface_dice_forgives_up_to_its_tolerance():
    reference = mask([(3, 7), (3, 7), (3, 7)])
    shifted = np.roll(reference, 2, axis=0)
    scores = [
        compare_masks(reference, shifted, spacing=MILLIMETRE, tolerance_mm=tolerance).surface_dice
        for tolerance in (0.0, 1.0, 2.0)
    ]
    assert scores == sorted(scores)
    assert scores[0] < 0.7
    assert scores[2] == 1.0
    far = mask([(0, 1), (0, 1), (0, 1)])
    assert compare_masks(reference, far, spacing=MILLIMETRE).surface_dice == 0


def test_a_lesion_at_the_border_of_the_image_has_a_surface():
    corner = mask([(0, 2), (0, 2), (0, 2)])
    result = compare_masks(corner, corner, spacing=MILLIMETRE)
    assert (result.hd95_mm, result.surface_dice) == (0, 1)


def official_f1(truth, prediction, connectivity):
    """The challenges' definition, spelt out with another library and one lesion at a time."""
    neighbours = ndimage.generate_binary_structure(3, {6: 1, 26: 3}[connectivity])
    true_labels, n_true = ndimage.label(truth, neighbours)
    predicted_labels, n_predicted = ndimage.label(prediction, neighbours)
    tp = sum(bool((prediction & (true_labels == lesion)).any()) for lesion in range(1, n_true + 1))
    fp = sum(not (truth & (predicted_labels == lesion)).any() for lesion in range(1, n_predicted + 1))
    fn = n_true - tp
    return tp / (tp + (fp + fn) / 2) if tp + fp + fn else 1.0


@settings(deadline=None, max_examples=60)
@given(masks, masks, st.sampled_from([6, 26]))
def test_f1_equals_the_official_definition(reference, predicted, connectivity):
    result = compare_masks(reference, predicted, spacing=MILLIMETRE, connectivity=connectivity)
    assert result.lesion_f1 == pytest.approx(official_f1(reference, predicted, connectivity))


@settings(deadline=None, max_examples=60)
@given(masks, masks)
def test_bounds_and_symmetries(one, other):
    forth, back = (compare_masks(*pair, spacing=(1.0, 1.5, 2.0)) for pair in ((one, other), (other, one)))
    assert forth.dice == back.dice == dice(one, other)
    for name in ("volume_difference_ml", "count_difference", "surface_dice", "hd95_mm"):
        np.testing.assert_allclose(getattr(forth, name), getattr(back, name), rtol=1e-5)
    for name in ("dice", "lesion_f1", "lesion_precision", "lesion_recall", "surface_dice"):
        assert 0 <= getattr(forth, name) <= 1
    precision, recall = forth.lesion_precision, forth.lesion_recall
    if precision + recall:
        assert forth.lesion_f1 == pytest.approx(2 * precision * recall / (precision + recall))


@settings(deadline=None, max_examples=20)
@given(masks)
def test_a_mask_agrees_fully_with_itself(array):
    result = compare_masks(array, array, spacing=MILLIMETRE)
    assert (result.dice, result.lesion_f1, result.hd95_mm, result.surface_dice) == (1, 1, 0, 1)


def test_masks_of_different_shape_are_a_programmers_error():
    with pytest.raises(ValueError, match="different shapes"):
        compare_masks(mask(), mask(shape=(3, 3, 3)), spacing=MILLIMETRE)
