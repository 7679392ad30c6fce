import itertools
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from nnunet_ssl.conversion.fcd_bonn import find_cases as find_fcd
from nnunet_ssl.conversion.isles2022 import find_cases as find_isles
from nnunet_ssl.phantom.acquisition import Quality, resample_onto_scan, scan_grid
from nnunet_ssl.phantom.anatomy import build_anatomy, draw_person, mni_grid
from nnunet_ssl.phantom.layouts import write_fcd, write_isles
from nnunet_ssl.phantom.lesions import acute_stroke
from nnunet_ssl.phantom.raters import REACH_MM, visible_lesion

QUALITY = Quality(noise=0.03, stripped=True)
VOXEL_MM = 4.0


@pytest.fixture(scope="module")
def strokes():
    """(healthy head, head with an acute stroke, its mask) for three strokes of 3, 12 and 48 ml."""
    healthy = build_anatomy(draw_person(np.random.default_rng(0)), mni_grid(VOXEL_MM))
    return [(healthy, *acute_stroke(healthy, np.random.default_rng(seed), 3 * 4**seed)) for seed in range(3)]


def grid_of(stroke):
    return scan_grid(stroke[0], (VOXEL_MM,) * 3)


def seen(stroke, modality="dwi", quality=QUALITY, **options):
    return visible_lesion(*stroke, modality, quality, np.random.default_rng(1), grid_of(stroke), **options)


def test_what_does_not_change_the_signal_is_never_marked(strokes):
    """A mask where nothing happened, and and a change that is not where the lesion is."""
    healthy, _, truth = strokes[2]
    assert not seen((healthy, healthy, truth)).any()
    elsewhere = ndimage.distance_transform_edt(~truth, sampling=healthy.grid.spacing) > REACH_MM + 3 * VOXEL_MM
    changed = healthy.with_changed(elsewhere.astype(np.float32), {"gm": "infarcted_gm", "wm": "infarcted_wm"})
    assert not seen((healthy, changed, truth)).any()
    assert seen(strokes[2]).any()


def test_no_lesion_gives_an_empty_mask(strokes):
    assert not seen((*strokes[0][:2], np.zeros_like(strokes[0][2]))).any()


def test_a_rater_of_one_contrast_cannot_see_what_only_another_shows(strokes, monkeypatch):
    """Infarcts with the diffusion of what they replace are there on FLAIR, and not on ADC."""
    from nnunet_ssl.phantom import contrast

    for tissue in ("gm", "wm"):
        infarct = replace(contrast.TISSUES[f"infarcted_{tissue}"], adc=contrast.TISSUES[tissue].adc)
        monkeypatch.setitem(contrast.TISSUES, f"infarcted_{tissue}", infarct)
    assert not seen(strokes[2], "adc").any()
    assert seen(strokes[2], "flair").sum() > 20


@pytest.mark.parametrize("modality", ["dwi", "adc", "flair", "t1"])
def test_a_noisier_scan_shows_a_part_of_what_a_better_one_shows(strokes, modality):
    masks = [seen(strokes[1], modality, replace(QUALITY, noise=noise)) for noise in (0.01, 0.03, 0.06, 0.2)]
    assert all(not (noisy & ~better).any() for better, noisy in itertools.pairwise(masks))
    assert masks[0].sum() > masks[-1].sum()


def test_half_the_threshold_at_twice_the_noise_is_the_same_mask(strokes):
    same = seen(strokes[1], "flair", replace(QUALITY, noise=0.06), contrast_to_noise=2.5)
    np.testing.assert_array_equal(same, seen(strokes[1], "flair"))


def test_dwi_sees_the_core_of_an_acute_stroke_and_t1_the_least_of_it(strokes):
    for stroke in strokes:
        core = stroke[1].fractions["infarcted_gm"] + stroke[1].fractions["infarcted_wm"] > 0.8
        core = resample_onto_scan(core.astype(np.float32), stroke[0].grid.affine, grid_of(stroke)) > 0.5
        assert (seen(stroke) & core).sum() > 0.9 * core.sum()
    noisy = replace(QUALITY, noise=0.06)
    dwi, flair, t1 = (sum(seen(stroke, name, noisy).sum() for stroke in strokes) for name in ("dwi", "flair", "t1"))
    assert dwi > flair > t1


