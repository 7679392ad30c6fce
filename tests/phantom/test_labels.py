import numpy as np
import pytest

from nnunet_ssl.phantom.labels import (
    LOBES,
    NAMES,
    REGIONS,
    TISSUES,
    label_map,
    lobe_labels,
    region_labels,
    tissue_labels,
)


def test_every_label_occurs_and_none_is_outside_the_brain(head):
    for kind, names in NAMES.items():
        labels = label_map(head(), kind)
        assert set(np.unique(labels)) == set(range(len(names) + 1))
        assert not labels[~head().brain].any()


def test_the_tissue_of_a_voxel_is_what_fills_most_of_it(head):
    anatomy = head()
    labels = tissue_labels(anatomy)
    for tissue, names in (("csf", ("csf", "ventricles")), ("gm", ("cortical_grey", "deep_grey")), ("wm", ("white",))):
        full = anatomy.brain & (anatomy.fractions[tissue] > 0.5)
        assert np.isin(labels[full], [1 + TISSUES.index(name) for name in names]).all()


def test_volumes_are_about_those_of_a_brain(head):
    """Ventricles 5-120 ml and deep grey matter 10-60 ml, over young and old heads; cortex is most of the grey."""
    for number in range(4):
        anatomy = head(number)
        ml = np.bincount(tissue_labels(anatomy).ravel(), minlength=6)[1:] * anatomy.grid.voxel_ml
        volume = dict(zip(TISSUES, ml))
        assert 5 < volume["ventricles"] < 120
        assert 10 < volume["deep_grey"] < 60
        assert volume["cortical_grey"] > 8 * volume["deep_grey"]


def test_left_is_left_in_the_world_and_the_sides_are_alike(head):
    anatomy = head()
    labels, x = region_labels(anatomy), anatomy.grid.axes[0][:, None, None]
    for lobe in LOBES[:-1]:
        left, right = (labels == 1 + REGIONS.index(f"{side}_{lobe}") for side in ("left", "right"))
        places = np.broadcast_to(x, labels.shape)
        assert np.mean(places[left]) < -8
        assert np.mean(places[right]) > 8
        assert left.sum() == pytest.approx(right.sum(), rel=0.35)


def test_lobes_lie_as_lobes_lie(head):
    anatomy = head()
    labels = lobe_labels(anatomy)
    grid = np.stack(np.meshgrid(*anatomy.grid.axes, indexing="ij"))
    centre = {name: grid[:, labels == value].mean(axis=1) for value, name in enumerate(LOBES, start=1)}
    y, z = ({name: value[axis] for name, value in centre.items()} for axis in (1, 2))
    assert y["frontal"] > y["temporal"] > y["parietal"] > y["occipital"]
    assert min(z["frontal"], z["parietal"]) > z["temporal"] > z["cerebellum"]
    assert y["brainstem"] > y["cerebellum"]
    assert abs(centre["brainstem"][0]) < 4


def test_regions_are_the_lobes_of_each_side(head):
    lobes, regions = lobe_labels(head()), region_labels(head())
    of_region = np.array([0, *(1 + LOBES.index(name.split("_")[-1]) for name in REGIONS)])
    np.testing.assert_array_equal(of_region[regions], lobes)
