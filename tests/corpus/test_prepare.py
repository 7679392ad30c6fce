import subprocess
import sys

import blosc2
import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.corpus.indexing import index_corpus
from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.errors import UserError


def stored(corpus, stem):
    row = int(np.flatnonzero(corpus.scans["scan_id"].str.endswith(stem))[0])
    return blosc2.open(str(corpus.path(row)))[0].astype(np.float32)


def test_a_stored_scan_is_what_nnunets_own_steps_give(prepare, source, write_scan):
    path = write_scan(source / "sub_1/ses_1/t1.nii.gz", axes="LPS", spacing=(2.0, 1.5, 2.5))
    prepare(dtype="float32")
    corpus = open_corpus(500)

    images, properties = NibabelIOWithReorient().read_images([str(path)])
    inside = np.argwhere(images[0])
    box = tuple(slice(low, high + 1) for low, high in zip(inside.min(0), inside.max(0)))
    image = images[0][box]
    brain = image != 0
    low, high = np.percentile(image[brain], (0.5, 99.5))
    expected = np.zeros_like(image)
    expected[brain] = np.clip(image[brain], low, high)
    expected[brain] = (expected[brain] - expected[brain].mean()) / expected[brain].std()
    plans = PlansManager(str(corpus.folder.parent / "nnUNetSSLPlans.json"))
    shape = [round(size * step) for size, step in zip(image.shape, properties["spacing"])]
    configuration = plans.get_configuration("3d_fullres")
    expected = configuration.resampling_fn_data(expected[None], shape, properties["spacing"], [1.0] * 3)
    outside = configuration.resampling_fn_seg(np.where(brain, 0, -1)[None], shape, properties["spacing"], [1.0] * 3) < 0
    np.testing.assert_allclose(stored(corpus, "t1"), np.where(outside, 0, expected)[0], atol=1e-4)


