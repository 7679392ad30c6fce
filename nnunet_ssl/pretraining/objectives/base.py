"""What an objective is: everything that one branch of a pre-training brings along, in one class.

The loop, the step and the networks know objectives by this interface alone. `docs/extending.md` adds one from outside.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_ssl.architectures.backbones.base import Encoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.run.panels import Panel
from nnunet_ssl.pretraining.views.augmentation import AugmentationConfig, Batch
from nnunet_ssl.pretraining.views.sampling import SamplingConfig
from nnunet_ssl.schedules import Ramp

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Pairs = Literal["mcl", "cl"]
"""The pairs of views that can be compared: two modalities of a session, or two views of a scan."""


class Recipe(Protocol):
    """What an objective may ask of the configuration, :class:`nnunet_ssl.pretraining.config.PretrainingConfig`."""

    @property
    def patch_size(self) -> tuple[int, int, int]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def queue_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def augmentation(self) -> AugmentationConfig: ...
    @property
    def maps(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def shared_pass(self) -> bool: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def sampling(self) -> SamplingConfig: ...
    @property
    def pairs(self) -> Pairs | None: ...
    @property
    def objectives(self) -> tuple[Objective, ...]: ...
    def section(self, name: str) -> Any: ...


class EncoderWithHeads(Protocol):
    """What an objective may ask of the query or the key network, :class:`nnunet_ssl.pretraining.model.Network`."""

    @property
    def encoder(self) -> Encoder: ...
    def encode(self, views: Tensor, mask: Tensor | None = None) -> list[Tensor]: ...
    def head(self, name: str, *inputs: Any) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The central patch of every scan of some sessions, without augmentation: the same at every validation."""

    patches: Tensor  # (N, 1, X, Y, Z) float16, CPU
    subject: np.ndarray  # (N,)
    modality: np.ndarray  # (N,) names


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The views of a step, or of a part of one: pairs (single scans, where no objective compares views), and the scans
    that cannot form a pair, for the objectives with masks alone."""

    batch: Batch
    unpaired: Batch | None
    mask: Tensor | None  # (N, *grid) bool for the N views of `batch`, then of `unpaired`; None where nothing is hidden
    first: int = 0  # the place of the batch's first example in that of the whole step, over all processes and parts

    @property
    def hidden(self) -> Tensor:
        """The mask, which there is if any objective is `masked`."""
        assert self.mask is not None, "no objective of the recipe is masked"
        return self.mask

    @property
    def places(self) -> range:
        """Of the batch's examples in that of the whole step: with seed and step, what they draw follows from these."""
        return range(self.first, self.first + self.batch.views.shape[1])

    @property
    def batches(self) -> list[Batch]:
        return [self.batch] if self.unpaired is None else [self.batch, self.unpaired]

    @property
    def paired_views(self) -> Tensor:
        """(V * B, 1, X, Y, Z)"""
        return self.batch.views.flatten(0, 1)

    @property
    def views(self) -> Tensor:
        """(N, 1, X, Y, Z)"""
        return torch.cat([part.views.flatten(0, 1) for part in self.batches])

    @property
    def targets(self) -> Tensor:
        """(N, 1, X, Y, Z): the views before their intensities were changed."""
        return torch.cat([part.targets.flatten(0, 1) for part in self.batches])

    @property
    def brain(self) -> Tensor:
        """(V * B, 1, X, Y, Z) bool: where paired views show more than background, which preparation leaves at zero."""
        return self.batch.targets.flatten(0, 1) != 0


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What an objective makes of a pass: its loss, already weighted, and figures for the record, all scalar tensors."""

    loss: Tensor
    figures: dict[str, Tensor]
    kept: Any = None  # what :meth:`Objective.remember` wants of it after the step

    def detached(self) -> Branch:
        """The same without the graph behind the loss."""
        return replace(self, loss=self.loss.detach())


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What an objective is given of a pass of the query network.

    Attributes:
        maps: the query encoder's, finest first: of ``examples.views`` with hidden cells if the objective is `masked`,
            else of ``examples.paired_views``. In a shared pass both are one, and paired views come first.
        examples: the views, targets, masks, subjects and sessions.
        taught: what :meth:`Objective.teach` returned.
        state: what :meth:`Objective.build_state` returned, to be read.
        schedule: the step's numbers.
    """

    maps: Sequence[Tensor]
    examples: Examples
    taught: Any
    state: Any
    schedule: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a part of a step leaves for :meth:`Objective.remember`."""

    examples: Examples
    taught: Any
    branch: Branch


class Objective(abc.ABC):
    """One branch of a pre-training. A recipe turns it on by its section of the configuration.

    Class attributes say what it is and wants; methods get everything else they need. An objective has no state of its
    own: what changes over a training is in its head and in the module that `build_state` returns.

    Args:
        config: the recipe.
    """

    name: ClassVar[str]
    """Of the branch in figures: ``loss/<name>``, ``gradient/<name>``."""
    section: ClassVar[str]
    """Its key in a recipe."""
    section_type: ClassVar[type]
    """Frozen dataclass of its settings; ``ranged`` fields say what numbers they take."""
    head_name: ClassVar[str]
    """Of its head in a network, and in checkpoints."""
    state_name: ClassVar[str | None] = None
    """Of its state in a learner, and in checkpoints."""
    masked: ClassVar[bool] = False
    """Whether it is shown views of which cells are hidden, unpaired scans included."""
    needs_keys: ClassVar[bool] = False
    """Whether there is to be a key network, a moving average of the query network, that :meth:`teach` asks."""
    teaches_unpaired: ClassVar[bool] = False
    """Whether the key network looks at the scans that cannot form a pair, too."""
    shapes: ClassVar[tuple[str, ...]] = ()
    """Settings that decide what a checkpoint holds; a run cannot continue with others."""
    in_the_log: ClassVar[Mapping[str, str]] = {}
    """Figures worth a place in the log's line, each with its format."""
    panels: ClassVar[tuple[Panel, ...]] = ()
    """Of progress.png."""
    citations: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Recipe) -> None:
        self.config = config

    @property
    def settings(self) -> Any:
        """Its section of the recipe."""
        return self.config.section(self.section)

    @classmethod
    def is_on(cls, config: Recipe) -> bool:
        """Whether the recipe has this objective: by default, whether it has the section."""
        return config.section(cls.section) is not None

    @property
    def pairs(self) -> Pairs | None:
        """Which pairs of views it compares, if any."""
        return None

    @property
    def max_gradient_ratio(self) -> float | None:
        """Scale its gradient on the encoder down to at most so many times the norm of all others' together."""
        return None

    def level_of(self, stride: int) -> int:
        """The number of the encoder's map with so many voxels per place, 0 the finest.

        Raises:
            UserError: none has; names the setting ``stride`` of this objective's section.
        """
        strides = [self.config.stride >> coarser for coarser in reversed(range(self.config.maps))]
        if stride not in strides:
            raise UserError(
                f"{self.section}.stride is {stride}; the encoder has maps of stride {', '.join(map(str, strides))}."
            )
        return strides.index(stride)

    def channels_at(self, encoder: Encoder, stride: int) -> int:
        """The channels of the encoder's map with so many voxels per place.

        Raises:
            ValueError: where that map should be is another, so this one's cells would be taken for the wrong places.
        """
        level = self.level_of(stride)
        if encoder.strides[level] != stride:
            raise ValueError(
                f"{self.section}.stride is {stride}, which map {level} has if each map halves the grid, but the "
                f"strides of {type(encoder).__name__} are {encoder.strides}."
            )
        return encoder.channels[level]

    def check(self) -> None:  # noqa: B027
        """Refuse a recipe that does not suit the objective.

        Raises:
            UserError: says which setting, and what it may be.
        """

    @abc.abstractmethod
    def build_head(self, encoder: Encoder) -> nn.Module:
        """Return the head for the maps of `encoder`."""

    def build_state(self) -> nn.Module | None:
        """Return a module of buffers that lives beside the networks and is kept in checkpoints."""
        return None

    def ramps(self) -> dict[str, Ramp]:
        """The numbers that change over the training, by their names in the schedule."""
        return {}

    def teach(self, key: EncoderWithHeads, maps: Sequence[Tensor], examples: Examples) -> Any:
        """What the key network makes of whole views; without gradient, and only if `needs_keys`.

        Args:
            key: the key network.
            maps: of the paired views, view by view, then of the unpaired ones if any objective `teaches_unpaired`.
            examples: the views.
        """
        raise NotImplementedError(f"{type(self).__name__} needs keys, so it has to say what they are.")

    @abc.abstractmethod
    def branch(self, query: EncoderWithHeads, given: Pass) -> Branch:
        """The loss of a pass.

        Args:
            query: the network that learns; ``query.head(self.head_name, ...)`` calls the head in the right precision.
            given: what the pass made and what else there is to know.
        """

    def remember(self, state: Any, parts: Sequence[Part]) -> None:  # noqa: B027
        """Update the state after a step on all ranks, without gradient."""

    def forget_subjects(self, state: Any) -> str | None:
        """Drop what the state knows of single subjects, whose numbers have changed; return what to tell the user."""
        return None

    def state_figures(self, state: Any) -> dict[str, float]:
        """What is worth recording of the state at every interval, on the main process."""
        return {}

    def held_out_figures(
        self, query: EncoderWithHeads, held_out: HeldOut, *, step: int
    ) -> tuple[dict[str, float], dict[str, Figure]]:
        """What is worth measuring on held-out scans beside the loss, and pictures by name; without gradient."""
        return {}, {}
