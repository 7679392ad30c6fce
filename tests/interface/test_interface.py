import subprocess
import sys

import blosc2
import matplotlib
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny_models import write_model

import nnunet_ssl
from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.encoding import EncodingConfig, embed_corpus
from nnunet_ssl.interface.segmentation import load_predictor

PATCH = [32, 32, 32]


@pytest.fixture
def checkpoint(tmp_path, write_tiny_encoder):
    """A small encoder that learned from scans of 2 mm."""
    preprocessing = {"spacing": [2.0, 2.0, 2.0], "dtype": "float16", "skull_strip": None}
    path = tmp_path / "encoder.safetensors"
    write_tiny_encoder(path, {"patch_size": PATCH}, step=3, preprocessing=preprocessing)
    return path


@pytest.fixture
def encoder(checkpoint):
    return nnunet_ssl.load_encoder(checkpoint, "cpu")


def test_the_package_itself_loads_nothing_heavy_and_names_what_it_offers():
    code = (
        "import sys, nnunet_ssl; print(*dir(nnunet_ssl)); assert not {'torch', 'numpy', 'nnunetv2'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(nnunet_ssl.__all__) <= set(shown)
    assert all(callable(getattr(nnunet_ssl, name)) for name in nnunet_ssl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'embedd'"):
        nnunet_ssl.embedd  # noqa: B018


def test_scans_are_read_as_a_corpus_is_prepared(prepare, source, write_scan, encoder):
    folder = source / "sub_1/ses_1"
    paths = [
        write_scan(folder / "t1.nii.gz", axes="LPS"),
        write_scan(folder / "t2.nii.gz", contrast=-1, spacing=1.5, shape=(26, 32, 28)),
    ]
    prepare(spacing=(2.0, 2.0, 2.0))
    corpus = open_corpus(500)
    scans = nnunet_ssl.read_session(paths, encoder.preprocessing)
    for row, scan in enumerate(scans):
        np.testing.assert_array_equal(scan.array, blosc2.open(str(corpus.path(row)))[:].astype(np.float32))
        np.testing.assert_array_equal(scan.foreground, corpus.foreground_box(row))
        assert scan.spacing == corpus.spacing
    assert scans[0].array.shape == scans[1].array.shape
    assert repr(scans[0]) == "Scan(t1.nii.gz, {}x{}x{} voxels of 2x2x2 mm)".format(*scans[0].array.shape[1:])


@pytest.mark.parametrize("view", ["centre", "tiles"])
def test_an_embedding_is_the_commands(prepare, source, write_scan, checkpoint, encoder, view):
    path = write_scan(source / "sub_1/ses_1/t1.nii.gz", spacing=3.0, shape=(34, 42, 36))
    prepare(spacing=(2.0, 2.0, 2.0))
    expected = embed_corpus(checkpoint, 500, EncodingConfig(view=view), torch.device("cpu")).vectors
    np.testing.assert_allclose(nnunet_ssl.embed(encoder, path, view=view), expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        nnunet_ssl.embed(encoder, nnunet_ssl.read_scan(path, encoder.preprocessing), view=view), expected[0], 1e-5, 1e-6
    )


def test_the_last_map_pooled_is_the_embedding_and_strides_are_kept(write_scan, tmp_path, encoder):
    path = write_scan(tmp_path / "t1.nii.gz")
    maps = nnunet_ssl.feature_maps(encoder, path)
    np.testing.assert_allclose(maps[-1].mean(axis=(1, 2, 3)), nnunet_ssl.embed(encoder, path), rtol=1e-5, atol=1e-6)
    assert [32 // features.shape[1] for features in maps] == list(encoder.network.strides)
    elsewhere = nnunet_ssl.feature_maps(encoder, path, start=(0, 0, 0))
    assert not np.allclose(elsewhere[0], maps[0])


def test_an_encoder_tells_what_it_is_in_a_line(encoder):
    assert repr(encoder).startswith("LoadedEncoder(swin, mcl_mim, nnunet_ssl, 0.")
    assert encoder.patch_size == tuple(PATCH)
    assert not encoder.network.training


@pytest.mark.parametrize(
    ("preprocessing", "warned"),
    [({"normalization_schemes": ["ZScoreNormalization"], "spacing": [1.0, 1.0, 1.0]}, True), (None, False)],
)
def test_an_encoder_that_saw_scans_of_another_normalisation_says_so(
    tmp_path, write_tiny_encoder, caplog, preprocessing, warned
):
    write_tiny_encoder(tmp_path / "theirs.safetensors", {"patch_size": PATCH}, preprocessing=preprocessing)
    nnunet_ssl.load_encoder(tmp_path / "theirs.safetensors", "cpu")
    assert ("normalised by ZScoreNormalization" in caplog.text) == warned


def test_published_weights_are_loaded_by_name_once_they_were_fetched(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    with pytest.raises(UserError, match="nnssl_weights fetch openmind-mae"):
        nnunet_ssl.load_encoder("openmind-mae")
    place = tmp_path / "results" / "zoo" / "openmind-mae"
    place.mkdir(parents=True)
    checkpoint.rename(place / checkpoint.name)
    assert nnunet_ssl.load_encoder("openmind-mae", "cpu").pretrained.step == 3


def test_what_cannot_be_used_is_an_exception_that_names_the_file(tmp_path, write_scan):
    write_scan(tmp_path / "good.nii.gz")
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.nii\.gz"):
        nnunet_ssl.read_scan(tmp_path / "bad.nii.gz")
    with pytest.raises(UserError, match=r"bad\.nii\.gz"):
        nnunet_ssl.read_session([tmp_path / "good.nii.gz", tmp_path / "bad.nii.gz"])
    with pytest.raises(UserError, match=r"gone\.nii\.gz"):
        nnunet_ssl.read_scan(tmp_path / "gone.nii.gz")
    with pytest.raises(UserError, match="takes a list"):
        nnunet_ssl.read_session(str(tmp_path / "good.nii.gz"))
    with pytest.raises(UserError, match=r"gone\.safetensors"):
        nnunet_ssl.load_encoder(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match=r"no folder of an nnU-Net model"):
        nnunet_ssl.segment(tmp_path, [tmp_path / "good.nii.gz"])


def test_the_fold_of_all_cases_is_taken_only_where_there_is_no_other(tmp_path):
    model = write_model(tmp_path / "model", folds=(0, 1))
    (model / "fold_all").symlink_to(model / "fold_0")
    nnunets = nnUNetPredictor.auto_detect_available_folds(str(model), "checkpoint_final.pth")
    assert len(load_predictor(model, None, torch.device("cpu")).list_of_parameters) == len(nnunets) == 2
    for fold in (0, 1):
        (model / f"fold_{fold}").rename(tmp_path / f"fold_{fold}")
    (model / "fold_all").unlink()
    (model / "fold_all").symlink_to(tmp_path / "fold_0")
    assert len(load_predictor(model, None, torch.device("cpu")).list_of_parameters) == 1


def test_figures_stay_where_they_were_when_a_model_cannot_be_loaded(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")

    def fails(*_):
        matplotlib.use("agg")
        raise RuntimeError("no such trainer")

    monkeypatch.setattr(nnUNetPredictor, "initialize_from_trained_model_folder", fails)
    before = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        with pytest.raises(RuntimeError, match="no such trainer"):
            load_predictor(model, None, torch.device("cpu"))
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)
