"""Which file a trainer starts from."""

import os

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.checkpoints import explicit_checkpoint, find_checkpoint


@pytest.fixture(autouse=True)
def variables(monkeypatch, tmp_path):
    monkeypatch.delenv("nnssl_checkpoint", raising=False)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))


def finished(folder, recipe="mcl_mim", dataset="Dataset500_FOMO60K", age=0):
    path = folder / "results" / dataset / recipe / "encoder.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (1000 - age, 1000 - age))
    return path


def test_the_newest_finished_pre_training_of_the_recipe_is_taken(tmp_path):
    finished(tmp_path, age=5)
    newest = finished(tmp_path, dataset="Dataset510_Own", age=1)
    finished(tmp_path, recipe="mim")
    (tmp_path / "results" / "Dataset511_Running" / "mcl_mim").mkdir(parents=True)
    assert find_checkpoint("mcl_mim", "nnUNetTrainerMCLMIM") == newest


def test_plans_for_a_residual_encoder_take_its_run_first_and_else_the_other(tmp_path):
    swin = finished(tmp_path, age=1)
    assert find_checkpoint("mcl_mim", "nnUNetTrainerMCLMIM", residual=True) == swin
    resenc = finished(tmp_path, recipe="mcl_mim_resenc", age=5)
    assert find_checkpoint("mcl_mim", "nnUNetTrainerMCLMIM", residual=True) == resenc
    assert find_checkpoint("mcl_mim", "nnUNetTrainerMCLMIM") == swin


@pytest.mark.parametrize("as_folder", [False, True])
def test_an_explicit_file_or_folder_comes_first(tmp_path, monkeypatch, as_folder):
    finished(tmp_path)
    mine = finished(tmp_path, recipe="mine")
    monkeypatch.setenv("nnssl_checkpoint", str(mine.parent if as_folder else mine))
    assert explicit_checkpoint() == find_checkpoint("mcl_mim", "nnUNetTrainerMCLMIM") == mine


def test_without_one_the_message_says_where_it_looked_and_the_three_ways_out(tmp_path):
    with pytest.raises(UserError) as error:
        find_checkpoint("mcl_mim", "nnUNetTrainerMCLMIM")
    for part in (
        f"{tmp_path}/results/Dataset*/mcl_mim/encoder.safetensors",
        "nnssl_pretrain -c mcl_mim",
        "nnssl_checkpoint=",
        "nnUNetTrainerSwinFPNScratch",
    ):
        assert part in str(error.value)


def test_the_arm_without_a_recipe_asks_for_a_file():
    with pytest.raises(UserError, match="nnssl_checkpoint=/path"):
        find_checkpoint(None, "nnUNetTrainerSSL")


def test_a_wrong_explicit_path_is_named(monkeypatch):
    monkeypatch.setenv("nnssl_checkpoint", "/nowhere/encoder.safetensors")
    with pytest.raises(UserError, match="there is no file /nowhere"):
        find_checkpoint("mcl_mim", "nnUNetTrainerMCLMIM")
