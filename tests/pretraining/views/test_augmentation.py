"""What is drawn, and what becomes of a batch."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy import stats

from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.views import intensity, spatial
from nnunet_ssl.pretraining.views.augmentation import (
    AugmentationConfig,
    Intensities,
    RawBatch,
    augment,
    draw_flip,
    draw_intensities,
    draw_matrix,
)
from nnunet_ssl.pretraining.views.spatial import affine_matrix, resample, source_box

DRAWS = 4000
PATCH = (12, 10, 14)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def drawn(rng):
    return [draw_intensities(AugmentationConfig(), rng) for _ in range(DRAWS)]


@pytest.fixture
def volumes(rng):
    return [torch.from_numpy(rng.normal(size=(20, 22, 24)).astype(np.float16)) for _ in range(4)]


@pytest.fixture
def raw_batch(volumes, rng):
    """A function that makes a batch of two pairs from four volumes, with given or drawn intensity steps."""

    def make(intensities=None):
        matrices = [draw_matrix(AugmentationConfig(), None, (1, 1, 1), rng) for _ in volumes]
        centres = rng.uniform(6, 14, (4, 3))
        boxes = [source_box(matrix, centre, PATCH, (20, 22, 24)) for matrix, centre in zip(matrices, centres)]
        crops = [volume[tuple(slice(*ends) for ends in box)] for volume, box in zip(volumes, boxes)]
        return RawBatch(
            voxels=torch.cat([crop.flatten() for crop in crops]),
            sizes=np.array([crop.shape for crop in crops]),
            matrices=np.array(matrices),
            centres=centres,
            origins=np.array([box[:, 0] for box in boxes]),
            intensities=intensities or [draw_intensities(AugmentationConfig(), rng) for _ in volumes],
            patch_size=PATCH,
            subject=np.array([5, 6]),
            session=np.array([7, 8]),
            modality=np.array([[0, 2], [1, 3]]),
            scan_ids=[["a", "b"], ["c", "d"]],
            step=3,
        )

    return make


def test_half_of_the_examples_are_mirrored(rng):
    count = sum(draw_flip(AugmentationConfig(), rng) for _ in range(DRAWS))
    assert stats.binomtest(count, DRAWS, 0.5).pvalue > 0.01


@pytest.mark.parametrize(
    ("name", "probability"),
    [
        ("contrast", 0.8),
        ("noise", 0.3),
        ("smooth", 0.7 / 3),
        ("bias_field", 0.7 / 3),
        ("gibbs", 0.7 / 3),
        ("gamma", 0.5),
        ("low_resolution", 0.25),
    ],
)
def test_each_step_is_taken_as_often_as_the_paper_says(drawn, name, probability):
    count = sum(getattr(one, name) is not None for one in drawn)
    assert stats.binomtest(count, DRAWS, probability).pvalue > 0.01


def test_a_view_has_one_artefact_and_one_acquisition_at_most(drawn):
    for one in drawn:
        assert (one.smooth, one.bias_field, one.gibbs).count(None) >= 2
        assert (one.gamma, one.low_resolution).count(None) >= 1


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (lambda one: one.contrast, 0.9, 1.1),
        (lambda one: one.noise and one.noise[0], 0, 0.01),
        (lambda one: one.smooth and one.smooth[1], 0.5, 1),
        (lambda one: one.bias_field and one.bias_field[-1], 0, 0.05),
        (lambda one: one.gibbs, 0.2, 0.4),
        (lambda one: one.gamma, 0.9, 1.1),
        (lambda one: one.low_resolution, 0.8, 1),
    ],
    ids=["contrast", "noise", "smooth", "bias_field", "gibbs", "gamma", "low_resolution"],
)
def test_strengths_are_uniform_in_the_papers_ranges(drawn, values, low, high):
    found = [value for one in drawn if (value := values(one)) is not None]
    assert stats.kstest(found, stats.uniform(low, high - low).cdf).pvalue > 0.01


def test_noise_has_a_seed_of_its_own(drawn):
    seeds = [one.noise[1] for one in drawn if one.noise]
    assert len(set(seeds)) == len(seeds)


def test_affine_parameters_are_uniform_in_the_papers_ranges(rng, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "nnunet_ssl.pretraining.views.augmentation.affine_matrix", lambda **given: seen.append(given) or np.eye(3)
    )
    for _ in range(1000):
        draw_matrix(AugmentationConfig(), 2, (1, 2, 3), rng)
    for name, low, high in (("rotation", -0.3, 0.3), ("scale", 0.9, 1.1), ("shear", -0.3, 0.3)):
        for values in np.transpose([one[name] for one in seen]):
            assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 0.005
    assert seen[0]["flip_axis"] == 2 and seen[0]["spacing"] == (1, 2, 3)


def test_nothing_is_drawn_where_nothing_is_wanted(rng):
    still = AugmentationConfig(
        **{field.name: 0 for field in fields(AugmentationConfig) if field.name.endswith("_probability")},
        rotation=0,
        scale=0,
        shear=0,
    )
    for _ in range(100):
        assert not draw_flip(still, rng)
        assert draw_intensities(still, rng) == Intensities()
        np.testing.assert_array_equal(draw_matrix(still, None, (1, 2, 3), rng), np.eye(3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flip_probability": 1.5}, "flip_probability is 1.5; it must lie between 0 and 1"),
        ({"gamma": (1.1, 0.9)}, "gamma is .* two numbers, the smaller first"),
        ({"gibbs": (0.2, 1.2)}, "gibbs is .* between 0 and 1"),
        ({"smooth_sigma": (0.0, 1.0)}, "smooth_sigma is"),
        ({"scale": 1.0}, "scale is 1.0; it must lie between 0 and 0.9"),
        ({"low_resolution": (0.8, 1.2)}, "low_resolution is"),
        ({"noise_std": float("nan")}, "noise_std is nan"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        AugmentationConfig(**values)


@pytest.fixture(params=["cpu", "gpu"])
def many_at_once(request, monkeypatch):
    """As many views in one call as either device has."""
    monkeypatch.setitem(spatial.VOXELS_AT_ONCE, "cpu", spatial.VOXELS_AT_ONCE[request.param])


def test_targets_are_warped_and_nothing_else(raw_batch, volumes, many_at_once):
    raw = raw_batch()
    batch = augment(raw, "cpu")
    expected = [resample(*warp, PATCH) for warp in zip(volumes, raw.matrices, raw.centres)]
    torch.testing.assert_close(batch.targets.view(4, *PATCH), torch.stack(expected), atol=1e-5, rtol=0)
    assert (batch.views != batch.targets).flatten(2).any(dim=2).all()


def test_views_without_intensity_steps_are_their_targets(raw_batch):
    batch = augment(raw_batch([Intensities()] * 4), "cpu")
    assert torch.equal(batch.views, batch.targets)


def test_steps_come_in_the_papers_order(raw_batch):
    """Of the alternatives all are asked for here, so that the order is seen whole."""
    everything = Intensities(
        contrast=1.1,
        noise=(0.5, 3),
        smooth=(0.5, 0.7, 1.0),
        bias_field=(0.05,) * 20,
        gibbs=0.4,
        gamma=0.9,
        low_resolution=0.8,
    )
    batch = augment(raw_batch([Intensities(), everything, Intensities(gibbs=0.2), everything]), "cpu")
    targets, views = batch.targets.view(4, *PATCH), batch.views.view(4, *PATCH)
    assert torch.equal(views[0], targets[0])
    torch.testing.assert_close(views[2:3], intensity.gibbs(targets[2:3], [0.2]))
    expected = intensity.scale_around_mean(targets[[1, 3]], [1.1] * 2)
    expected = intensity.add_noise(expected, [0.5] * 2, [3] * 2)
    expected = intensity.smooth(expected, [(0.5, 0.7, 1.0)] * 2)
    expected = intensity.bias_field(expected, [(0.05,) * 20] * 2)
    expected = intensity.gibbs(expected, [0.4] * 2)
    expected = intensity.gamma(expected, [0.9] * 2)
    expected = intensity.lower_resolution(expected, [0.8] * 2)
    torch.testing.assert_close(views[[1, 3]], expected)


def test_view_0_of_every_example_comes_first(raw_batch):
    raw = raw_batch([Intensities()] * 4)
    batch = augment(raw, "cpu")
    assert batch.views.shape == (2, 2, 1, *PATCH)
    assert batch.subject.tolist() == [5, 6] and batch.session.tolist() == [7, 8]
    assert batch.scan_ids == [["a", "b"], ["c", "d"]] and batch.step == 3


def test_autocast_changes_nothing(raw_batch):
    raw = raw_batch()
    plain = augment(raw, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        cast = augment(raw, "cpu")
    assert cast.views.dtype == cast.targets.dtype == torch.float32
    assert torch.equal(cast.views, plain.views) and torch.equal(cast.targets, plain.targets)


def test_a_view_is_the_same_whatever_else_is_in_the_batch(raw_batch, many_at_once):
    """Its warp up to the rounding of positions, its steps exactly, its noise by its own seed."""
    raw = raw_batch()
    raw.intensities = [replace(one, noise=(0.3, n)) for n, one in enumerate(raw.intensities)]
    together = augment(raw, "cpu").views.view(4, *PATCH)
    ends = raw.sizes.prod(axis=1).cumsum()
    for n in range(4):
        alone = {name: getattr(raw, name)[n : n + 1] for name in ("sizes", "matrices", "centres", "origins")}
        voxels = raw.voxels[: ends[n]][-raw.sizes[n].prod() :]
        alone |= {"voxels": voxels, "intensities": raw.intensities[n : n + 1], "modality": np.zeros((1, 1))}
        view = augment(replace(raw, **alone), "cpu").views.view(PATCH)
        torch.testing.assert_close(view, together[n], atol=5e-5, rtol=1e-5)
    assert torch.equal(augment(raw, "cpu").views.view(4, *PATCH), together)


def test_a_batch_costs_a_gpu_as_many_calls_however_large_it_is(raw_batch, launches):
    """But for noise, which each view draws from its own seed."""
    everything = Intensities(
        contrast=1.1, smooth=(1, 1, 1), bias_field=(0.05,) * 20, gibbs=0.4, gamma=0.9, low_resolution=0.8
    )
    small = raw_batch([everything] * 4)
    many = {name: np.repeat(getattr(small, name), 20, axis=0) for name in ("sizes", "matrices", "centres", "origins")}
    crops = small.voxels.split(small.sizes.prod(axis=1).tolist())
    voxels = torch.cat([crop for crop in crops for _ in range(20)])
    large = replace(small, **many, voxels=voxels, intensities=[everything] * 80, modality=np.zeros((2, 40)))
    assert launches(lambda: augment(small, "meta")) == launches(lambda: augment(large, "meta")) < 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_does_what_the_cpu_does(raw_batch):
    """But for the noise, whose generator is the device's own."""
    without_noise = [Intensities(contrast=0.9, smooth=(0.5, 0.7, 1.0)), Intensities(gibbs=0.3, gamma=1.1)]
    without_noise += [Intensities(bias_field=(0.03,) * 20), Intensities(low_resolution=0.85)]
    raw = raw_batch(without_noise)
    cpu = augment(raw, "cpu")
    with torch.autocast("cuda", torch.bfloat16):
        gpu = augment(raw, "cuda")
    torch.testing.assert_close(gpu.views.cpu(), cpu.views, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gpu.targets.cpu(), cpu.targets, atol=1e-5, rtol=1e-5)


def test_left_and_right_change_places_in_a_mirrored_view(volumes):
    """A mirrored view of a volume is the view of the mirrored volume."""
    plain = {"rotation": (0, 0, 0), "scale": (1, 1, 1), "shear": (0, 0, 0), "spacing": (1, 1, 1)}
    volume, centre = volumes[0], (np.array([20, 22, 24]) - 1) / 2
    mirrored = resample(volume, affine_matrix(flip_axis=2, **plain), centre, PATCH)
    of_mirror = resample(volume.flip(2), affine_matrix(flip_axis=None, **plain), centre, PATCH)
    torch.testing.assert_close(mirrored, of_mirror, atol=1e-5, rtol=0)
