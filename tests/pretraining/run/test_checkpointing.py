"""Checkpoints: whole or absent, the last few kept, damaged ones passed over."""

import os
import shutil

import pytest
import torch

from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.run.checkpointing import FINAL, LATEST, load, save, share


def state(step):
    return {"step": step, "weights": torch.full((100_000,), float(step))}


def test_what_was_saved_last_is_loaded(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, state(step), step=step, keep=2)
    loaded = load(tmp_path)
    assert loaded["step"] == 3
    assert torch.equal(loaded["weights"], state(3)["weights"])


def test_the_last_few_are_kept_and_nothing_else_is_left_behind(tmp_path):
    for step in (10, 200, 3000):
        save(tmp_path, state(step), step=step, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint_00000200.pth", "checkpoint_00003000.pth", LATEST]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_byte])
def test_a_damaged_latest_falls_back_to_the_one_before(tmp_path, damage, caplog):
    for step in (1, 2):
        save(tmp_path, state(step), step=step, keep=2)
    damage(tmp_path / LATEST)  # the numbered file of step 2 is the same file
    assert load(tmp_path)["step"] == 1
    assert "cannot be read" in caplog.text


def test_a_latest_that_lost_its_name_is_found_by_number(tmp_path):
    save(tmp_path, state(5), step=5, keep=1)
    (tmp_path / LATEST).unlink()
    assert load(tmp_path)["step"] == 5


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    assert load(tmp_path) is None


def test_nothing_but_damage_is_an_error_that_says_what_to_do(tmp_path):
    save(tmp_path, state(1), step=1, keep=1)
    cut(tmp_path / LATEST)
    with pytest.raises(UserError, match="None of the checkpoints"):
        load(tmp_path)


def test_a_name_that_is_shared_again_leaves_nothing_behind(tmp_path):
    save(tmp_path, state(1), step=1, keep=1)
    share(tmp_path / LATEST, tmp_path / FINAL)
    share(tmp_path / LATEST, tmp_path / FINAL)  # renaming one name of a file to another one of it does nothing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00000001.pth", FINAL, LATEST]


def test_a_copy_that_breaks_off_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path, state(1), step=1, keep=1)
    before = sorted(tmp_path.iterdir())

    def half(source, target):
        target.write_bytes(source.read_bytes()[:100])
        raise OSError("no space left")

    monkeypatch.setattr(os, "link", half)
    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(OSError, match="no space left"):
        share(tmp_path / LATEST, tmp_path / FINAL)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_system_without_links_gets_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, state(1), step=1, keep=1)
    assert load(tmp_path)["step"] == 1
    assert (tmp_path / LATEST).stat().st_ino != (tmp_path / "checkpoint_00000001.pth").stat().st_ino
