"""``nnssl_weights`` as a user calls it: real command lines, exit status, what is said and what is written."""

import logging
import subprocess
import sys
from pathlib import Path

import foreign
import pytest
import torch

from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.trainers.checkpoints import find_checkpoint
from nnunet_ssl.weights.cli import weights
from nnunet_ssl.weights.encoders import load_encoder, read_checkpoint

SIZES = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 6), "window_size": 3}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command in this process; return what it said, or the error that it ended with."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*arguments, fails=False) -> str:
        monkeypatch.setattr(sys, "argv", ["nnssl_weights", *map(str, arguments)])
        if fails:
            with pytest.raises(SystemExit) as caught:
                weights()
            return str(caught.value)
        weights()
        return capsys.readouterr().out

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def umbra(stored) -> Path:
    return stored(foreign.umbra_checkpoint(foreign.umbra_encoder(), "both"), "umbra.ckpt")


def test_inspect_says_what_is_in_a_file(run, umbra):
    text = run("inspect", umbra, "--tensors")
    for part in ("origin         umbra", "200000 steps", "depths [1, 2, 1, 1]", "queue (1)", "100.0% of the encoder"):
        assert part in text
    assert "stages.1.blocks.1.attn.qkv.weight" in text


def test_command_line_of_its_own_process(umbra, tmp_path):
    command = Path(sys.executable).with_name("nnssl_weights")
    good = subprocess.run([command, "import", umbra, "-o", tmp_path / "e.safetensors"], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert "100.0% of the encoder loaded" in good.stdout and (tmp_path / "e.safetensors").is_file()
    bad = subprocess.run([command, "inspect", tmp_path / "nothing.pth"], capture_output=True, text=True)
    assert bad.returncode == 1
    assert bad.stderr == f"error: There is no checkpoint at {tmp_path}/nothing.pth.\n"


def test_import_then_export_gives_monai_what_umbra_had(run, umbra, tmp_path):
    assert "100.0% of the encoder loaded" in run("import", umbra, "-o", "encoder.safetensors")
    text = run("export", "encoder.safetensors", "-o", "swin.pt", "--format", "monai")
    assert "GroupNorm(8, channels)" in text and "mask token is left out" in text
    theirs = foreign.umbra_encoder()
    for parameter in theirs.parameters():
        parameter.data.zero_()
    theirs.patch_embed = theirs.patch_embed.patch_embed
    theirs.load_state_dict(torch.load(tmp_path / "swin.pt", weights_only=True), strict=True)
    reference = foreign.umbra_encoder()
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        for own, expected in zip(theirs(x), reference(x), strict=True):
            torch.testing.assert_close(own, expected)


def test_the_decoder_goes_along_into_files_of_our_own(run, umbra, tmp_path):
    assert "the FPN of masked modelling: 19, of " in run("inspect", umbra)
    run("import", umbra, "-o", "imported.safetensors")
    run("export", "imported.safetensors", "-o", "exported.safetensors")
    run("fetch", "exported.safetensors", "--recipe", "mcl_mim")
    expected = read_checkpoint(umbra).decoder
    assert len(expected) == 19
    for file in (
        "imported.safetensors",
        "exported.safetensors",
        "results/Dataset500_FOMO60K/mcl_mim/encoder.safetensors",
    ):
        kept = read_checkpoint(tmp_path / file).decoder
        assert kept.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.items())


@pytest.fixture
def monai(stored) -> Path:
    return stored({"state_dict": foreign.monai_encoder(**SIZES).state_dict()}, "swin.pt")


def test_a_merging_that_no_file_tells_is_asked_for_and_then_written(run, monai, tmp_path):
    for arguments in (
        ("import", monai, "-o", "encoder.safetensors"),
        ("export", monai, "-o", "m.pt", "--format", "monai"),
        ("fetch", monai, "--recipe", "mim"),
    ):
        text = run(*arguments, fails=True)
        assert "--merging" in text and "monai_1.4" in text and "\n" not in text
    assert not list(tmp_path.rglob("encoder.safetensors"))
    text = run("inspect", monai)
    assert "merging unknown" in text and "100.0% of the encoder" in text
    run("import", monai, "-o", "encoder.safetensors", "--merging", "monai_1.4")
    assert read_checkpoint(tmp_path / "encoder.safetensors").architecture["merging"] == "monai_1.4"
    assert "of MONAI before 1.5" in run("export", "encoder.safetensors", "-o", "m.pt", "--format", "monai")
    run("fetch", monai, "--recipe", "mim", "--merging", "mergingv2")
    found = tmp_path / "results" / "Dataset500_FOMO60K" / "mim" / "encoder.safetensors"
    assert read_checkpoint(found).architecture["merging"] == "mergingv2"
    assert "downsample='mergingv2') of MONAI 1.5 or later" in run("export", found, "-o", "m.pt", "--format", "monai")


