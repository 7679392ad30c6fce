"""What a backbone is: an encoder's class, and everything that the rest of the package has to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

OTHER = "other"
"""The depth of the parameters that an encoder counts to none."""

Architecture = Mapping[str, Any]
"""As checkpoints carry it: ``{"backbone": name, "in_channels": 1, ...}``, every other key a keyword of the class."""


@runtime_checkable
class Encoder(Protocol):
    """What every encoder has beside what :class:`torch.nn.Module` has.

    Attributes:
        channels: of the maps, finest first.
        strides: voxels per place of the maps, finest first.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Encode volumes.

        Args:
            x: (B, C, X, Y, Z).
            mask: boolean, on the grid of the coarsest map, True where a cell is to be hidden.

        Returns:
            The maps, finest first: level i of shape (B, channels[i], ceil(X / strides[i]), ...).
        """
        ...

    def parts(self) -> list[nn.Module]:
        """The modules that repeat, for :func:`nnunet_ssl.architectures.compiling.compile_parts`."""
        ...


@runtime_checkable
class Layered(Protocol):
    """An encoder that tells which of its modules and parameters lie at which depth."""

    def by_depth(self) -> dict[str, list[str]]:
        """Names of modules and of parameters by the name of their depth, finest first."""
        ...


def parameters_by_depth(encoder: nn.Module) -> dict[str, list[int]]:
    """Divide the parameters of an encoder by depth.

    Args:
        encoder: if it is :class:`Layered`, its depths are what it says, else its `parts`, "part1" and so on.

    Returns:
        by depth, finest first: places in the list of ``encoder.parameters()``. Every parameter is at one depth, those
        that the encoder counts to none at :data:`OTHER`, the last. A depth without parameters is left out.
    """
    depths: dict[str, list[str]] = {}
    if isinstance(encoder, Layered):
        depths = encoder.by_depth()
    elif isinstance(encoder, Encoder):
        names = {module: name for name, module in encoder.named_modules()}
        depths = {f"part{number}": [names[part]] for number, part in enumerate(encoder.parts(), start=1)}
    depth_of = {name: depth for depth, members in depths.items() for name in members}
    places: dict[str, list[int]] = {depth: [] for depth in (*depths, OTHER)}
    for place, (name, _) in enumerate(encoder.named_parameters()):
        words = name.split(".")
        ancestors = (".".join(words[:count]) for count in range(len(words), 0, -1))
        places[next((depth_of[one] for one in ancestors if one in depth_of), OTHER)].append(place)
    return {depth: members for depth, members in places.items() if members}


class BackboneConfig(Protocol):
    """A backbone's section of a pre-training's recipe, a frozen dataclass."""

    @property
    def maps(self) -> int:
        """How many maps the encoder has."""
        ...

    def architecture(self, *, masked: bool) -> dict[str, Any]:
        """The keywords of the encoder's class, in types that JSON keeps.

        Args:
            masked: the encoder will get views with hidden cells.
        """
        ...


def _nothing_to_say(architecture: Architecture, entry: Mapping[str, Any]) -> list[str]:
    return []


def _any_patch(patch_size: Sequence[int], entry: Mapping[str, Any]) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class SegmentationNetwork:
    """A network around an encoder, as nnU-Net's plans name it. It has the encoder as its attribute ``encoder``, and
    what turns the encoder's maps into classes as ``decoder``."""

    plans_entry: Callable[[Architecture, Mapping[str, Any]], dict[str, Any]]
    """The ``architecture`` entry of a configuration in nnU-Net's plans, from a checkpoint's architecture and the entry
    that nnU-Net planned."""
    network_class: str  # with its modules
    deep_supervision: bool  # whether it has outputs at several scales
    decoder: str = ""  # the kind of its decoder, a key of `decoders.KINDS`; empty where no file's can be loaded into it
    check_patch: Callable[[Sequence[int], Mapping[str, Any]], None] = _any_patch
    """Refuse, with a UserError, a patch that the network of an entry cannot take."""
    differences: Callable[[Architecture, Mapping[str, Any]], list[str]] = _nothing_to_say
    """What differs between a checkpoint's architecture and the network of an entry, a line each."""


@dataclass(frozen=True, kw_only=True)
class Backbone(SegmentationNetwork):
    """One backbone, and the network that it is fine-tuned in. `docs/extending.md` adds one from outside."""

    name: str  # in architectures and recipes
    encoder: Callable[..., nn.Module]  # the class; keywords are what an architecture holds, and `checkpointing`
    settings: type  # a `BackboneConfig`, whose defaults are what a recipe gets
    anchor: str  # a tensor that every encoder of the kind has: what stands before it in a file is the encoder's place
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]]  # the architecture that tensors imply, or a UserError
    minimum_fraction: float  # of an encoder that a checkpoint must fill in fine-tuning
    others: tuple[SegmentationNetwork, ...] = ()  # networks with other decoders than its own
    normalises_maps: bool = False  # over space, so that a patch must be more than a single cell of the coarsest map
    recipe: str | None = None  # of fine-tuning, that its authors use: the trainer says so where another is chosen
    citation: str

    @property
    def networks(self) -> tuple[SegmentationNetwork, ...]:
        """All networks that it can be fine-tuned in, its own first."""
        return (self, *self.others)
