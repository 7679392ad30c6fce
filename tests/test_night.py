"""benchmarks/night.sh: what it would start is what the scripts take, and a night that was cut short goes on."""

import os
import subprocess
from pathlib import Path

import pytest

from nnunet_ssl.pretraining.config import load_config

ROOT = Path(__file__).parents[1]
PARTS = {
    *("check", "attention", "encoder", "price", "price_resenc", "price_memory", "price_recipes"),
    *("recipes", "recipes_resenc"),
}


def spend_a_night(folder, **variables):
    command = [ROOT / "benchmarks" / "night.sh", folder]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stdout


def test_every_part_is_done_once(tmp_path):
    status, shown = spend_a_night(tmp_path, night_python="echo")
    assert status == 0 and "9 parts done, 0 failed" in shown
    assert {path.stem for path in tmp_path.glob("*.txt")} == PARTS
    status, shown = spend_a_night(tmp_path, night_python="false")
    assert status == 0 and all(f"{part}: done" in shown for part in PARTS)


def test_a_part_that_fails_is_named_and_done_again(tmp_path):
    status, shown = spend_a_night(tmp_path, night_python="false", night_parts="check price")
    assert status == 1 and "check failed" in shown and "0 parts done, 2 failed" in shown
    status, shown = spend_a_night(tmp_path, night_python="echo", night_parts="check")
    assert status == 1 and "1 parts done, 1 failed" in shown  # the other is still to be done
    status, _ = spend_a_night(tmp_path, night_python="echo", night_parts="price")
    assert status == 0 and not list(tmp_path.glob("*.failed"))


@pytest.mark.parametrize("part", sorted(PARTS))
def test_its_commands_name_scripts_and_settings_that_exist(tmp_path, part):
    spend_a_night(tmp_path, night_python="echo", night_parts=part)
    commands = (tmp_path / f"{part}.txt").read_text().splitlines()
    assert commands
    for command in commands:
        script, *words = command.split()
        text = (ROOT / script).read_text()
        options = [word for word in words if word.startswith("-")]
        assert all(f'"{option}"' in text for option in options), options
        load_config("mcl_mim", [word for word in words if "=" in word and not word.startswith("-")])
