"""Batches on the training device against nnU-Net's transforms, patch by patch, with the same parameters."""

import copy
from unittest.mock import patch

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.spatial import spatial
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from scipy import stats
from scipy.spatial.transform import Rotation

from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.augmentation import BatchAugmentation

SCALES = [[1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.5, 0.25, 0.25]]
ANGLE = np.pi / 6
KINDS = {  # patch, crop, and what else nnU-Net gives to its transforms
    "deep supervision": ((16, 14, 18), (25, 22, 29), {"deep_supervision_scales": SCALES}),
    "one scale": ((15, 14, 13), (22, 23, 21), {}),
    "regions and an ignore label": (
        (16, 14, 12), (24, 23, 19), {"regions": [(1, 2), 2], "ignore_label": 3, "deep_supervision_scales": SCALES},
    ),
    "masks": ((16, 14, 12), (24, 23, 19), {"use_mask_for_norm": [True, False]}),
    "anisotropic": ((6, 20, 18), (6, 31, 28), {"do_dummy_2d_data_aug": True, "deep_supervision_scales": SCALES}),
    "two dimensions": (
        (20, 18), (31, 30), {"deep_supervision_scales": [[1.0, 1.0], [0.5, 0.5]], "mirror_axes": (0, 1)},
    ),
}  # fmt: skip
LABELS = [0, 1, 2, 3]


def transforms_of(kind, always=False):
    """nnU-Net's transforms; `always`: each is applied to every patch."""
    patch_size, _, given = KINDS[kind]
    defaults = {"deep_supervision_scales": None, "mirror_axes": (0, 1, 2), "do_dummy_2d_data_aug": False}
    made = nnUNetTrainer.get_training_transforms(patch_size, (-ANGLE, ANGLE), **defaults | given)
    for each in made.transforms if always else ():
        if isinstance(each, RandomTransform):
            each.apply_probability = 1.1
        if isinstance(each, SpatialTransform):
            each.p_rotation = each.p_scaling = 0.8
    return made


