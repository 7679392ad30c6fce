"""An environment outside of what pyproject.toml promises is refused in one sentence, before anything else happens."""

import os
import subprocess
import sys
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nnunet_ssl import requirements
from nnunet_ssl.errors import UserError
from nnunet_ssl.requirements import FAULTS, check_requirements

COMMANDS = sorted(each.name for each in entry_points(group="console_scripts") if each.name.startswith("nnssl_"))
SCRIPTS = sorted((Path(__file__).parents[1] / "dataset_conversion").glob("Dataset*.py"))
NEEDED = [Requirement(line) for line in requires("nnunet_ssl") if "extra ==" not in line]


def assert_refused(folder, command, release):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: nnunet_ssl needs torch") and f"not torch {release}" in done.stderr
    assert f"run: {Path(sys.executable).parent}/python" in done.stderr and "-m pip install 'torch" in done.stderr


def test_this_environment_is_within_the_ranges():
    check_requirements()


@pytest.mark.parametrize("command", [*COMMANDS, *SCRIPTS], ids=str)
def test_every_command_refuses_an_old_pytorch_at_its_start(installed, command):
    program = [sys.executable, command] if isinstance(command, Path) else [Path(sys.executable).parent / command]
    assert_refused(installed("torch", "2.5.1"), [*program, "--help"], "2.5.1")


def test_the_phantom_refuses_it_too(installed):
    assert_refused(installed("torch", "2.5.1"), [sys.executable, "-m", "nnunet_ssl.phantom", "--help"], "2.5.1")


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda each: each.name)
def test_anything_older_than_its_lowest_release_is_refused(installed, monkeypatch, requirement):
    monkeypatch.syspath_prepend(installed(requirement.name, "0.0.1"))
    with pytest.raises(UserError, match=rf"not {requirement.name} 0\.0\.1; run: .*pip install '{requirement.name}"):
        check_requirements()


def test_the_lowest_releases_are_taken(installed, monkeypatch):
    for requirement in NEEDED:
        (lowest,) = (each.version for each in requirement.specifier if each.operator == ">=")
        monkeypatch.syspath_prepend(installed(requirement.name, lowest))
    check_requirements()


@pytest.mark.parametrize("release", ["2.6.0", "2.6.0+cu124", "2.6.0a0+ecf3bae40a.nv25.01", "2.11.0.dev20260101", "9.0"])
def test_a_release_in_the_range_is_taken_whoever_built_it(installed, monkeypatch, release):
    monkeypatch.syspath_prepend(installed("torch", release))
    check_requirements()


@pytest.mark.parametrize("release", ["2.9.0", "2.9.1+cu128", "2.9.0a0+50eac811a6.nv25.9"])
def test_a_pytorch_with_a_known_fault_is_refused_with_the_reason(installed, monkeypatch, release):
    monkeypatch.syspath_prepend(installed("torch", release))
    with pytest.raises(UserError) as caught:
        check_requirements()
    assert f"not torch {release} (3-D convolutions" in str(caught.value)


def test_every_release_left_out_has_its_reason():
    left_out = {f"{each.name}=={part.version}" for each in NEEDED for part in each.specifier if part.operator == "!="}
    assert left_out == FAULTS.keys()


def test_two_packages_out_of_range_make_one_sentence(installed, monkeypatch):
    installed("monai", "1.3.0")
    monkeypatch.syspath_prepend(installed("torch", "2.5.1"))
    with pytest.raises(UserError, match=r"not monai 1\.3\.0 and torch 2\.5\.1; run: "):
        check_requirements()


@pytest.mark.parametrize("release", ["unknown", ""])
def test_a_package_without_a_release_number_is_left_alone(installed, monkeypatch, release):
    monkeypatch.syspath_prepend(installed("SimpleITK", release))
    check_requirements()


def test_a_checkout_that_is_not_installed_is_left_alone():
    check_requirements("nnunet_ssl_which_nobody_installed")


def test_no_heavy_import_comes_before_the_check():
    code = f"import sys, {requirements.__name__}; print(sorted({{'torch', 'nnunetv2', 'numpy'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
