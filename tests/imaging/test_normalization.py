import numpy as np
import pytest

from nnunet_ssl.imaging.normalization import PercentileZScoreNormalization

RNG = np.random.default_rng(0)


def normalise(image, seg):
    return PercentileZScoreNormalization(use_mask_for_norm=True, intensityproperties={}).run(image, seg)


@pytest.fixture
def image():
    return RNG.normal(100, 20, (12, 14, 16)).astype(np.float32)


@pytest.fixture
def foreground():
    return np.where(RNG.random((12, 14, 16)) < 0.6, 0, -1).astype(np.int8)


def test_the_foreground_has_mean_0_and_deviation_1_and_the_rest_is_0(image, foreground):
    result = normalise(image, foreground)
    inside = result[foreground >= 0].astype(np.float64)
    assert abs(inside.mean()) < 1e-6
    assert abs(inside.std() - 1) < 1e-5
    assert not result[foreground < 0].any()
    assert result.dtype == np.float32


def test_what_lies_outside_the_foreground_does_not_matter(image, foreground):
    other = np.where(foreground >= 0, image, 1e6).astype(np.float32)
    np.testing.assert_array_equal(normalise(image, foreground), normalise(other, foreground))


def test_a_change_of_scale_and_offset_does_not_matter(image, foreground):
    np.testing.assert_allclose(normalise(3 * image + 7, foreground), normalise(image, foreground), atol=1e-4)


def test_outliers_are_clipped_to_the_percentiles(image, foreground):
    spiked = image.copy()
    spiked[tuple(np.argwhere(foreground >= 0)[0])] = 1e9
    assert normalise(spiked, foreground).max() < 4


@pytest.mark.parametrize("value", [0.0, 5.0, 1e30])
def test_a_constant_foreground_is_refused(foreground, value):
    with pytest.raises(ValueError, match="constant"):
        normalise(np.full(foreground.shape, value, np.float32), foreground)


def test_a_missing_foreground_is_refused(image):
    with pytest.raises(ValueError, match="needs the foreground"):
        normalise(image, None)
