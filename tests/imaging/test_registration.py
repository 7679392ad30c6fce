from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from nnunet_ssl.imaging.geometry import Volume, read_volume, resample_onto
from nnunet_ssl.imaging.registration import (
    agreement,
    foreground,
    judging_copy,
    normalized_mutual_information,
    register_rigid,
)
from nnunet_ssl.limits import MINIMUM_AGREEMENT
from nnunet_ssl.phantom.layouts import write_isles
from nnunet_ssl.phantom.layouts.isles import flair_motion

UNMOVED = np.eye(4)


def motion(rotation_deg, shift_mm):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", rotation_deg, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


def volume_of(shape, spacing, levels, moved_by=UNMOVED, flips=(1, 1, 1)):
    """A small brain of three tissues in RAS mm, scanned after it moved."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag(np.multiply(spacing, flips))
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    where = np.linalg.inv(moved_by) @ affine
    points = index @ where[:3, :3].T + where[:3, 3]
    rng = np.random.default_rng(3)
    radius = np.array([30, 37, 27])
    brain = ((points / radius) ** 2).sum(-1) < 1
    image = np.where(brain, levels[0], 0.0)
    for _ in range(25):
        blob = (((points - rng.uniform(-0.75, 0.75, 3) * radius) / rng.uniform(4, 11, 3)) ** 2).sum(-1) < 1
        image[blob & brain] = levels[rng.integers(3)]
    return Volume(ndimage.gaussian_filter(image, 0.5).astype(np.float32), affine)


def residual(found, truth, fixed):
    points = np.argwhere(fixed.array > 0)[::23] @ fixed.affine[:3, :3].T + fixed.affine[:3, 3]
    difference = points @ (found - truth)[:3, :3].T + (found - truth)[:3, 3]
    return np.linalg.norm(difference, axis=1).max()


FIXED = volume_of((36, 42, 32), (2, 2, 2), (100, 80, 140), flips=(-1, 1, 1))
MOTION = motion((6, -5, 7), (5, -8, 4))


@pytest.fixture(scope="module")
def moving():
    return volume_of((80, 94, 16), (1, 1, 5), (60, 90, 20), moved_by=MOTION)


def test_a_known_motion_between_two_contrasts_and_grids_is_recovered_within_a_millimetre(moving):
    result = register_rigid(FIXED, moving)
    assert result.accepted and result.reason == ""
    assert residual(result.matrix, MOTION, FIXED) < 1
    assert result.information[1] > result.information[0]
    assert result.overlap[1] > 0.95 > result.overlap[0]
    back = resample_onto(moving, FIXED, result.matrix)
    assert back.array.shape == FIXED.array.shape and np.array_equal(back.affine, FIXED.affine)


def test_registration_gives_the_same_bits_again(moving):
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    first, *others = (register_rigid(FIXED, moving) for _ in range(5))
    for other in others:
        np.testing.assert_array_equal(other.matrix, first.matrix)
        assert replace(other, matrix=None) == replace(first, matrix=None)
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == threads


def test_images_that_lie_well_stay(moving):
    result = register_rigid(FIXED, volume_of((72, 84, 64), (1, 1, 1), (60, 90, 20)))
    assert result.accepted
    assert residual(result.matrix, UNMOVED, FIXED) < 0.5


def test_a_header_that_places_the_image_elsewhere_altogether_is_mended(moving):
    elsewhere = motion((0, 0, 0), (120, -60, 90))
    lost = Volume(moving.array, elsewhere @ moving.affine)
    result = register_rigid(FIXED, lost)
    assert result.accepted
    assert residual(result.matrix, elsewhere @ MOTION, FIXED) < 1


def noise(shape):
    return np.random.default_rng(0).random(shape).astype(np.float32)


@pytest.mark.parametrize(
    "array",
    [noise((80, 94, 16)), np.full((80, 94, 16), 7, np.float32), np.zeros((80, 94, 16), np.float32)],
    ids=["noise", "constant", "nothing"],
)
def test_an_image_of_something_else_keeps_its_headers_place_with_a_reason(array, moving):
    result = register_rigid(FIXED, moving.with_array(array))
    assert not result.accepted and result.reason
    np.testing.assert_array_equal(result.matrix, np.eye(4))


@pytest.mark.parametrize("shape", [(2, 2, 2), (5, 3, 40), (64, 2, 3)])
def test_volumes_too_small_to_register_are_no_crash(shape):
    tiny = Volume(noise(shape), np.diag([2.0, 2, 2, 1]))
    result = register_rigid(tiny, Volume(noise((6, 8, 4)), np.diag([1.0, 1, 5, 1])))
    assert not result.accepted
    assert "\n" not in result.reason
    np.testing.assert_array_equal(result.matrix, np.eye(4))


@pytest.mark.parametrize("shape, spacing", [((72, 84, 64), (1, 1, 1)), ((80, 94, 16), (1, 1, 5))])
def test_two_contrasts_of_one_head_agree_where_they_lie_whichever_comes_first(shape, spacing):
    fixed, moving = judging_copy(FIXED), judging_copy(volume_of(shape, spacing, (60, 90, 20)))
    assert agreement(fixed, moving) > MINIMUM_AGREEMENT
    assert agreement(fixed, moving) == pytest.approx(agreement(moving, fixed), rel=0.2)


@pytest.mark.parametrize(
    "displaced",
    [
        *(motion((0, 0, 0), 12 * axis) for axis in np.eye(3)),
        *(motion((0, 0, 0), -25 * axis) for axis in np.eye(3)),
        motion((20, 0, 0), (0, 0, 0)),
        motion((0, -25, 10), (4, 4, 4)),
        motion((0, 0, 0), (400, 0, 0)),
    ],
)
def test_two_contrasts_whose_headers_disagree_by_centimetres_do_not_agree(displaced):
    other = volume_of((72, 84, 64), (1, 1, 1), (60, 90, 20))
    fixed, moving = judging_copy(FIXED), judging_copy(Volume(other.array, displaced @ other.affine))
    assert agreement(fixed, moving) < MINIMUM_AGREEMENT
    assert agreement(fixed, moving, displaced) > MINIMUM_AGREEMENT, "once their true place is told, they do"


def test_noise_agrees_with_nothing(moving):
    fixed, other = judging_copy(FIXED), judging_copy(moving.with_array(noise((80, 94, 16))))
    assert agreement(fixed, other) < MINIMUM_AGREEMENT


def test_mutual_information_of_an_image_with_itself_is_two_and_with_noise_one():
    first, second = noise(20000), np.random.default_rng(1).random(20000)
    assert normalized_mutual_information(first, first) == pytest.approx(2)
    assert normalized_mutual_information(first, 3 - first) == pytest.approx(2)
    assert normalized_mutual_information(first, second) == pytest.approx(1, abs=0.02)


def test_the_foreground_is_what_is_not_zero_or_what_stands_out_of_the_noise():
    brain = FIXED.array > 60
    stripped = np.where(brain, FIXED.array, 0)
    np.testing.assert_array_equal(foreground(stripped), brain)
    noisy = foreground(stripped + np.abs(np.random.default_rng(0).normal(0, 3, brain.shape)))
    assert noisy[brain].mean() > 0.99 and noisy[~brain].mean() < 0.05


@pytest.mark.slow
def test_the_phantoms_flair_is_brought_onto_dwi_within_a_millimetre(tmp_path):
    folder = write_isles(tmp_path / "ISLES-2022", n_cases=4, voxel_mm=2.5, seed=1)
    for number in (1, 4):  # 4 has thick slices
        scans = folder / f"sub-strokecase{number:04d}" / "ses-0001"
        dwi = read_volume(next(scans.glob("dwi/sub*_dwi.nii.gz")))
        flair = read_volume(next(scans.glob("anat/sub*_FLAIR.nii.gz")))
        result = register_rigid(dwi, flair)
        assert result.accepted
        assert residual(result.matrix, flair_motion(1, number), dwi) < 1
        assert nib.aff2axcodes(dwi.affine) != nib.aff2axcodes(flair.affine), "the grids differ in orientation too"
