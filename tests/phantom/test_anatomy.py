import sys

import numpy as np
import pytest
from scipy import stats

from nnunet_ssl.errors import UserError
from nnunet_ssl.phantom.anatomy import _template, build_anatomy, draw_person, mni_grid


def overlap(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def test_fractions_of_a_voxel_are_never_negative_nor_more_than_the_voxel(head):
    fractions = np.stack(list(head().fractions.values()))
    assert fractions.min() >= 0
    assert fractions.sum(axis=0).max() <= 1 + 1e-5


def test_the_brain_has_the_size_and_the_composition_of_a_brain(head):
    for number in range(4):
        anatomy = head(number)
        brain_ml = anatomy.brain.sum() * anatomy.grid.voxel_ml
        grey, white = (anatomy.fractions[name].sum() * anatomy.grid.voxel_ml for name in ("gm", "wm"))
        assert 1100 < brain_ml < 2000
        assert 0.8 < grey / white < 2.2


def test_the_skull_surrounds_the_brain(head):
    """From every voxel of the brain, whatever the direction, bone lies on the way out (or the field of view ends)."""
    anatomy = head()
    bone = anatomy.fractions["bone"] > 0.15
    middle = [size // 2 for size in bone.shape]
    brain = anatomy.brain
    for axis, ends in ((0, "both"), (1, "both"), (2, "top")):
        line = [slice(None) if other == axis else middle[other] for other in range(3)]
        inside = np.flatnonzero(brain[tuple(line)])
        there = np.flatnonzero(bone[tuple(line)])
        assert (there > inside[-1]).any()
        assert ends == "top" or (there < inside[0]).any()


def test_a_seed_gives_the_same_head_again():
    one, two = (build_anatomy(draw_person(np.random.default_rng(3)), mni_grid(4)) for _ in range(2))
    assert one.fractions.keys() == two.fractions.keys()
    assert all(np.array_equal(one.fractions[name], two.fractions[name]) for name in one.fractions)


def test_subjects_differ_more_than_the_visits_of_one():
    grid, person = mni_grid(4), draw_person(np.random.default_rng(1))
    white = [build_anatomy(who, grid, pose=False).fractions["wm"] > 0.5 for who in (person, person.older(2))]
    others = [
        build_anatomy(draw_person(np.random.default_rng(seed)), grid, pose=False).fractions["wm"] > 0.5
        for seed in (2, 3, 4)
    ]
    between_visits = overlap(*white)
    between_subjects = [overlap(white[0], other) for other in others]
    assert 0.9 < between_visits < 1
    assert max(between_subjects) < between_visits - 0.05


def test_age_widens_the_ventricles():
    grid = mni_grid(4)

    def csf_inside(age):
        person = draw_person(np.random.default_rng(5), ages=(30, 30)).older(age - 30)
        anatomy = build_anatomy(person, grid)
        return anatomy.fractions["csf"][anatomy.depth_mm < -18].sum()

    assert csf_inside(80) > 1.2 * csf_inside(30)


def test_age_can_be_read_off_the_ventricles_and_the_sulci_of_whoever_is_drawn():
    """What regressions of age learn from; people under 40 look alike, as atrophy begins there."""
    grid, ages, inside, share = mni_grid(6), [], [], []
    for seed in range(30):
        person = draw_person(np.random.default_rng(seed))
        anatomy = build_anatomy(person, grid)
        csf = anatomy.fractions["csf"] * anatomy.brain
        ages.append(person.age)
        inside.append(csf[anatomy.depth_mm < -18].sum())
        share.append(csf.sum() / anatomy.brain.sum())
    assert stats.spearmanr(ages, inside).statistic > 0.7
    assert stats.spearmanr(ages, share).statistic > 0.8


@pytest.mark.parametrize("voxel_mm", [2, 6])
def test_the_voxel_size_changes_the_sampling_not_the_person(head, voxel_mm):
    """Volumes of the tissues agree between 3 mm and another size."""
    anatomy = build_anatomy(draw_person(np.random.default_rng(0)), mni_grid(voxel_mm))
    for name in ("gm", "wm", "csf"):
        volumes = [which.fractions[name].sum() * which.grid.voxel_ml for which in (anatomy, head(0))]
        assert volumes[0] == pytest.approx(volumes[1], rel=0.1)


def test_without_nilearn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(UserError, match=r"pip install 'nnunet_ssl\[demo\]'"):
        _template.__wrapped__(6)


def test_a_nilearn_that_cannot_be_imported_says_why(monkeypatch, tmp_path):
    (tmp_path / "nilearn.py").write_text("import a_package_that_is_gone")
    for name in [name for name in sys.modules if name.split(".")[0] == "nilearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_gone"):
        _template.__wrapped__(6)
