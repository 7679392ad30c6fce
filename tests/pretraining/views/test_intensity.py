"""Each intensity transform against a plain reference: scipy, numpy or MONAI."""

import numpy as np
import pytest
import torch
from monai.transforms import AdjustContrast, GibbsNoise, RandBiasField, RandSimulateLowResolution
from scipy import stats
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nnunet_ssl.pretraining.views import intensity

SHAPE = (17, 24, 20)


@pytest.fixture
def views():
    return torch.from_numpy(np.random.default_rng(0).normal(0.5, 1, (3, *SHAPE)).astype(np.float32))


def each(function, views):
    """Apply a reference that takes and returns one volume."""
    return torch.stack([torch.as_tensor(np.asarray(function(n, view.numpy()))) for n, view in enumerate(views)])


TRANSFORMS = {
    "scale_around_mean": (intensity.scale_around_mean, [(0.9, 1.0, 1.1)]),
    "add_noise": (intensity.add_noise, [(0.0, 0.01, 0.5), (1, 2, 3)]),
    "smooth": (intensity.smooth, [((0.5, 0.6, 0.7), (1.0, 0.5, 0.9), (0.8, 0.8, 0.8))]),
    "lower_resolution": (intensity.lower_resolution, [(0.8, 0.9, 1.0)]),
    "bias_field": (intensity.bias_field, [np.random.default_rng(1).uniform(0, 0.05, (3, 20)).tolist()]),
    "gibbs": (intensity.gibbs, [(0.2, 0.3, 0.4)]),
    "gamma": (intensity.gamma, [(0.9, 1.0, 1.1)]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_batch_is_treated_as_its_views_alone(views, name):
    """Each view by its own parameters; the input stays as it was."""
    transform, parameters = TRANSFORMS[name]
    before = views.clone()
    together = transform(views, *parameters)
    alone = [transform(views[n : n + 1], *(values[n : n + 1] for values in parameters)) for n in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=1e-5)
    assert together.dtype == torch.float32 and together.shape == views.shape
    assert torch.equal(views, before)
    assert not torch.equal(together, views)


class NoWaiting(TorchFunctionMode):
    """Refuses the ways to a device that make the CPU wait until the device has caught up."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        assert function is not torch.tensor or "device" not in named
        assert function is not Tensor.to or named.get("non_blocking")
        return function(*arguments, **named)


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "add_noise"])
def test_parameters_travel_to_another_device_without_waiting(views, name):
    """The device "meta" stands for a GPU; it has no generator, so noise is left out."""
    transform, parameters = TRANSFORMS[name]
    far = views.to("meta")
    with NoWaiting():
        assert transform(far, *parameters).device.type == "meta"


def test_contrast_is_stretched_around_the_mean(views):
    expected = each(lambda n, view: view.mean() + (view - view.mean()) * (0.9, 1.0, 1.1)[n], views)
    torch.testing.assert_close(intensity.scale_around_mean(views, (0.9, 1.0, 1.1)), expected)


def test_noise_is_gaussian_of_the_given_size_and_follows_its_seed():
    views = torch.zeros(3, 40, 40, 40)
    noise = intensity.add_noise(views, (0.5, 2.0, 0.5), (7, 8, 7)).flatten(1)
    torch.testing.assert_close(noise.std(dim=1), torch.tensor([0.5, 2.0, 0.5]), rtol=0.02, atol=0)
    assert stats.kstest(noise[0, :5000] / 0.5, "norm").pvalue > 0.01
    assert torch.equal(noise[0], noise[2])
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.02


@pytest.mark.parametrize("sigma", [(0.5, 0.75, 1.0), (1.0, 0.5, 0.62), (3.0, 8.0, 0.3)])
def test_smoothing_is_scipys_up_to_the_edge(views, sigma):
    """The last kernel is wider than the volume."""
    expected = each(lambda n, view: gaussian_filter(view, sigma, mode="nearest", truncate=4), views)
    torch.testing.assert_close(intensity.smooth(views, [sigma] * 3), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("zoom", [0.8, 0.87, 0.97, 1.0, 0.3])
def test_low_resolution_is_monais(views, zoom):
    monai = RandSimulateLowResolution(prob=1, zoom_range=(zoom, zoom))
    expected = torch.stack([monai(view[None]).as_tensor()[0] for view in views])
    torch.testing.assert_close(intensity.lower_resolution(views, [zoom] * 3), expected, atol=2e-6, rtol=1e-5)


def test_bias_field_is_monais(views):
    monai = RandBiasField(prob=1, degree=3, coeff_range=(0.0, 0.05))
    monai.set_random_state(0)
    expected, coefficients = [], []
    for view in views:
        expected.append(torch.as_tensor(monai(view[None]).as_tensor()[0]))
        coefficients.append(monai._coeff)
    assert len(coefficients[0]) == len(intensity.BIAS_TERMS) == 20
    torch.testing.assert_close(intensity.bias_field(views, coefficients), torch.stack(expected), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.9, 0.01])
@pytest.mark.parametrize("shape", [(21, 21, 21), (16, 20, 13)])
def test_ringing_cuts_a_sphere_of_frequencies(alpha, shape):
    views = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    frequencies = np.meshgrid(*(np.fft.fftfreq(size) for size in shape), indexing="ij")
    kept = np.sqrt(sum(one**2 for one in frequencies)) <= (1 - alpha) / np.sqrt(2)
    expected = each(lambda n, view: np.fft.ifftn(np.fft.fftn(view) * kept).real, views).float()
    torch.testing.assert_close(intensity.gibbs(views, [alpha] * 2), expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.9])
def test_ringing_is_monais_where_that_is_centred(alpha):
    """In odd cubes, that is."""
    views = torch.randn(2, 21, 21, 21, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([GibbsNoise(alpha)(view[None]).as_tensor()[0] for view in views])
    torch.testing.assert_close(intensity.gibbs(views, [alpha] * 2), expected.float(), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("exponent", [0.9, 1.1, 2.0])
def test_gamma_is_monais(views, exponent):
    expected = torch.stack([AdjustContrast(exponent)(view[None]).as_tensor()[0] for view in views])
    torch.testing.assert_close(intensity.gamma(views, [exponent] * 3), expected, atol=1e-5, rtol=1e-5)


def test_a_constant_view_survives_everything():
    """Patches of pure background exist; nothing may divide by their range."""
    for transform, parameters in TRANSFORMS.values():
        assert transform(torch.zeros(3, *SHAPE), *parameters).isfinite().all()
    torch.testing.assert_close(intensity.gamma(torch.full((1, *SHAPE), 2.0), [0.9]), torch.full((1, *SHAPE), 2.0))


def test_blurs_and_zooms_keep_the_level():
    views = torch.full((1, *SHAPE), 3.0)
    torch.testing.assert_close(intensity.smooth(views, [(0.5, 0.7, 1.0)]), views)
    torch.testing.assert_close(intensity.lower_resolution(views, [0.83]), views)
    torch.testing.assert_close(intensity.gibbs(views, [0.4]), views)
