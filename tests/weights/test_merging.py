"""Patch mergings are computed as the weights were trained: against MONAI 1.4 and the installed MONAI."""

import os
import subprocess
import sys
from pathlib import Path

import foreign
import monai_1_4
import numpy as np
import pytest
import torch

from nnunet_ssl.architectures.networks import SwinFPN, build_encoder
from nnunet_ssl.architectures.swin import MERGINGS
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.networks import network_entry
from nnunet_ssl.weights.encoders import load_encoder, read_checkpoint, write_encoder

REFERENCE = Path(__file__).parent / "reference" / "monai_1_4.npz"
OLD = {"merging": "monai_1.4", "mergingv2": "mergingv2"}
NEW = {"merging": "monai", "mergingv2": "mergingv2"}
BTCV, BRATS = "swin_unetr.base_5000ep_f48_lr2e-4_pretrained.pt", "fold1_f48_ep300_4gpu_dice0_9059"


def maps(path, merging=None) -> list[np.ndarray]:
    pretrained = read_checkpoint(path, merging=merging)
    network = build_encoder(pretrained.architecture)
    assert load_encoder(network, pretrained).fraction == 1
    network = network.double()
    network.load_state_dict(pretrained.tensors)  # the numbers are drawn in float64
    with torch.no_grad():
        return [level.numpy() for level in network(monai_1_4.drawn_volume())[1:]]


def references(name: str) -> list[np.ndarray]:
    with np.load(REFERENCE) as arrays:
        return [arrays[f"{name}, level {level}"] for level in range(1, 5)]


@pytest.fixture
def weights(stored):
    """Store the weights that the reference was made with, as a file of some name."""

    def store(name="swin.pt", variant="merging with conv blocks", prefix="swinViT.", **content):
        state = monai_1_4.encoder(**monai_1_4.VARIANTS[variant]).state_dict()
        return stored({"state_dict": {prefix + key: value for key, value in state.items()}, **content}, name)

    return store