def test_what_is_assumed_of_a_known_file_is_said(run, monai):
    known = monai.rename(monai.with_name("model_swinvit.pt"))
    for arguments in (("inspect", known), ("import", known, "-o", "encoder.safetensors")):
        assert "NOT TOLD       merging monai_1.4 (" in run(*arguments)


def test_fetch_knows_the_recipe_that_a_mode_leaves_and_warns_of_another(run, stored, tmp_path):
    masked = stored(foreign.umbra_checkpoint(foreign.umbra_encoder(), "masked"), "masked.ckpt")
    run("fetch", masked)
    assert (tmp_path / "results" / "Dataset500_FOMO60K" / "mim" / "encoder.safetensors").is_file()
    contrastive = stored(foreign.umbra_checkpoint(foreign.umbra_encoder(), "contrastive"), "contrastive.ckpt")
    assert "It may be: cl, mcl." in run("fetch", contrastive, fails=True)
    assert "recipe mcl_mim is another" in run("fetch", contrastive, "--recipe", "mcl_mim")
    assert "is another" not in run("fetch", contrastive, "--recipe", "mcl")


def test_fetch_puts_the_encoder_where_the_trainer_finds_it(run, umbra, tmp_path, monkeypatch):
    assert "Say it: --recipe" in run("fetch", umbra.parent, umbra.name, fails=True)
    run("fetch", umbra.parent, umbra.name, "--recipe", "mcl_mim")
    monkeypatch.delenv("nnssl_checkpoint", raising=False)
    found = find_checkpoint("mcl_mim", "nnUNetTrainerMCLMIM")
    assert found == tmp_path / "results" / "Dataset500_FOMO60K" / "mcl_mim" / "encoder.safetensors"
    pretrained = read_checkpoint(found)
    assert pretrained.metadata["imported"] == {"file": "umbra.ckpt", "origin": "umbra"}
    assert load_encoder(build_encoder(pretrained.architecture), pretrained).fraction == 1
    assert "already" in run("fetch", umbra.parent, umbra.name, "--recipe", "mcl_mim", fails=True)


def test_fetch_takes_the_id_of_a_data_set_that_one_of_nnunets_folders_holds(run, umbra, nnunet_folders, monkeypatch):
    fetch = ("fetch", umbra.parent, umbra.name, "--recipe", "mcl_mim", "-d")
    assert "Data sets with the id 7 in nnU-Net's folders: none. Give the full name" in run(*fetch, 7, fails=True)
    (nnunet_folders["nnUNet_raw"] / "Dataset007_Brains").mkdir()
    (nnunet_folders["nnUNet_preprocessed"] / "Dataset007_Brains").mkdir()
    run(*fetch, 7)
    monkeypatch.delenv("nnssl_checkpoint", raising=False)
    found = find_checkpoint("mcl_mim", "nnUNetTrainerMCLMIM")
    assert found == nnunet_folders["nnUNet_results"] / "Dataset007_Brains" / "mcl_mim" / "encoder.safetensors"
    (nnunet_folders["nnUNet_raw"] / "Dataset007_Other").mkdir()
    text = run(*fetch, 7, fails=True)
    assert "the id 7 in nnU-Net's folders: Dataset007_Brains, Dataset007_Other." in text


def test_fetch_refuses_a_folder_where_no_trainer_looks(run, umbra, tmp_path):
    text = run("fetch", umbra.parent, umbra.name, "--recipe", "mcl_mim", "-d", "FOMO60K", fails=True)
    assert text == "error: 'FOMO60K' is neither a data set id (500) nor a data set name (Dataset500_FOMO60K)."
    assert not (tmp_path / "results").exists()


def test_a_half_matching_file_is_an_error_unless_allowed(run, stored, tmp_path):
    state = {
        name: value for name, value in foreign.umbra_encoder().state_dict().items() if "layers4.0.down" not in name
    }
    half = stored(state, "half.pt")
    assert "less than the 90%" in run("import", half, "-o", "encoder.safetensors", fails=True)
    assert not (tmp_path / "encoder.safetensors").exists()
    assert "stages.3.merging.reduction.weight" in run("inspect", half)
    run("import", half, "-o", "encoder.safetensors", "--minimum_fraction", "0.5")
    assert "stages.3.merging.reduction.weight" not in read_checkpoint(tmp_path / "encoder.safetensors").tensors


def test_mistakes_are_one_line(run, umbra):
    for arguments in (
        ("inspect", "nothing.pth"),
        ("import", umbra, "-o", "encoder.pth"),
        ("export", umbra, "-o", "x.pth", "--format", "nnssl"),
        ("inspect", umbra, "--origin", "timm"),
    ):
        text = run(*arguments, fails=True)
        assert text.startswith("error: ") and "\n" not in text
