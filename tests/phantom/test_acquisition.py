from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from nnunet_ssl.phantom.acquisition import Quality, ScanGrid, acquire, draw_quality, move, resample_onto_scan, scan_grid

SILENT = Quality(noise=0, bias=0, texture=0)


def test_a_stripped_scan_is_zero_outside_the_brain_and_nowhere_inside(head, rng):
    image = acquire(head(), "t2", replace(draw_quality(rng), stripped=True), rng)
    assert not image[~head().brain].any()
    assert image[head().brain].min() > 0


def test_noise_and_bias_have_the_strength_asked_for(head):
    white = head().fractions["wm"] > 0.99

    def spread(**quality):
        image = acquire(head(), "t1", replace(SILENT, **quality), np.random.default_rng(0))
        return image[white].std() / image[white].mean()

    assert spread() < 0.01
    assert spread(noise=0.05) == pytest.approx(0.05 / 1.5, rel=0.35)  # white matter is about 1.5 on T1
    assert 0.05 < spread(bias=0.15) < 0.25


def test_thick_slices_blur_across_the_slices_only(head):
    sharp, thick = (
        acquire(head(), "t1", replace(SILENT, thickness_mm=mm), np.random.default_rng(0)) for mm in (None, 12.0)
    )
    roughness = [[np.abs(np.diff(image, axis=axis)).mean() for axis in range(3)] for image in (sharp, thick)]
    assert roughness[1][2] < 0.6 * roughness[0][2]
    assert roughness[1][2] / roughness[0][2] < 0.75 * roughness[1][0] / roughness[0][0]


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "PSR", "LPI"])
def test_a_scans_own_grid_is_stored_as_asked_and_shows_the_same_head(head, orientation):
    """Resampled back onto the head's grid by the affines alone, the scan agrees with one made there."""
    grid = scan_grid(head(), (3.0, 3.0, 4.0), orientation=orientation, tilt=(5, -8, 3))
    assert nib.aff2axcodes(grid.affine) == tuple(orientation)
    assert sorted(np.round(nib.affines.voxel_sizes(grid.affine), 6)) == [3, 3, 4]
    here = acquire(head(), "t2", SILENT, np.random.default_rng(0))
    there = acquire(head(), "t2", SILENT, np.random.default_rng(0), grid)
    back = resample_onto_scan(there, grid.affine, ScanGrid(head().grid.shape, head().grid.affine))
    inside = head().depth_mm < -10
    assert np.corrcoef(back[inside], here[inside])[0, 1] > 0.9


def test_a_turned_head_turns_about_the_brain():
    motion = move(np.eye(4), (0, 0, 90), (1, 2, 3))
    centre = np.array([0, -18, 10, 1.0])
    assert np.allclose((motion @ centre)[:3] - centre[:3], (1, 2, 3))
    assert np.allclose(motion[:3, :3] @ (1, 0, 0), (0, 1, 0))