def batch_of(kind, size=4, seed=0):
    """Smooth images of two channels, and labels in blocks, -1 in a corner."""
    rng = np.random.default_rng(seed)
    crop = KINDS[kind][1]
    images = torch.from_numpy(rng.normal(size=(size, 2, *crop)).astype(np.float32)).cumsum(-1)
    coarse = torch.from_numpy(rng.integers(0, 4, (size, 1, *(n // 4 + 1 for n in crop)))).float()
    labels = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="nearest").to(torch.int16)
    labels = labels[(..., *map(slice, crop))].contiguous()
    labels[:, :, : crop[0] // 3, : crop[1] // 2] = -1
    return images, labels


def of_nnunet(transforms, image, label, drawn, patch_number):
    """What nnU-Net makes of one patch with the given parameters."""
    data = {"image": image.clone(), "segmentation": label.clone()}
    for each, parameters in zip(transforms, drawn, strict=True):
        given = parameters[patch_number]
        if given is None:
            continue
        each = each.transform if isinstance(each, RandomTransform) else each
        if isinstance(each, SpatialTransform):
            given = with_grid(each, data["image"], given)
        data = each.apply(data, **given) if given else each(**data)
    return data["image"], data["segmentation"]


def with_grid(transform, image, given):
    """nnU-Net's parameters for a map that was drawn before."""
    if given["affine"] is None:
        return given
    always = copy.copy(transform)
    always.p_rotation = 1.1
    two = f"create_affine_matrix_{image.ndim - 1}d"
    with patch.object(spatial, two, lambda *_: given["affine"]):
        return always.get_parameters(image=image)


def seeded(seed):
    np.random.seed(seed)  # noqa: NPY002 (nnU-Net draws from it)
    torch.manual_seed(seed)


def without_noise(augmentation, drawn):
    """Noise of one seed is another in nnU-Net, whose noise is of no seed: its size is tested elsewhere."""
    for each, parameters in zip(augmentation.transforms, drawn, strict=True):
        if isinstance(each, RandomTransform) and isinstance(each.transform, GaussianNoiseTransform):
            for one in filter(None, parameters):
                one["sigmas"] = 0.0


@pytest.mark.parametrize("always", [True, False], ids=["all at once", "as drawn"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_becomes_what_nnunet_makes_of_its_patches(kind, always):
    transforms = transforms_of(kind, always)
    augmentation = BatchAugmentation(transforms, LABELS)
    images, labels = batch_of(kind)
    seeded(1)
    drawn = augmentation.draw(4, 2, images.shape[2:])
    without_noise(augmentation, drawn)
    expected = [of_nnunet(transforms.transforms, images[n], labels[n], drawn, n) for n in range(4)]
    given = labels.clone()
    made, targets = augmentation.apply(images.clone(), labels, drawn)
    torch.testing.assert_close(made, torch.stack([image for image, _ in expected]), atol=2e-3, rtol=1e-3)
    assert isinstance(targets, list) == isinstance(expected[0][1], list)
    scales = targets if isinstance(targets, list) else [targets]
    for scale, target in enumerate(scales):
        reference = torch.stack([one[scale] if isinstance(targets, list) else one for _, one in expected])
        assert target.dtype == reference.dtype
        assert torch.equal(target, reference)
    assert torch.equal(labels, given), "the loader's labels stay"


@pytest.mark.parametrize("kind", ["one scale", "anisotropic", "two dimensions"])
@pytest.mark.parametrize("number", range(9))
def test_each_transform_alone_is_nnunets(kind, number):
    """Of images of the usual scale, so that little rounding is allowed."""
    transforms = [each for each in transforms_of(kind, always=True).transforms if "Convert" not in type(each).__name__]
    augmentation = BatchAugmentation(ComposeTransforms(transforms[number : number + 1]), LABELS)
    if kind == "anisotropic" and number == 0:
        augmentation = BatchAugmentation(ComposeTransforms(transforms_of(kind, always=True).transforms[:3]), LABELS)
    images, labels = batch_of(kind)
    images = images / images.std()
    seeded(6)
    drawn = augmentation.draw(4, 2, images.shape[2:])
    without_noise(augmentation, drawn)
    made, _ = augmentation.apply(images.clone(), labels.clone(), drawn)
    expected = [of_nnunet(augmentation.transforms, images[n], labels[n], drawn, n)[0] for n in range(4)]
    torch.testing.assert_close(made, torch.stack(expected), atol=1e-5, rtol=1e-5)
    name = type(getattr(transforms[number], "transform", transforms[number])).__name__
    assert name in ("GaussianNoiseTransform", "SpatialTransform") or not torch.equal(made, images)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parameters_are_those_that_nnunet_draws(kind):
    """With the same state of its generators; noise's seeds are ours, so torch's is set again for each transform."""
    transforms = transforms_of(kind)
    augmentation = BatchAugmentation(transforms, LABELS)
    image = batch_of(kind)[0][0]
    for seed in range(20):
        for number, each in enumerate(transforms.transforms):
            alone = copy.copy(augmentation)
            alone.transforms = augmentation.transforms[number : number + 1]
            seeded(seed)
            ((drawn,),) = alone.draw(1, *image.shape[:1], image.shape[1:])
            seeded(seed)
            if isinstance(each, RandomTransform):
                assert (drawn is not None) == each.get_parameters()["apply_transform"]
            if drawn is None:
                continue
            folded = isinstance(each, SpatialTransform) and len(each.patch_size) < image.ndim - 1
            shown = image.flatten(0, 1) if folded else image
            expected = (each.transform if isinstance(each, RandomTransform) else each).get_parameters(image=shown)
            assert {"seeds", *expected} >= drawn.keys()
            for name in drawn.keys() - {"seeds", "grid", "center_location_in_pixels"}:
                np.testing.assert_array_equal(np.array(drawn[name]), np.array(expected[name]), err_msg=name)


@pytest.fixture(scope="module")
def many():
    """Parameters of many patches, by transform."""
    augmentation = BatchAugmentation(transforms_of("one scale"), LABELS)
    seeded(0)
    names = [type(getattr(each, "transform", each)).__name__ for each in augmentation.transforms]
    return list(zip(names, augmentation.draw(1500, 2, (22, 23, 21))))


@pytest.mark.parametrize(
    ("number", "name", "probability"),
    [
        (1, "GaussianNoiseTransform", 0.1),
        (2, "GaussianBlurTransform", 0.2),
        (3, "MultiplicativeBrightnessTransform", 0.15),
        (4, "ContrastTransform", 0.15),
        (5, "SimulateLowResolutionTransform", 0.25),
        (6, "GammaTransform", 0.1),
        (7, "GammaTransform", 0.3),
    ],
)
def test_each_transform_is_applied_as_often_as_in_nnunet(many, number, name, probability):
    found, parameters = many[number]
    count = sum(one is not None for one in parameters)
    assert found == name and stats.binomtest(count, len(parameters), probability).pvalue > 0.002


def test_maps_are_drawn_as_in_nnunet(many):
    maps = [one["affine"] for one in many[0][1]]
    assert stats.binomtest(sum(one is not None for one in maps), len(maps), 1 - 0.8**2).pvalue > 0.002
    scales = np.array([np.cbrt(np.linalg.det(one)) for one in maps if one is not None])
    turned = np.array([one / scale for one, scale in zip([one for one in maps if one is not None], scales)])
    angles = Rotation.from_matrix(turned).as_euler("xyz")
    assert stats.kstest(scales[np.abs(scales - 1) > 1e-9], stats.uniform(0.7, 0.7).cdf).pvalue > 0.002
    for axis in angles[np.abs(angles).max(axis=1) > 1e-9].T:
        assert stats.kstest(axis, stats.uniform(-ANGLE, 2 * ANGLE).cdf).pvalue > 0.002


def test_every_patch_has_parameters_of_its_own(many):
    for _, parameters in many[:8]:
        written = [repr(one) for one in parameters if one and one.get("affine", 0) is not None]
        assert len(set(written)) > 0.4 * len(written)  # of blur and low resolution, many touch no channel
    seeds = [seed for one in many[1][1] if one for seed in one["seeds"]]
    assert len(set(seeds)) == len(seeds)


def test_noise_is_of_nnunets_size_and_each_channels_own():
    augmentation = BatchAugmentation(transforms_of("one scale", always=True), LABELS)
    augmentation.transforms = augmentation.transforms[1:2]
    seeded(0)
    drawn = augmentation.draw(3, 2, (40, 40, 40))
    images, _ = augmentation.apply(torch.zeros(3, 2, 40, 40, 40), torch.zeros(3, 1, 40, 40, 40), drawn)
    sigmas = torch.tensor([[one["sigmas"]] * 2 for one in drawn[0]], dtype=torch.float32)
    torch.testing.assert_close(images.flatten(2).std(dim=2), sigmas, rtol=0.02, atol=0)
    correlations = np.corrcoef(images.flatten(0, 1).flatten(1))
    assert np.abs(correlations - np.eye(6)).max() < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_no_label_appears_that_was_not_there(kind):
    """Labels far apart from each other, of which interpolation would make those between."""
    transforms = transforms_of(kind, always=True)
    transforms.transforms = [
        each
        for each in transforms.transforms
        if "Regions" not in type(each).__name__ and "DS" not in type(each).__name__
    ]
    images, labels = batch_of(kind)
    labels[labels == 3], labels[labels == 1] = 90, 40
    augmentation = BatchAugmentation(transforms, [0, 2, 40, 90])
    seeded(2)
    _, targets = augmentation.apply(images, labels, augmentation.draw(4, 2, images.shape[2:]))
    assert set(targets.unique().tolist()) == {0, 2, 40, 90}


def test_batches_are_reproducible_and_a_patch_does_not_depend_on_its_neighbours():
    augmentation = BatchAugmentation(transforms_of("one scale", always=True), LABELS)
    images, labels = batch_of("one scale")
    seeded(3)
    drawn = augmentation.draw(4, 2, images.shape[2:])
    first = augmentation.apply(images.clone(), labels, drawn)
    again = augmentation.apply(images.clone(), labels, drawn)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    for n in range(4):
        alone = augmentation.apply(images[n : n + 1].clone(), labels[n : n + 1], [one[n : n + 1] for one in drawn])
        torch.testing.assert_close(alone[0], first[0][n : n + 1], atol=1e-5, rtol=1e-4)
        assert torch.equal(alone[1], first[1][n : n + 1])


def test_a_constant_patch_survives_everything():
    augmentation = BatchAugmentation(transforms_of("one scale", always=True), LABELS)
    images, labels = torch.zeros(2, 2, 22, 23, 21), torch.full((2, 1, 22, 23, 21), -1, dtype=torch.int16)
    seeded(4)
    made, targets = augmentation.apply(images, labels, augmentation.draw(2, 2, images.shape[2:]))
    assert made.isfinite().all() and (targets == 0).all()


def test_a_batch_costs_a_gpu_as_many_calls_however_large_it_is(launches):
    """But for noise, whose generators "meta" does not have: it is left out."""
    augmentation = BatchAugmentation(transforms_of("deep supervision", always=True), LABELS)
    del augmentation.transforms[1]
    for each in augmentation.transforms:
        if isinstance(each, SpatialTransform):
            each.p_rotation = 1.1
        elif not isinstance(each, MirrorTransform) and hasattr(getattr(each, "transform", each), "p_per_channel"):
            each.transform.p_per_channel = 1.1

    def work(batch_size):
        size = KINDS["deep supervision"][1]
        images = torch.empty(batch_size, 2, *size, device="meta")
        labels = torch.empty(batch_size, 1, *size, dtype=torch.int16, device="meta")
        seeded(5)
        drawn = augmentation.draw(batch_size, 2, size)
        mirrored = [type(each) for each in augmentation.transforms].index(MirrorTransform)
        drawn[mirrored] = [{"axes": [0, 1, 2]}] * batch_size
        return lambda: augmentation.apply(images, labels, drawn)

    assert launches(work(2)) == launches(work(12)) < 250


def test_what_nnunet_does_not_do_by_default_is_refused_by_name():
    more = nnUNetTrainerDA5.get_training_transforms((8, 8, 8), (0, 0), None, (0,), False)
    with pytest.raises(UserError, match="cannot be done to whole batches on the training device: augment on the CPU"):
        BatchAugmentation(more, LABELS)
    elastic = transforms_of("one scale")
    elastic.transforms[0].p_elastic_deform = 0.2
    with pytest.raises(UserError, match=r"SpatialTransform has p_elastic_deform=0\.2"):
        BatchAugmentation(elastic, LABELS)
