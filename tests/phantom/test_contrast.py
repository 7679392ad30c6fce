import itertools

import numpy as np
import pytest

from nnunet_ssl.phantom.acquisition import acquire, draw_quality
from nnunet_ssl.phantom.contrast import MODALITIES, SEQUENCES, TISSUES, render, signal

ORDER = {  # what every radiologist expects, bright to dark
    "t1": ("fat", "wm", "gm", "csf"),
    "t2": ("csf", "gm", "wm", "bone"),
    "flair": ("hyperintensity", "gm", "wm", "csf"),
    "dwi": ("infarcted_gm", "gm", "wm", "csf"),
    "pd": ("gm", "wm", "bone"),
    "t2s": ("wm", "gm", "csf", "vessel"),
}


@pytest.mark.parametrize("modality", ORDER)
def test_tissues_come_in_the_order_of_brightness_that_the_modality_is_known_for(modality):
    signals = [signal(TISSUES[tissue], SEQUENCES[modality]) for tissue in ORDER[modality]]
    assert signals == sorted(signals, reverse=True)


def test_inversion_nulls_the_fluid_of_flair():
    grey, fluid = (signal(TISSUES[tissue], SEQUENCES["flair"]) for tissue in ("gm", "csf"))
    assert fluid < 0.4 * grey


def test_contrast_agent_lights_up_vessels_and_leaves_brain_alone(head, rng):
    plain, enhanced = (render(head(), modality, np.random.default_rng(0)) for modality in ("t1", "t1c"))
    vessels = head().fractions["vessel"]
    assert (enhanced - plain)[vessels > 0.5].min() > 0.3
    assert np.array_equal(enhanced[vessels == 0], plain[vessels == 0])


def test_no_two_modalities_are_the_same_picture(head, rng):
    """No modality is (nearly) a linear function of another; only a healthy brain's flair and dwi look alike."""
    inside = head().brain
    pictures = {modality: render(head(), modality, rng)[inside] for modality in MODALITIES}
    for pair in itertools.combinations(pictures, 2):
        if pair != ("flair", "dwi"):
            assert abs(np.corrcoef(*(pictures[modality] for modality in pair))[0, 1]) < 0.97, pair


def test_adc_is_in_thousandths_of_square_millimetres_per_second(head, rng):
    adc = acquire(head(), "adc", draw_quality(rng), rng)
    white, fluid = (np.median(adc[head().fractions[name] > 0.95]) for name in ("wm", "csf"))
    assert white == pytest.approx(0.74, abs=0.1)
    assert fluid == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize("modality", MODALITIES)
def test_scans_of_one_head_share_its_grid_and_edges(head, rng, modality):
    """Co-registered: where the tissue maps have an edge, every modality has one, at the same place."""
    image = acquire(head(), modality, draw_quality(rng), rng)
    assert image.shape == head().grid.shape
    edges = np.hypot(*np.gradient(image)[:2])
    tissue_edges = np.hypot(*np.gradient(head().fractions["csf"])[:2])
    ventricles = (head().depth_mm < -18) & (tissue_edges > 0.2)
    calm = (head().depth_mm < -18) & (tissue_edges < 0.01)
    if modality not in ("pd", "swi"):  # brain and fluid are hardly told apart there
        assert np.median(edges[ventricles]) > 2 * np.median(edges[calm])
