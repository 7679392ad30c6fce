"""Are the docs true? What they type exists, their Python runs, their links lead somewhere, every setting is told of."""

import dataclasses
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
import typing
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
import yaml
from markdown.extensions.toc import slugify

from nnunet_ssl.architectures import backbones
from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.studies.study_file import study_from
from nnunet_ssl.trainers.settings import Settings
from nnunet_ssl.typed import ranged
from nnunet_ssl.weights.encoders import write_encoder

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONSOLE = {point.name: point for point in distribution("nnunet_ssl").entry_points if point.name.startswith("nnssl_")}

REFERENCE = ROOT / "docs" / "reference"


def module_of_the_site(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = module_of_the_site("settings_tables")


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
    for code in blocks(REFERENCE / "python.md", "python"):
        if "segment" not in code:  # needs a trained model: tests/trainers/test_commands.py
            exec(code, names)
    assert names["vector"].ndim == 1
    assert len(names["maps"]) == len(names["encoder"].network.strides)
    assert names["t1"].array.shape == names["flair"].array.shape


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_begins_with_its_title_and_what_it_is_for(page):
    assert re.match(r"# [^\n]+\n\n[\w`\[(]", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_is_python(page):
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")


def test_a_setting_of_fine_tuning_in_the_docs_is_accepted():
    typed = {
        found
        for page in PAGES
        for found in re.findall(r'nnssl_settings="?([a-z_]+=(?!\.\.\.)[^\s"`)]+)', page.read_text())
    }
    assert len(typed) > 8
    for text in typed:
        Settings().updated(text)


STUDIES = [code for page in PAGES for code in blocks(page, "yaml") if re.search("^experiments:", code, re.M)]


@pytest.mark.parametrize("code", STUDIES, ids=lambda code: yaml.safe_load(code)["name"])
def test_a_study_of_the_docs_is_one_and_its_settings_are_accepted(code):
    study = study_from(yaml.safe_load(code))
    assert study.runs()
    for run in study.runs():
        Settings().updated(run.settings)


def anchors_of(page: Path) -> set[str]:
    """The places in a page that a link can lead to, as the site and GitHub call them."""
    text = re.sub(r"^```.*?^```", "", TABLES.with_tables(page.read_text()), flags=re.M | re.S)
    return {slugify(heading, "-") for heading in re.findall(r"^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file_and_a_heading_of_it(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for path, anchor in re.findall(r"\]\((?![a-z]+:)([^)#]*)#?([^)]*)\)", text):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors_of(target), f"{path}#{anchor}"


MADE = [page for page in PAGES if re.search(r"^(:::|<!-- settings:)", page.read_text(), re.M)]


@pytest.mark.parametrize("page", MADE, ids=lambda page: page.stem)
def test_a_page_that_the_site_completes_links_to_what_it_is_made_from(page):
    """GitHub shows such a page without the tables and signatures."""
    text = page.read_text()
    modules = {path.rpartition(".")[0] for path in re.findall(r"^<!-- settings: ([\w.]+)", text, re.M)}
    modules |= set(re.findall(r"^::: ([\w.]+)", text, re.M))
    linked = {(page.parent / path).resolve() for path in re.findall(r"\]\(([^)#]+\.py)\)", text)}
    assert modules
    assert {Path(importlib.import_module(module).__file__) for module in modules} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_table_is_whole(page):
    """Below a blank line its rows would be shown as text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for table in re.findall(r"(?:^ *\|.*\n?)+", text, re.M):
        _, ruler, *rows = table.splitlines()
        assert re.fullmatch(r" *\|(-+\|)+", ruler), table
        assert rows, table


def test_a_page_that_code_or_a_message_names_is_there():
    folders = ("nnunet_ssl", "dataset_conversion", "tests", "benchmarks", "examples", "docs", ".ci", ".github")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    named = set()
    for path in [*files, *ROOT.glob("*.md"), *ROOT.glob("*.yml"), *ROOT.glob("*.toml")]:
        if path.suffix in (".py", ".sh", ".yaml", ".yml", ".toml", ".md", ".ipynb", ""):
            named |= set(re.findall(r"docs/[\w/-]+\.\w+", path.read_text(errors="ignore")))
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]


def settings_without_meaning(kind: type) -> list[str]:
    """The settings of a dataclass, and of those in it, that nothing is said of."""
    missing, meanings, hints = [], TABLES.meanings_of(kind), typing.get_type_hints(kind)
    for field in TABLES.keyed_fields(kind):
        hint = TABLES.without_none(hints[field.name])
        if TABLES.is_section(hint):
            missing += settings_without_meaning(hint)
        elif not meanings[field.name]:
            missing.append(f"{kind.__name__}.{field.name}")
    return missing


@pytest.mark.parametrize("kind", [PretrainingConfig, Settings, *(one.settings for one in backbones.known().values())])
def test_every_setting_has_a_meaning(kind):
    assert settings_without_meaning(kind) == []


def test_the_reference_has_every_setting():
    pages = "\n".join(TABLES.with_tables(page.read_text()) for page in REFERENCE.glob("*settings.md"))
    keys = set(re.findall(r"^\| `([\w.]+)` \|", pages, re.M))
    assert {field.name for field in dataclasses.fields(Settings)} <= keys
    assert {"swin.depths", "resenc.preset", "primus.grid", "masked.tokens.level", "sampling.jitter_mm"} <= keys
    assert "others" not in keys


@dataclasses.dataclass
class Inner:
    """Of an example. More."""

    share: float = ranged(0.5, "between 0 and 1")  # of all,
    # and of the rest


@dataclasses.dataclass
class Outer:
    """An example.

    Attributes:
        names: what is
            called how.
        sizes: of ``both``.
    """

    names: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sizes: tuple[int, int] | None = None
    inner: Inner | None = None
    hidden: int = dataclasses.field(default=0, metadata={"key": False})


def test_a_table_says_default_range_and_meaning_of_a_setting():
    assert TABLES.tables_of(Outer) == (
        "| key | default | takes | meaning |\n|---|---|---|---|\n"
        "| `names` |  | a number by name | what is called how. |\n"
        "| `sizes` |  | 2 whole numbers | of `both`. |\n\n"
        "## inner\n\nOf an example. More.\n\n"
        "| key | default | takes | meaning |\n|---|---|---|---|\n"
        "| `inner.share` | `0.5` | a number, between 0 and 1 | of all, and of the rest |"
    )