@pytest.mark.parametrize("spacing", [0.8, 1.1, 2.0, (1.0, 1.0, 4.0)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_outside_the_foreground_a_stored_scan_is_zero(prepare, source, write_scan, spacing, dtype):
    write_scan(source / "sub_1/ses_1/t1.nii.gz", spacing=spacing, shape=(60, 62, 58))
    prepare(dtype=dtype)
    corpus = open_corpus(500)
    dataset = infer_dataset_class(str(corpus.folder))(str(corpus.folder))
    data, segmentation, _, _ = dataset.load_case(dataset.identifiers[0])
    outside = np.asarray(segmentation[:]) < 0
    assert outside.any() and np.abs(np.asarray(data[:])[~outside]).max() > 0.5
    assert not np.asarray(data[:])[outside].any()


def test_orientation_is_ras_in_nnunets_order_of_axes(prepare, source, write_scan):
    path = write_scan(source / "sub_1/ses_1/t1.nii.gz", spacing=1.0, shape=(40, 46, 42))
    image = nibabel.load(path)
    data = image.get_fdata()
    data[data != 0] = 1 + np.random.default_rng(0).random((data != 0).sum())
    data[27:33, 20:26, 18:24] = 1000  # right of the middle
    for name, axes in (("t1", "RAS"), ("t2", "LIP")):
        ornt = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
        )
        nibabel.save(nibabel.Nifti1Image(data, image.affine).as_reoriented(ornt), path.with_name(f"{name}.nii.gz"))
    prepare()
    corpus = open_corpus(500)
    for stem in ("t1", "t2"):
        array = stored(corpus, stem)
        marked = np.argwhere(array > 0.9 * array.max()).mean(0)
        centre = (np.array(array.shape) - 1) / 2
        assert marked[corpus.left_right_axis] > centre[corpus.left_right_axis] + 5
        assert np.abs(np.delete(marked - centre, corpus.left_right_axis)).max() < 3


def test_stock_nnunet_reads_the_store(prepare, source, write_scan):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    write_scan(source / "sub_1/ses_1/t2.nii.gz", contrast=-1)
    prepare()
    corpus = open_corpus(500)
    dataset_class = infer_dataset_class(str(corpus.folder))
    dataset = dataset_class(str(corpus.folder))
    assert dataset.identifiers == sorted(corpus.scans["scan_id"])
    data, segmentation, _, properties = dataset.load_case(dataset.identifiers[0])
    assert data.shape == segmentation.shape == (1, *corpus.scans.loc[0, ["size_x", "size_y", "size_z"]])
    assert data.dtype == np.float16
    assert set(np.unique(segmentation[:])) == {-1, 0}
    assert len(properties["bbox_used_for_cropping"]) == 3


def test_scans_of_a_session_share_a_grid_and_are_cropped_by_the_union_of_their_foregrounds(prepare, source, write_scan):
    first = write_scan(source / "sub_1/ses_1/t1.nii.gz", spacing=1.0, shape=(40, 46, 42))
    image = nibabel.load(first)
    data = image.get_fdata()
    lower, upper = data.copy(), data.copy()
    lower[:, :, 34:] = 0
    upper[:, :, :8] = 0
    upper[20, 20, 40] = 77.0  # a mark that only this scan has, above its own brain's top
    nibabel.save(nibabel.Nifti1Image(lower, image.affine), first)
    nibabel.save(nibabel.Nifti1Image(upper, image.affine), first.with_name("flair.nii.gz"))
    prepare(dtype="float32")
    corpus = open_corpus(500)
    t1, flair = stored(corpus, "t1"), stored(corpus, "flair")
    assert t1.shape == flair.shape
    tissue = np.argwhere(data)
    bottom = tissue.min(0)[2]
    assert t1.shape[0] == 40 - bottom + 1
    # No resampling took place, so a voxel's place in the file tells its place in the store.
    both = np.argwhere((lower != 0) & (upper != 0))
    start = np.minimum(tissue.min(0), (20, 20, 40))
    rows = (both - start)[:, ::-1].T
    assert np.corrcoef(t1[tuple(rows)], lower[tuple(both.T)])[0, 1] > 0.99
    assert np.corrcoef(flair[tuple(rows)], upper[tuple(both.T)])[0, 1] > 0.99
    boxes = corpus.scans.set_index("modality")[["x0", "x1"]]
    assert boxes.loc["t1", "x1"] == 34 - bottom
    assert boxes.loc["flair", "x0"] == 8 - bottom


def test_scans_on_different_grids_are_brought_onto_the_sharpest_one(prepare, source, write_scan):
    write_scan(source / "sub_1/ses_1/t1.nii.gz", spacing=1.0, shape=(40, 46, 42))
    write_scan(source / "sub_1/ses_1/t2.nii.gz", spacing=(1.3, 1.4, 2.0), shape=(30, 34, 22), axes="LAS")
    prepare(dtype="float32")
    corpus = open_corpus(500)
    t1, t2 = stored(corpus, "t1"), stored(corpus, "t2")
    assert t1.shape == t2.shape
    middle = (slice(8, -8),) * 3
    for axis in range(3):
        shifts = range(-3, 4)
        alike = [np.corrcoef(t1[middle].ravel(), np.roll(t2, n, axis)[middle].ravel())[0, 1] for n in shifts]
        assert shifts[int(np.argmax(alike))] == 0, "the same tissue lies at the same voxels"
        assert max(alike) > 0.97
    assert list(corpus.scans.set_index("modality")["regridded_to"]) == ["", "fomo__sub_1__ses_1__t1"]


def test_half_precision_halves_the_bytes_and_keeps_a_thousandth(prepare, source, write_scan, nnunet_folders):
    write_scan(source / "sub_1/ses_1/t1.nii.gz", spacing=0.9, shape=(40, 50, 45))
    prepare(dtype="float32")
    corpus = open_corpus(500)
    single, size = stored(corpus, "t1"), corpus.path(0).stat().st_size
    corpus.folder.parent.rename(nnunet_folders["nnUNet_preprocessed"] / "kept")
    prepare(dtype="float16")
    corpus = open_corpus(500)
    half = stored(corpus, "t1")
    assert corpus.path(0).stat().st_size <= size / 2
    small = np.abs(single) < 2
    assert np.abs(half - single)[small].max() <= 2**-11 + 1e-6
    assert np.abs(half - single).max() <= 2**-10 + 1e-6


def test_rows_carry_what_the_index_knew_and_what_was_found(prepare, source, write_scan):
    write_scan(source / "sub_1/ses_1/t1.nii.gz", nan=5)
    (source / "participants.tsv").write_text("participant_id\tsex\tage\nsub_1\tF\t33\n")
    report = prepare()
    corpus = open_corpus(500)
    scan = corpus.scans.iloc[0]
    assert (scan.age, scan.sex, scan.subject, scan.nan_voxels) == (33, "F", "fomo/sub_1", 5)
    array = stored(corpus, "t1")
    assert np.isfinite(array).all()
    x, y, z = (slice(scan[f"{axis}0"], scan[f"{axis}1"]) for axis in "xyz")
    inside = np.zeros(array.shape, bool)
    inside[x, y, z] = True
    assert np.abs(array[~inside]).max(initial=0) < 0.2
    assert report.summary == corpus.summary()
    assert corpus.preprocessing["dtype"] == "float16"
    assert corpus.preprocessing["orientation"] == "RAS"


@pytest.fixture
def cut_in_half(monkeypatch):
    """HD-BET's place is taken by a "brain" that is the right half of the image; returns what it was asked about."""
    asked = []

    def brain_mask(image, device):
        asked.append((image, device))
        right = np.zeros(image.shape, bool)
        right[image.shape[0] // 2 :] = True
        return right

    monkeypatch.setattr("nnunet_ssl.corpus.session.brain_mask", brain_mask)
    monkeypatch.setattr("nnunet_ssl.corpus.prepare.require_hd_bet", lambda: None)
    return asked


def test_stripping_finds_the_brain_once_a_session_and_applies_it_to_all_its_scans(
    prepare, source, write_scan, cut_in_half
):
    for stem, spacing in (("dwi", 2.0), ("flair", 1.5), ("t1", 2.0), ("scan_1", 2.0)):
        write_scan(source / f"sub_1/ses_1/{stem}.nii.gz", spacing=spacing, shape=(24, 30, 26))
    prepare(skull_strip="hd-bet", not_stripped=("fomo",), dtype="float32")
    assert len(cut_in_half) == 1
    assert cut_in_half[0][0].header.get_zooms() == (1.5, 1.5, 1.5), "t1, on the session's grid"
    corpus = open_corpus(500)
    brain = nibabel.load(source / "sub_1/ses_1/t1.nii.gz").get_fdata() != 0
    width = np.ptp(np.argwhere(brain)[:, 0]) * 2.0
    assert all(corpus.scans["size_z"] < 0.6 * width), "cropped to the half that is left"
    assert corpus.preprocessing["skull_strip"] == "hd-bet"
    assert set(corpus.scans["brain_mask_from"]) == {"fomo__sub_1__ses_1__t1"}
    assert set(corpus.scans["skull"]) == {"removed"}


def test_stripped_sessions_are_left_alone_by_look_and_by_word(prepare, source, write_scan, cut_in_half):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    prepare(skull_strip="hd-bet")
    prepare(skull_strip="hd-bet", stripped=("fomo",))
    assert not cut_in_half
    prepare(skull_strip="hd-bet", not_stripped=("fomo",))
    assert len(cut_in_half) == 1, "what is said of a data set counts, and a change of mind is noticed"


def test_stripping_without_hd_bets_weights_is_refused_before_any_work(prepare, source, write_scan, monkeypatch):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")

    def missing():
        raise UserError("no weights")

    monkeypatch.setattr("nnunet_ssl.corpus.prepare.require_hd_bet", missing)
    with pytest.raises(UserError, match="no weights"):
        prepare(skull_strip="hd-bet")


PEAK = """
import resource, sys
from nnunet_ssl.corpus.plans import PreparationConfig
from nnunet_ssl.corpus.prepare import prepare_corpus
prepare_corpus(int(sys.argv[1]), PreparationConfig())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_the_peak_of_memory_does_not_grow_with_the_number_of_scans(nnunet_folders, source, write_scan, tmp_path):
    peaks = []
    for dataset, sessions in ((501, 3), (502, 30)):
        for number in range(sessions):
            write_scan(
                tmp_path / f"c{dataset}/sub_{number}/ses_1/t1.nii.gz", seed=number, shape=(60, 70, 64), spacing=1.3
            )
        index_corpus(tmp_path / f"c{dataset}", dataset, "C")
        done = subprocess.run([sys.executable, "-c", PEAK, str(dataset)], capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout))
    assert peaks[1] < peaks[0] + 20, f"MiB: {peaks}"