def test_masks_stay_near_the_lesion_and_have_neither_lone_voxels_nor_holes(strokes):
    for stroke in strokes[:2]:
        mask = seen(stroke, "flair", replace(QUALITY, thickness_mm=9.0, noise=0.002))
        away = ndimage.distance_transform_edt(~stroke[2], sampling=stroke[0].grid.spacing)
        away = resample_onto_scan(away, stroke[0].grid.affine, grid_of(stroke))
        assert away[mask].max() < REACH_MM + 2 * VOXEL_MM
        parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
        assert np.bincount(parts.ravel())[1:].min() > 1
        assert not (ndimage.binary_fill_holes(mask) & ~mask & (away < REACH_MM)).any()


def test_the_scans_rng_is_left_alone(strokes):
    rng = np.random.default_rng(1)
    before = rng.bit_generator.state
    visible_lesion(*strokes[0], "dwi", QUALITY, rng, grid_of(strokes[0]))
    assert rng.bit_generator.state == before


WRITERS = {
    "isles": (write_isles, {"n_cases": 3}, ("dwi", "flair"), ("_msk.", "derivatives")),
    "fcd": (write_fcd, {"n_patients": 2, "n_controls": 1}, ("flair", "t1"), ("_roi.",)),
}


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """A function that writes a layout as it is, with the truth beside it, and once for each rater."""
    made = {}

    def write(layout):
        if layout not in made:
            writer, counts, raters, _ = WRITERS[layout]
            root = tmp_path_factory.mktemp(layout)
            made[layout] = (
                root,
                {
                    rater: writer(
                        root / str(rater) / "data", voxel_mm=6.0, rater=rater, truth=root / f"truth_{rater}", **counts
                    )
                    for rater in (None, *raters)
                },
            )
        return made[layout]

    return write


@pytest.mark.parametrize("layout", WRITERS)
def test_images_are_the_same_whoever_annotates_them_and_the_truth_too(annotated, layout):
    root, folders = annotated(layout)
    masks = WRITERS[layout][3]
    for rater, folder in folders.items():
        for path in sorted(folders[None].rglob("*")):
            twin = folder / path.relative_to(folders[None])
            assert twin.exists()
            if path.name.endswith(".nii.gz") and path.name[0] != "." and masks[0] not in path.name:
                assert np.asarray(nib.load(path).dataobj).tobytes() == np.asarray(nib.load(twin).dataobj).tobytes()
        for path in (root / "truth_None").iterdir():
            twin = root / f"truth_{rater}" / path.name
            np.testing.assert_array_equal(nib.load(path).dataobj, nib.load(twin).dataobj)


@pytest.mark.parametrize(
    ("layout", "find", "options"),
    [("isles", find_isles, (("dwi",), False)), ("fcd", find_fcd, (("flair",), False, False))],
)
def test_the_truth_has_the_names_and_grids_of_the_converted_cases(annotated, layout, find, options):
    root, folders = annotated(layout)
    cases, _ = find(folders[None], *options)
    cases = [case for case in cases if case.masks]
    assert {case.id for case in cases} == {path.name[:-7] for path in (root / "truth_None").iterdir()}
    for case in cases:
        truth, mask = nib.load(root / "truth_None" / f"{case.id}.nii.gz"), nib.load(case.masks[0])
        np.testing.assert_array_equal(truth.dataobj, mask.dataobj)
        np.testing.assert_allclose(truth.affine, mask.affine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", WRITERS)
def test_raters_differ_from_the_truth_and_from_each_other_and_keep_to_it(annotated, layout):
    _, folders = annotated(layout)
    name = WRITERS[layout][3][0]
    masks = {
        rater: [np.asarray(nib.load(path).dataobj) > 0 for path in sorted(folder.rglob(f"[!.]*{name}nii.gz"))]
        for rater, folder in folders.items()
    }
    assert len({tuple(mask.tobytes() for mask in of_rater) for of_rater in masks.values()}) == len(masks)
    for rater, of_rater in masks.items():
        for mask, truth in zip(of_rater, masks[None], strict=True):
            assert not (mask & ~ndimage.binary_dilation(truth, np.ones((3, 3, 3)), iterations=3)).any(), rater
