import os
import subprocess
import sys
import textwrap

import nibabel
import numpy as np
import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging import skull_strip
from nnunet_ssl.imaging.skull_strip import brain_mask, looks_stripped, require_hd_bet


def ellipsoid(shape_mm, radii_mm, centre_mm, voxel=4.0):
    grid = np.indices([round(size / voxel) for size in shape_mm]) * voxel
    offset = (grid - np.reshape(centre_mm, (3, 1, 1, 1))) / np.reshape(radii_mm, (3, 1, 1, 1))
    return (offset**2).sum(0) < 1


FIELD = (200, 240, 200)
BRAIN = ellipsoid(FIELD, (65, 85, 65), (110, 120, 100))  # 1.5 l
HEAD = ellipsoid(FIELD, (95, 105, 80), (100, 120, 100)) | ellipsoid(FIELD, (90, 60, 55), (0, 120, 100))  # with a neck


def test_a_brain_alone_looks_stripped():
    assert looks_stripped(BRAIN * 100.0, 4.0**3)


def test_a_head_does_not_look_stripped_even_in_masked_air():
    assert not looks_stripped(HEAD * 100.0, 4.0**3)


def test_noise_around_the_head_does_not_look_stripped():
    noise = np.abs(np.random.default_rng(0).normal(size=HEAD.shape))
    assert not looks_stripped(noise + BRAIN * 100, 4.0**3)


def test_a_brain_with_a_head_sized_volume_does_not_look_stripped():
    assert not looks_stripped(BRAIN * 100.0, 5.0**3)


@pytest.fixture
def fake_hd_bet(tmp_path, monkeypatch):
    """A package with HD-BET's names and its bad manners; its "network" calls everything above 10 brain."""
    package = tmp_path / "HD_BET"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "paths.py").write_text(
        f"folder_with_parameter_files = {str(tmp_path / 'params')!r}\nZENODO_DOWNLOAD_URL = 'https://zenodo.org/x'\n"
    )
    (package / "checkpoint_download.py").write_text(
        "def maybe_download_parameters():\n    raise ConnectionError('no internet')\n"
    )
    (package / "hd_bet_prediction.py").write_text(
        textwrap.dedent(
            """
            import os, sys
            sys.stdout = sys.__stdout__

            class Predictor:
                calls = []
                def predict_single_npy_array(self, image, properties):
                    print("chatter")
                    self.calls.append((image.shape, properties["spacing"]))
                    return (image[0] > 10).astype("uint8")

            def get_hdbet_predictor(use_tta, device, verbose=False):
                import torch
                os.environ["nnUNet_compile"] = "F"
                torch.set_num_threads(7)
                return Predictor()
            """
        )
    )
    weights = tmp_path / "params" / "fold_all" / "checkpoint_final.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "HD_BET"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    skull_strip._predictor.cache_clear()
    yield weights
    skull_strip._predictor.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "HD_BET"]:
        del sys.modules[name]


def test_the_mask_lies_on_the_images_own_grid(fake_hd_bet):
    data = np.random.default_rng(0).uniform(0, 20, (5, 6, 7)).astype(np.float32)
    affine = np.array(
        [[0, -2.0, 0, 3], [0, 0, 1.5, 4], [-1.0, 0, 0, 5], [0, 0, 0, 1]]
    )  # axes: inferior, left, anterior
    np.testing.assert_array_equal(brain_mask(nibabel.Nifti1Image(data, affine)), data > 10)
    from HD_BET.hd_bet_prediction import Predictor

    assert Predictor.calls[-1] == ((1, 5, 7, 6), [1.0, 1.5, 2.0]), "superior, anterior, right"


@pytest.mark.parametrize("compiles", [None, "T"])
def test_hd_bets_side_effects_stay_inside(fake_hd_bet, monkeypatch, capsys, compiles):
    import torch

    if compiles:
        monkeypatch.setenv("nnUNet_compile", compiles)
    else:
        monkeypatch.delenv("nnUNet_compile", raising=False)
    stdout, threads = sys.stdout, torch.get_num_threads()
    brain_mask(nibabel.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)))
    assert sys.stdout is stdout
    assert os.environ.get("nnUNet_compile") == compiles  # noqa: SIM112
    assert torch.get_num_threads() == threads
    assert capsys.readouterr().out == ""


def test_missing_weights_offline_are_explained(fake_hd_bet):
    require_hd_bet()
    fake_hd_bet.unlink()
    with pytest.raises(UserError, match=r"weights are not in .*params.*ConnectionError.*zenodo\.org.*copy the folder"):
        require_hd_bet()


def test_a_missing_hd_bet_is_explained(monkeypatch):
    monkeypatch.setattr(skull_strip.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .nnunet_ssl\[skullstrip\]"):
        require_hd_bet()


def test_the_real_hd_bet_offline_asks_for_its_weights_and_leaves_the_process_as_it_was(tmp_path):
    pytest.importorskip("HD_BET.paths")
    code = """
        import os, sys
        from nnunet_ssl.imaging.skull_strip import _contained, require_hd_bet
        stdout = sys.stdout
        with _contained():
            import HD_BET.hd_bet_prediction
        assert sys.stdout is stdout and "nnUNet_compile" not in os.environ
        require_hd_bet()
    """
    environment = os.environ | {"HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    environment.pop("nnUNet_compile", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"nnunet_ssl.errors.UserError: HD-BET is installed, but its weights are not in {tmp_path}")
