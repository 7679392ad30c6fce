"""Figures: averaged over the interval, written as rows, drawn."""

import pandas as pd
import pytest
import torch

from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.run.plotting import progress
from nnunet_ssl.pretraining.run.records import Records


def open_records(folder, step=0):
    return Records(folder, step=step, config=load_config("mim"), device=torch.device("cpu"))


def test_a_row_holds_the_means_of_its_interval(tmp_path):
    with open_records(tmp_path) as records:
        records.add({"loss/masked": torch.tensor(1.0)}, {"gradient/total": 5.0})
        records.add({"loss/masked": torch.tensor(3.0)})
        records.write(2, {"speed/waiting": 0.5})
        records.add({"loss/masked": 7.0})
        records.write(4, {"validation/error/t1": 0.25})
    table = pd.read_csv(tmp_path / "progress.csv")
    assert table["step"].tolist() == [2, 4]
    assert table["loss/masked"].tolist() == [2, 7]
    assert table["gradient/total"][0] == 5
    assert table["validation/error/t1"].isna().tolist() == [True, False]


def test_rows_after_the_checkpoint_are_dropped_on_continuing(tmp_path):
    with open_records(tmp_path) as records:
        for step in (2, 4, 6):
            records.write(step, {"loss/masked": step})
    with open_records(tmp_path, step=4) as records:
        records.write(6, {"loss/masked": 60})
    table = pd.read_csv(tmp_path / "progress.csv")
    assert table["step"].tolist() == [2, 4, 6]
    assert table["loss/masked"].tolist() == [2, 4, 60]


def test_the_table_holds_no_dropped_row_from_the_moment_of_continuing(tmp_path):
    """What is written next may be the report of a run that is stopped again, long before its next row."""
    with open_records(tmp_path) as records:
        for step in (2, 4, 6):
            records.write(step, {"loss/masked": step})
    with open_records(tmp_path, step=5):
        assert pd.read_csv(tmp_path / "progress.csv")["step"].tolist() == [2, 4]


def test_tensorboard_gets_every_figure(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_records(tmp_path) as records:
        records.write(3, {"loss/masked": 0.5})
        records.picture("reconstruction", progress(pd.DataFrame({"step": [3], "loss/masked": [0.5]}), "a run"), 3)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/masked")] == [(3, 0.5)]
    assert events.Tags()["images"] == ["reconstruction"]
    assert (tmp_path / "reconstruction.png").is_file()


def test_the_plot_is_drawn_beside_the_table_and_only_when_there_is_one(tmp_path):
    with open_records(tmp_path) as records:
        records.plot()
        assert not (tmp_path / "progress.png").exists()
        records.write(1, {"loss/masked": 1.0})
        records.plot()
    assert (tmp_path / "progress.png").stat().st_size > 5_000


def test_nnunets_switch_for_weights_and_biases_is_heard(tmp_path, monkeypatch):
    from nnunetv2.training.logging import nnunet_logger

    logged = []

    class Fake:
        def __init__(self, folder, resume):
            logged.append(("open", resume))

        def update_config(self, config):
            logged.append(("config", config["recipe"]))

        def log(self, key, value, step):
            logged.append((key, value, step))

    monkeypatch.setattr(nnunet_logger, "WandbLogger", Fake)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    with open_records(tmp_path) as records:
        records.write(2, {"loss/masked": 0.5})
    assert logged[:2] == [("open", False), ("config", "mim")]
    assert ("loss/masked", 0.5, 2) in logged


def test_a_switch_that_cannot_be_followed_is_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_wandb_enabled", "perhaps")
    with pytest.raises(UserError, match="nnU-Net's logger cannot start"):
        open_records(tmp_path)


def test_the_log_is_closed_with_the_records(tmp_path):
    import logging

    with open_records(tmp_path) as records:
        records.write(1, {"loss/masked": 1.0})
    logging.getLogger("nnunet_ssl").info("afterwards")
    assert "afterwards" not in (tmp_path / "training_log.txt").read_text()
