"""benchmarks/gpu_check.py: it runs without a GPU too, says what fails in one line each, and notices what it is for."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunet_ssl.pretraining.recipes import recipes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch):
    """A function that imports a module of the benchmarks, whose folder is no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.mark.slow
def test_everything_passes_on_a_cpu(tmp_path):
    table = tmp_path / "table.md"
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "-device", "cpu", "-o", table]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout
    caption, rows = table.read_text().split("\n\n")
    assert "torch" in caption and " 0 failed" in caption
    assert [line for line in rows.splitlines() if "| SKIP |" in line] == [
        line for line in rows.splitlines() if "too little memory" in line or "the operator's kernels" in line
    ]
    for backbone in ("swin", "resenc"):
        assert all(f"recipe {recipe}, {backbone}" in rows for recipe in recipes())
        assert f"fine-tuning {backbone}: encoder tensors that moved | PASS | 0 of" in rows


def test_a_check_that_raises_fails_in_one_line_and_the_others_go_on(script, monkeypatch, capsys):
    module = script("gpu_check")

    def broken():
        raise RuntimeError("CUDA error:\nan illegal memory access | was encountered")

    def fine():
        return module.Finding(True, "0")

    named = [("broken", broken), ("left", lambda: sys.exit("a sentence")), ("fine", fine)]
    monkeypatch.setattr(module, "checks", lambda place: named)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "-device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 1
    assert "FAIL  broken: RuntimeError: CUDA error: an illegal memory access / was encountered" in shown
    assert "FAIL  left: SystemExit: a sentence" in shown and "PASS  fine: 0" in shown
    assert "3 checks, 2 failed" in shown


@pytest.mark.parametrize("wrong", [1.01, float("nan"), float("inf")])
def test_tensors_that_differ_are_beyond_the_limit(script, wrong):
    module = script("gpu_measures")
    one, other = [torch.ones(3), torch.ones(2)], [torch.ones(3), torch.tensor([1.0, wrong])]
    assert module.verdict({"same": module.difference(one, one)}, 1e-3).passed
    assert not module.verdict({"differ": module.difference(other, one)}, 1e-3).passed


@pytest.mark.parametrize(
    ("early", "late", "passed"),
    [((), ("a", "b"), True), ((), ("a",), False), ((), (), False), (("a",), ("a", "b"), False)],
)
def test_an_encoder_must_rest_while_frozen_and_then_move_as_a_whole(script, early, late, passed, tmp_path):
    module = script("gpu_finetuning")
    start = {"a": torch.zeros(2), "b": torch.zeros(2)}

    def checkpoint(moved):
        return {"network_weights": {f"encoder.{name}": start[name] + (name in moved) for name in start}}

    place = script("gpu_measures").Place(CPU, tmp_path)
    training = module.Training(place, "swin", start, checkpoint(early), checkpoint(late))
    assert training.encoder_moved().passed == passed


@pytest.mark.parametrize(
    ("updates", "scale", "since", "passed"),
    [(12, 65536.0, 12, True), (10, 16384.0, 7, True), (12, 65536.0, 8, False), (10, 65536.0, 8, False)],
    ids=["no overflow", "two overflows", "a scaler that began anew", "lost updates"],
)
def test_a_scaler_that_began_anew_is_noticed(script, updates, scale, since, passed, tmp_path):
    module = script("gpu_finetuning")

    def checkpoint(count):
        scaler = {"scale": scale, "_growth_tracker": since}
        return {
            "optimizer_state": {"state": {key: {"step": updates} for key in range(count)}},
            "grad_scaler_state": scaler,
        }

    place = script("gpu_measures").Place(torch.device("cuda"), tmp_path)
    training = module.Training(place, "swin", {}, checkpoint(11), checkpoint(70))
    assert training.updates_counted().passed == passed


def test_a_command_that_fails_says_its_last_line(script):
    module = script("gpu_finetuning")
    with pytest.raises(RuntimeError, match="python ended with status 3: the reason"):
        module.command("python", "-c", "print('the reason'); raise SystemExit(3)")
    assert module.command("python", "-c", "print('Epoch 1', flush=True); import time; time.sleep(60)", until="Epoch 1")