@pytest.mark.parametrize("name", monai_1_4.VARIANTS)
def test_maps_equal_monai_1_4(weights, name):
    own = maps(weights(variant=name), OLD[name.split()[0]])
    for level, reference in zip(own, references(name), strict=True):
        np.testing.assert_allclose(level, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", monai_1_4.VARIANTS)
def test_maps_equal_the_installed_monai(weights, name):
    own = maps(weights(variant=name), NEW[name.split()[0]])
    for level, reference in zip(own, monai_1_4.maps(**monai_1_4.VARIANTS[name]), strict=True):
        np.testing.assert_allclose(level, reference, rtol=0, atol=1e-10)


def test_the_mergings_differ(weights):
    coarsest = [maps(weights(), merging)[-1].ravel() for merging in MERGINGS]
    assert np.corrcoef(coarsest)[np.triu_indices(len(MERGINGS), 1)].max() < 0.9


@pytest.mark.slow
@pytest.mark.skipif("NNSSL_MONAI_1_4" not in os.environ, reason="NNSSL_MONAI_1_4 names no folder with MONAI 1.4")
def test_the_reference_is_what_monai_1_4_computes(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.environ["NNSSL_MONAI_1_4"]}
    subprocess.run([sys.executable, monai_1_4.__file__, tmp_path / "again.npz"], env=environment, check=True)
    with np.load(tmp_path / "again.npz") as again, np.load(REFERENCE) as reference:
        assert set(again) == set(reference)
        for name in reference:
            np.testing.assert_allclose(again[name], reference[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["model_swinvit.pt", BTCV, "model_bestValRMSE.pt", "best_swin_model.pth"])
def test_known_files_get_the_merging_of_their_time(weights, name):
    pretrained = read_checkpoint(weights(name))
    assert pretrained.architecture["merging"] == "monai_1.4"
    assert name in pretrained.assumed["merging"]


def test_the_brats_models_are_known_by_their_folder(weights, tmp_path):
    (tmp_path / BRATS).mkdir()
    path = weights("model.pt").rename(tmp_path / BRATS / "model.pt")
    assert read_checkpoint(path).architecture["merging"] == "monai_1.4"


def test_names_of_layers_from_before_monai_1_5_tell_it(stored):
    state = foreign.monai_encoder(**monai_1_4.SIZES, use_v2=False).state_dict()
    state = {name.replace("linear1", "fc1").replace("linear2", "fc2"): value for name, value in state.items()}
    assert read_checkpoint(stored(state)).architecture["merging"] == "monai_1.4"


def test_umbras_weights_are_of_monai_1_5(stored):
    content = foreign.umbra_checkpoint(foreign.umbra_encoder(), "both")
    assert read_checkpoint(stored(content)).architecture["merging"] == "monai"
    content["hyper_parameters"]["extra_swin_kwargs"] = {"downsample": "mergingv2"}
    assert read_checkpoint(stored(content)).architecture["merging"] == "mergingv2"


def test_where_nothing_tells_nothing_is_computed(weights):
    pretrained = read_checkpoint(weights())
    assert pretrained.architecture["merging"] is None
    for build in (build_encoder, lambda found: SwinFPN(1, 2, **network_entry(found, {})["arch_kwargs"])):
        with pytest.raises(UserError, match=r"--merging.* monai_1\.4 .*, monai .*, or mergingv2"):
            build(pretrained.architecture)


def test_what_is_said_overrules_what_is_assumed_but_not_what_a_file_tells(weights, tmp_path):
    assert read_checkpoint(weights("model_swinvit.pt"), merging="monai").architecture["merging"] == "monai"
    pretrained = read_checkpoint(weights(), merging="monai_1.4")
    described = {"method": None, "step": None, "preprocessing": None, "metadata": {}}
    own = tmp_path / "encoder.safetensors"
    write_encoder(own, pretrained.tensors, architecture=pretrained.architecture, **described)
    assert read_checkpoint(own).architecture["merging"] == "monai_1.4"
    assert read_checkpoint(own, merging="monai_1.4").architecture["merging"] == "monai_1.4"
    with pytest.raises(UserError, match=r"its patch merging is monai_1\.4, not mergingv2"):
        read_checkpoint(own, merging="mergingv2")


@pytest.mark.parametrize(("file", "merging"), [("model_swinvit.pt", "monai_1.4"), ("other.pt", "monai")])
def test_files_imported_before_architectures_had_mergings_still_open_and_can_be_overruled(
    weights, tmp_path, file, merging
):
    pretrained = read_checkpoint(weights(), merging="monai")
    architecture = {key: value for key, value in pretrained.architecture.items() if key != "merging"}
    metadata = {"imported": {"file": file, "origin": "monai"}}
    own = tmp_path / "encoder.safetensors"
    described = {"method": None, "step": None, "preprocessing": None}
    write_encoder(own, pretrained.tensors, architecture=architecture, metadata=metadata, **described)
    assert read_checkpoint(own).architecture["merging"] == merging
    assert "merging" in read_checkpoint(own).assumed
    for said in MERGINGS:
        assert read_checkpoint(own, merging=said).architecture["merging"] == said


def test_our_own_weights_without_the_key_are_computed_as_before(tmp_path):
    architecture = {"backbone": "swin", "in_channels": 1, **monai_1_4.SIZES}
    network = build_encoder(architecture)
    described = {"method": None, "step": None, "preprocessing": None, "metadata": {}}
    write_encoder(tmp_path / "e.safetensors", network.state_dict(), architecture=architecture, **described)
    pretrained = read_checkpoint(tmp_path / "e.safetensors")
    assert build_encoder(pretrained.architecture).stages[0].merging.octants == MERGINGS["monai"]
    with pytest.raises(UserError, match=r"merging is monai, not monai_1\.4"):
        read_checkpoint(tmp_path / "e.safetensors", merging="monai_1.4")


def test_an_unknown_merging_is_refused(weights):
    with pytest.raises(UserError, match=r"'v3'; it can be one of: monai, monai_1\.4, mergingv2"):
        read_checkpoint(weights(), merging="v3")


def test_residual_encoders_have_no_merging(stored):
    with pytest.raises(UserError, match="no patch mergings"):
        read_checkpoint(stored(foreign.resenc_unet().encoder.state_dict()), merging="monai")
