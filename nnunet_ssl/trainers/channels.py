"""Training for any subset of channels: which network the settings ask for, and the channels that a sample keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.architectures.channels import FLAT, Way
from nnunet_ssl.errors import UserError, require
from nnunet_ssl.trainers.settings import Settings

ANY: Way = "modulated"
"""What ``channels=any`` stands for: with a pre-trained encoder it had the highest mean Dice of the four ways in the
study ``missing``, for every number of channels."""


def way_of(settings: Settings) -> Way | None:
    """The way of the settings; ``None``: every case has all channels."""
    if settings.channels == "all":
        return None
    return ANY if settings.channels == "any" else settings.channels


def check_channels(settings: Settings, names: Sequence[str], normalizations: Sequence[str]) -> None:
    """See that the settings and a data set's channels go together.

    Args:
        settings: of the training.
        names: of the channels.
        normalizations: of the channels, as plans name nnU-Net's.

    Raises:
        UserError: the data set has one channel, or another number of channels than there are probabilities, or a
            placeholder of zeros would not stay zeros, as the patches of a prediction are padded.
    """
    if settings.channels == "all":
        return
    require(
        len(names) > 1,
        f"channels={settings.channels} is for cases that lack some of several channels, and this data set has one, "
        f"{', '.join(names)}: leave it out",
    )
    require(
        len(settings.channel_drop) in (1, len(names)),
        f"channel_drop has {len(settings.channel_drop)} probabilities, and the data set {len(names)} channels "
        f"({', '.join(names)}): give one for all, or one for each",
    )
    require(
        "CTNormalization" not in normalizations,
        f"channels={settings.channels} takes zeros for a channel that is missing, and nnU-Net's CTNormalization, for "
        f"channels that dataset.json calls CT, makes another number of them: give {', '.join(names)} other names",
    )


class ChannelSubsets:
    """Which channels the samples of a training keep: of those that their case has, a random subset that is not empty.

    Args:
        dataset: nnU-Net's, of preprocessed training cases.
        names: of the channels.
        drop: the probability with which a channel is left out, one for all channels or one for each; a subset that
            would be empty is drawn anew. With 1/2 all subsets are equally likely.

    Raises:
        UserError: a case has no channel.
    """

    def __init__(self, dataset: Any, names: Sequence[str], drop: Sequence[float]) -> None:
        self.names = names
        self.drop = torch.tensor(drop).expand(len(names))
        self.present = {case: present_channels(dataset.load_case(case)[0]) for case in dataset.identifiers}
        if empty := [case for case, present in self.present.items() if not any(present)]:
            raise UserError(f"All channels of {', '.join(empty)} are constant, so there is nothing to learn from.")

    def __str__(self) -> str:
        """Say how many cases lack which channel."""
        lacking = {
            name: sum(not present[place] for present in self.present.values()) for place, name in enumerate(self.names)
        }
        counts = ", ".join(f"{number} lack {name}" for name, number in lacking.items() if number)
        return f"{len(self.present)} training cases: {counts or 'all of them have all channels'}"

    def keep_some(self, data: Tensor, cases: Sequence[str]) -> Tensor:
        """Return patches (B, C, X, Y, Z) of `cases` with the channels that are absent or left out set to 0.

        Augmentation has put noise on placeholders, which this takes away.
        """
        kept = draw_subsets(torch.tensor([self.present[case] for case in cases]), self.drop)
        return data * kept.to(data)[:, :, None, None, None]


def draw_subsets(present: Tensor, drop: Tensor) -> Tensor:
    """Draw which channels are kept.

    Args:
        present: (B, C), boolean, at least one in a row.
        drop: (C), the probability of leaving a channel out, below 1.

    Returns:
        (B, C), boolean, some of `present`, at least one in a row.
    """
    kept = torch.zeros_like(present)
    while (empty := ~kept.any(1)).any():
        kept[empty] = present[empty] & (torch.rand(int(empty.sum()), len(drop)) >= drop)
    return kept


def present_channels(case: Any) -> list[bool]:
    """Tell which channels of a preprocessed case (C, X, Y, Z), an array or what becomes one when sliced, vary."""
    middle = np.asarray(case[:, case.shape[1] // 2])
    return [_varies(plane) or _varies(np.asarray(case[place])) for place, plane in enumerate(middle)]


def _varies(values: np.ndarray) -> bool:
    return bool(np.ptp(values) > FLAT)
