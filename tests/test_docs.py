"""Are the docs true? What they type exists, and their Python runs."""

import importlib
import io
import re
import runpy
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.weights.encoders import write_encoder

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONSOLE = {point.name: point for point in distribution("nnunet_ssl").entry_points if point.name.startswith("nnssl_")}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands_typed() -> list[tuple[str, tuple[str, ...]]]:
    """Every command of ours in the docs, as words, with the page that it stands on."""
    found = []
    for page in PAGES:
        for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word in ("&&", "|", ";"):
                    found += [(page.name, tuple(words))] if words else []
                    words = []
                elif words or word in CONSOLE or word.startswith("dataset_conversion/Dataset"):
                    words.append(word)
    return sorted(set(found))


@cache
def help_of(*command: str) -> str:
    """What a command prints for --help."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [*command, "--help"])
        if command[0] in CONSOLE:
            CONSOLE[command[0]].load()()
        else:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    return shown.getvalue()


def subcommand(words: tuple[str, ...]) -> tuple[str, ...]:
    """The command, and its subcommand where it has them."""
    choices = re.search(r"^usage: \S+ \[-h\]\s+(\w+(?:\s+\|\s+\w+)+)\s+\.\.\.", help_of(words[0]))
    return words[:2] if choices else words[:1]


@pytest.mark.parametrize("page, words", commands_typed(), ids=lambda value: value if isinstance(value, str) else "")
def test_an_option_in_the_docs_is_one_of_the_command(page, words):
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", help_of(*subcommand(words))))
    typed = {word.split("=")[0] for word in words[1:] if re.match(r"--?[a-zA-Z]", word)}
    assert typed <= known, f"{page}: {' '.join(words)}"


def test_the_docs_name_every_command():
    typed = {words[0] for _, words in commands_typed()}
    text = "\n".join(page.read_text() for page in PAGES)
    assert len(typed) > 8
    assert not [name for name in CONSOLE if name not in text]


PRETRAININGS = [
    words for _, words in commands_typed() if words[0] == "nnssl_pretrain" and "--set" in words and "--c" not in words
]


@pytest.mark.parametrize("words", PRETRAININGS, ids=" ".join)
def test_a_setting_of_pre_training_in_the_docs_is_accepted(words, monkeypatch, nnunet_folders):
    monkeypatch.setattr(sys, "argv", [*words, "--print_config"])
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        importlib.import_module("nnunet_ssl.pretraining.cli").pretrain()


def test_the_python_of_the_docs_runs(tmp_path, monkeypatch, write_scan):
    monkeypatch.chdir(tmp_path)
    write_scan(tmp_path / "sub-1_T1w.nii.gz")
    write_scan(tmp_path / "sub-1_FLAIR.nii.gz", contrast=-1)
    architecture = {"backbone": "swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    torch.manual_seed(0)
    write_encoder(
        "encoder.safetensors",
        build_encoder(architecture | {"in_channels": 1}).state_dict(),
        architecture=architecture | {"in_channels": 1},
        method="mcl_mim",
        step=1,
        preprocessing=None,
        metadata={"config": {"patch_size": [32, 32, 32]}},
    )
    names = {}
    for code in blocks(ROOT / "docs" / "python.md", "python"):
        if "segment" not in code:  # needs a trained model: tests/trainers/test_commands.py
            exec(code, names)
    assert names["vector"].ndim == 1
    assert len(names["maps"]) == len(names["encoder"].network.strides)
    assert names["t1"].array.shape == names["flair"].array.shape
