"""The mean of late weights (arXiv 1803.05407), which checkpoints of an unfinished training carry for --c."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

KEY = "nnunet_ssl_average"
"""Of the mean so far, in the checkpoints of epochs that count."""


def with_weights_of(average: AveragedModel | None, network: nn.Module) -> AveragedModel:
    """Return `average`, or one begun anew, after the weights of `network` were taken in; it is kept on the CPU."""
    average = AveragedModel(network, device=torch.device("cpu")) if average is None else average
    average.update_parameters(network)
    return average


def add_average(average: AveragedModel, file: Path | str) -> None:
    """Put the mean so far into a checkpoint that nnU-Net has just written."""
    checkpoint = torch.load(file, map_location="cpu", weights_only=False, mmap=False)
    torch.save(checkpoint | {KEY: average.state_dict()}, file)


def saved_average(file: Path | str, network: nn.Module) -> AveragedModel | None:
    """Return the mean that the checkpoint of an interrupted training carries, if it has come so far.

    Args:
        network: of the same training; gives the mean its shape.
    """
    state = torch.load(file, map_location="cpu", weights_only=False, mmap=True).get(KEY)
    if state is None:
        return None
    average = AveragedModel(network, device=torch.device("cpu"))
    average.load_state_dict(state)
    return average
