"""The command ``nnssl_pretrain``: messages, kills, signals, several processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.recipes import recipes

BIN = Path(sys.executable).parent


@pytest.fixture
def command(tiny, nnunet_folders):
    """A function that starts ``nnssl_pretrain`` on the CPU with tiny settings."""

    def start(recipe, *arguments, overrides=(), launcher=()):
        call = [
            *launcher,
            str(BIN / "nnssl_pretrain"),
            "-c",
            recipe,
            "-device",
            "cpu",
            "--set",
            *tiny,
            *overrides,
            *arguments,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    return start


@pytest.fixture
def results(nnunet_folders):
    return nnunet_folders["nnUNet_results"] / "Dataset500_FOMO60K"


def output_of(process, code=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def wait_for(path, process, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)


def final_state(folder):
    return torch.load(folder / "checkpoint_final.pth", weights_only=True)


def assert_identical(one, other, where=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (mine, theirs) in enumerate(zip(one, other)):
            assert_identical(mine, theirs, f"{where}/{place}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def test_help_is_quick_and_names_every_recipe(command):
    started = time.monotonic()
    shown = subprocess.run([str(BIN / "nnssl_pretrain"), "--help"], capture_output=True, text=True, check=True).stdout
    assert time.monotonic() - started < 5
    assert all(re.search(rf"\b{recipe}\b", shown) for recipe in recipes())


def test_the_resolved_settings_can_be_shown(command):
    shown = output_of(command("mcl_mim", "--print_config", overrides=["steps=7"]))
    assert "steps: 7\n" in shown
    assert "temperature: 0.2\n" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: No corpus is prepared in"),
        (("-d", "500"), "error: There is no data set 500 in nnUNet_preprocessed"),
        (("-d", "500", "-num_gpus", "4", "-device", "cuda"), "error: 4 GPUs are asked for and"),
    ],
)
def test_a_mistake_is_one_line(command, arguments, message):
    if "cuda" in arguments and torch.cuda.device_count() >= 4:
        pytest.skip("this machine has the GPUs")
    shown = output_of(command("mcl_mim", *arguments), code=1)
    assert message in shown
    assert "Traceback" not in shown


def test_of_several_corpora_one_must_be_chosen(command, write_prepared):
    write_prepared(name="Dataset600_A")
    write_prepared(name="Dataset601_B")
    shown = output_of(command("mim"), code=1)
    assert "Dataset600_A, Dataset601_B. Choose one with -d." in shown


def test_a_run_continues_with_the_settings_it_began_with(results, write_prepared):
    write_prepared()
    folder = results / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(load_config("mim", ["recipe=mine", "steps=77", "batch_size=3"]).as_yaml())
    call = [str(BIN / "nnssl_pretrain"), "-c", "mim", "--c", "--print_config", "-o", "recipe=mine", "batch_size=5"]
    shown = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert "steps: 200000\n" in shown, "an attempt that left no checkpoint is no run"
    (folder / "checkpoint_00000001.pth").touch()
    shown = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert "steps: 77\n" in shown
    assert "batch_size: 5\n" in shown


def test_a_changed_setting_has_to_suit_the_run_that_is_continued_and_not_the_recipe(results, write_prepared):
    """Here a number of a branch: the run has a balance that takes it, the recipe has none."""
    write_prepared()
    folder = results / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(load_config("mcl_mim", ["recipe=mine", "balance=clip"]).as_yaml())
    (folder / "checkpoint_00000001.pth").touch()
    settings = ["recipe=mine", "branches.masked=2"]
    call = [str(BIN / "nnssl_pretrain"), "-c", "mcl_mim", "--c", "--print_config", "--set", *settings]
    shown = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert "branches:\n  masked: 2.0\n" in shown


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_the_unbroken_one(command, results, write_prepared):
    """Weights, optimizer, queue and moving average, bit for bit, after a kill -9 between two checkpoints."""
    write_prepared()
    shown = output_of(command("mcl_mim", overrides=["recipe=whole", "steps=9", "workers=1"]))
    assert "No -d given: taking the corpus Dataset500_FOMO60K" in shown

    broken = command("mcl_mim", overrides=["recipe=broken", "steps=9", "workers=1"])
    wait_for(results / "broken" / "checkpoint_00000004.pth", broken)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.communicate()
    assert not (results / "broken" / "checkpoint_final.pth").exists()
    shown = output_of(command("mcl_mim", "--c", overrides=["recipe=broken", "steps=9", "workers=0"]))
    assert re.search(r"Read .*checkpoint_latest.pth \(step [4-8]\)", shown)

    whole, continued = final_state(results / "whole"), final_state(results / "broken")
    for part in ("learner", "optimizer", "step", "skipped"):
        assert_identical(whole[part], continued[part], part)
    rows = [(results / name / "progress.csv").read_text().splitlines() for name in ("whole", "broken")]
    assert [row.split(",")[0] for row in rows[0]] == [row.split(",")[0] for row in rows[1]]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_a_request_to_stop_saves_and_exits_cleanly(command, results, write_prepared, number, processes):
    """SLURM sends the signal to the whole group, so the workers of the loader get it too."""
    write_prepared()
    endless = ["steps=100000", "save_every=100000", "log_every=1", "workers=1"]
    process = command("mcl_mim", "-num_gpus", str(processes), overrides=endless)
    wait_for(results / "mcl_mim" / "progress.csv", process)
    time.sleep(2)
    os.killpg(process.pid, number)
    shown = output_of(process)
    step = int(re.search(r"Asked to stop: step (\d+) is saved", shown)[1])
    assert torch.load(results / "mcl_mim" / "checkpoint_latest.pth", weights_only=True)["step"] == step
    assert not (results / "mcl_mim" / "encoder.safetensors").exists()


@pytest.mark.slow
def test_several_processes_train_as_one_does(command, results, write_prepared):
    write_prepared()
    output_of(command("mcl_mim", overrides=["recipe=one"]))
    shown = output_of(command("mcl_mim", "-num_gpus", "2", overrides=["recipe=spawned"]))
    assert shown.count("Finished.") == 1
    torchrun = (str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "--no_python")
    output_of(command("mcl_mim", overrides=["recipe=torchrun"], launcher=torchrun))
    one, spawned, torchrun = (final_state(results / name)["learner"] for name in ("one", "spawned", "torchrun"))
    assert_identical(spawned, torchrun)
    assert torch.equal(one["queue.subjects"], spawned["queue.subjects"])
    for name, tensor in one.items():
        torch.testing.assert_close(spawned[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_branches_whose_negatives_are_of_the_batch_train_in_several_processes(command, results, write_prepared):
    write_prepared()
    with_dense = ["batch_size=4", "dense.weight=1", "augmentation.shared_affine=true"]
    shown = output_of(command("mcl_path", "-num_gpus", "2", overrides=with_dense))
    assert shown.count("Finished.") == 1
    assert re.search(r"step 4: contrastive \S+, accuracy \S+, lesions \S+, found \S+, dense \S+, place", shown)
    assert (results / "mcl_path" / "encoder.safetensors").is_file()


@pytest.mark.slow
def test_a_mistake_is_one_line_from_several_processes_too(command, write_prepared):
    write_prepared(modalities=("t1",))
    shown = output_of(command("mcl", "-num_gpus", "2"), code=1)
    assert "error: No session has two different known modalities" in shown
    assert "Traceback" not in shown
