import cc3d
import numpy as np
import pytest
from scipy import ndimage

from nnunet_ssl.phantom.acquisition import Quality, acquire
from nnunet_ssl.phantom.lesions import (
    acute_stroke,
    chronic_stroke,
    focal_dysplasia,
    lesion_volume,
    white_matter_hyperintensities,
)

LESIONS = {"acute": (acute_stroke, 25.0), "chronic": (chronic_stroke, 40.0), "dysplasia": (focal_dysplasia, 6.0)}
CLEAN = Quality(noise=0, bias=0, texture=0)


@pytest.fixture(params=LESIONS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def grown(head):
    """A function that gives some lesions of a kind: (healthy head, head with lesion, mask, volume asked for)."""
    made = {}

    def grow(kind):
        place, volume_ml = LESIONS[kind]
        if kind not in made:
            made[kind] = [
                (head(seed % 3), *place(head(seed % 3), np.random.default_rng(seed), volume_ml), volume_ml)
                for seed in range(6)
            ]
        return made[kind]

    return grow


def test_lesions_have_about_the_volume_asked_for(grown, kind):
    volumes = [mask.sum() * anatomy.grid.voxel_ml / asked for _, anatomy, mask, asked in grown(kind)]
    assert 0.85 < np.median(volumes) < 1.2
    assert min(volumes) > 0.2
    assert max(volumes) < 1.5


def test_lesions_lie_inside_the_brain_in_one_hemisphere_and_spare_the_ventricles(grown, kind):
    for healthy, _, mask, _ in grown(kind):
        assert healthy.brain[mask].all()
        sides = np.sign(healthy.template_mm[0][mask])
        assert abs(sides.sum()) == len(sides)
        assert not (mask & (healthy.fractions["csf"] > 0.6) & (healthy.depth_mm < -15)).any()


def test_lesions_are_irregular(grown, kind):
    """The main part has clearly more surface than a ball of its volume: sphericity is 1 for a ball.

    The surface is the area of the voxels' faces over 1.5, which is what faces overestimate on a ball.
    """
    values = []
    for _, _, mask, _ in grown(kind):
        part = cc3d.largest_k(mask, k=1) > 0
        faces = sum(np.abs(np.diff(np.pad(part, 1).astype(np.int8), axis=axis)).sum() for axis in range(3))
        values.append(np.pi ** (1 / 3) * (6 * part.sum()) ** (2 / 3) / (faces / 1.5))
    assert np.median(values) < 0.8
    assert max(values) < 0.92


def test_the_measure_of_irregularity_calls_a_ball_a_ball():
    ball = np.linalg.norm(np.indices((41,) * 3) - 20, axis=0) < 15
    faces = sum(np.abs(np.diff(ball.astype(np.int8), axis=axis)).sum() for axis in range(3))
    assert np.pi ** (1 / 3) * (6 * ball.sum()) ** (2 / 3) / (faces / 1.5) == pytest.approx(1, abs=0.05)


def test_only_the_lesion_changes(grown, kind):
    """Further than two voxels from the mask the head is as it was: no lesion is left without a label."""
    for healthy, anatomy, mask, _ in grown(kind):
        far = ~ndimage.binary_dilation(mask, iterations=2)
        for name, fraction in healthy.fractions.items():
            assert np.array_equal(anatomy.fractions[name][far], fraction[far])


def relative_change(healthy, anatomy, mask, modality):
    """The lesion's mean signal over what the same voxels had before, in brain tissue."""
    tissue = mask & (healthy.fractions["gm"] + healthy.fractions["wm"] > 0.8)
    before, after = (acquire(head, modality, CLEAN, np.random.default_rng(0)) for head in (healthy, anatomy))
    return after[tissue].mean() / before[tissue].mean()


@pytest.mark.parametrize(
    ("kind", "modality", "low", "high"),
    [
        ("acute", "dwi", 1.6, 3.0),
        ("acute", "flair", 1.15, 2.0),
        ("acute", "adc", 0.5, 0.75),
        ("acute", "t1", 0.75, 0.97),
        ("chronic", "t1", 0.1, 0.6),
        ("chronic", "t2", 1.5, 6.0),
        ("chronic", "adc", 1.8, 4.0),
        ("dysplasia", "flair", 1.03, 1.35),
        ("dysplasia", "t1", 0.8, 0.97),
    ],
)
def test_lesions_look_in_each_modality_as_the_literature_has_it(grown, kind, modality, low, high):
    changes = [relative_change(healthy, anatomy, mask, modality) for healthy, anatomy, mask, _ in grown(kind)]
    assert low < np.median(changes) < high


def test_a_dysplasia_is_fainter_than_a_stroke_and_fainter_on_t1_than_on_flair(grown):
    def contrast(kind, modality):
        return np.median([abs(relative_change(*case[:3], modality) - 1) for case in grown(kind)])

    assert contrast("dysplasia", "flair") < 0.6 * contrast("acute", "flair")
    assert contrast("dysplasia", "t1") < contrast("dysplasia", "flair")


def test_a_chronic_cavity_is_dark_on_flair_inside_a_bright_rim(grown):
    healthy, anatomy, _, _ = grown("chronic")[0]
    flair = acquire(anatomy, "flair", CLEAN, np.random.default_rng(0))
    cavity, rim = (anatomy.fractions[name] > 0.7 for name in ("cavity", "gliosis"))
    grey = np.median(flair[healthy.fractions["gm"] > 0.9])
    assert flair[cavity].mean() < 0.8 * grey < 1.2 * grey < flair[rim].mean()


def test_no_holes_open_where_a_lesions_own_territory_is(grown):
    """A stroke's only gaps are ventricles and the world outside of the brain; a hole in its middle would be a bug."""
    for healthy, _, mask, _ in grown("chronic"):
        hole = ndimage.binary_fill_holes(mask) & ~mask
        assert not (hole & (healthy.fractions["csf"] < 0.2)).sum() > 0.01 * mask.sum()


def test_a_seed_gives_the_same_lesion_again(head, kind):
    place, volume_ml = LESIONS[kind]
    one, two, other = (place(head(), np.random.default_rng(seed), volume_ml)[1] for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_hyperintensities_grow_with_the_load_and_stay_in_the_white_matter(head):
    amounts = []
    for load in (0.0, 0.5, 1.0):
        changed = white_matter_hyperintensities(head(), np.random.default_rng(0), load)
        spots = changed.fractions["hyperintensity"]
        amounts.append(spots.sum() * changed.grid.voxel_ml)
        assert not spots[head().fractions["wm"] == 0].any()
    assert amounts[0] < amounts[1] < amounts[2]
    assert amounts[0] < 5
    assert amounts[2] > 2


def test_volumes_are_drawn_around_the_median_and_between_the_bounds(rng):
    volumes = [lesion_volume(rng, median_ml=10, spread=1.0, smallest_ml=1, largest_ml=100) for _ in range(2000)]
    assert 9 < np.median(volumes) < 11
    assert min(volumes) >= 1
    assert max(volumes) <= 100
