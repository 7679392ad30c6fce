"""Everything a pre-training can be told, as one typed, frozen configuration; the defaults are arXiv 2511.11311's.

A recipe is data: what the two views are, what is reconstructed, weights and schedules. The YAML files in ``configs/``
say only what differs from the defaults here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from nnunet_ssl.architectures.backbones import backbone_of
from nnunet_ssl.architectures.backbones import known as known_backbones
from nnunet_ssl.architectures.backbones.base import BackboneConfig
from nnunet_ssl.architectures.backbones.resenc import RESENC, ResEncConfig
from nnunet_ssl.architectures.backbones.swin import SWIN, SwinConfig
from nnunet_ssl.errors import require
from nnunet_ssl.pretraining.gradients import Balance
from nnunet_ssl.pretraining.objectives import OWN, announced, known
from nnunet_ssl.pretraining.objectives.base import Objective, Pairs
from nnunet_ssl.pretraining.objectives.contrastive import ContrastiveConfig
from nnunet_ssl.pretraining.objectives.dense import DenseConfig
from nnunet_ssl.pretraining.objectives.lesions import LesionSearchConfig
from nnunet_ssl.pretraining.objectives.masked import MaskedConfig
from nnunet_ssl.pretraining.recipes import read_recipe, recipe_file
from nnunet_ssl.pretraining.views.augmentation import AugmentationConfig
from nnunet_ssl.pretraining.views.sampling import SamplingConfig
from nnunet_ssl.schedules import Ramp
from nnunet_ssl.typed import assign, build, check_ranges, ranged

logger = logging.getLogger(__name__)

_OWN_SECTIONS = {kind.section for kind in OWN} | {SWIN.name, RESENC.name}


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is measured on subjects that are never trained on."""

    fraction: float = ranged(0.02, "above 0 and below 1")  # of the subjects that are held out
    every: int = ranged(2000, "at least 1")  # steps between validations
    batches: int = ranged(8, "0 or more")  # fixed batches on which the training's own losses are taken, per process
    sessions: int = ranged(64, "at least 1")  # sessions on whose scans alignment and reconstruction are measured


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """One pre-training."""

    recipe: str  # names the results folder: give it when you change settings

    backbone: str = "swin"  # swin, resenc, primus or an announced one; its section says the sizes of the encoder
    swin: SwinConfig = SwinConfig()
    resenc: ResEncConfig = ResEncConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    masked: MaskedConfig = MaskedConfig()
    lesions: LesionSearchConfig | None = None  # null: no such branch
    dense: DenseConfig | None = None  # null: no such branch
    others: Mapping[str, Any] = field(default_factory=dict, metadata={"key": False})  # the sections of what other
    # packages announce, by name; each has a key of its own beside ours
    shared_pass: bool = False  # one masked pass of the query network for all branches: faster, not the paper's
    queue_size: int = ranged(16384, "at least 1")  # keys kept as negatives, of all processes
    momentum: Ramp = ranged(Ramp(low=0.996, high=0.999, begin=0.05, until=0.2), "between 0 and 1")  # of the key network

    patch_size: tuple[int, int, int] = (96, 96, 96)  # voxels
    batch_size: int = ranged(16, "at least 1")  # examples (pairs, if views are compared) per step, over all processes
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    workers: int = ranged(8, "0 or more")  # processes that read scans, for each training process; 0: it reads itself
    seed: int = ranged(0, "0 or more")  # of everything: weights, split, draws, masks

    steps: int = ranged(200_000, "at least 1")  # of the optimizer, AdamW
    learning_rate: float = ranged(1e-4, "positive")  # at its peak
    minimum_learning_rate: float = ranged(1e-5, "0 or more")  # at the last step, after half a cosine
    warmup: float = ranged(0.02, "between 0 and 1")  # share of the steps over which the rate rises
    weight_decay: float = ranged(0.01, "0 or more")  # not on biases, norms, position biases and the mask token
    gradient_clip: float = ranged(10.0, "positive")  # norm of the gradient of all parameters
    balance: Balance = "sum"  # what becomes of the branches' gradients on the encoder: their sum, each clipped by
    # itself, weighted to equal norms, or each with moments and a learning rate of its own
    branches: Mapping[str, float] = field(default_factory=dict, metadata={"range": "positive"})  # for `balance`, by
    # branch: the limit of its norm, its share of the norms, or its factor of the learning rate; 1 where none is said
    accumulation: int = ranged(1, "at least 1")  # a step's examples come in so many parts, to save memory
    bf16: bool = True  # autocast, on GPUs that have it
    compile: Literal["auto", True, False] = "auto"  # torch.compile for the encoder; auto: on a GPU
    checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more time

    log_every: int = ranged(100, "at least 1")  # steps between lines of the log and rows of progress.csv
    gradients_every: int = ranged(100, "at least 1")  # steps between measurements of each branch's gradient
    save_every: int = ranged(1000, "at least 1")  # steps between checkpoints
    keep_checkpoints: int = ranged(2, "at least 1")  # the last so many
    max_nonfinite: int = ranged(10, "at least 1")  # steps in a row that are not finite before the training stops
    validation: ValidationConfig = ValidationConfig()

    def __post_init__(self) -> None:
        require(
            self.recipe.replace("-", "_").isidentifier(),
            f"recipe is '{self.recipe}'; it names a folder, so use letters, digits, - and _",
        )
        check_ranges(self)
        for name, section in self.others.items():
            check_ranges(section, f"{name}.")
        require(
            self.minimum_learning_rate <= self.learning_rate,
            f"minimum_learning_rate is {self.minimum_learning_rate}, above learning_rate {self.learning_rate}",
        )
        self._check_patch()
        self._check_objectives()

    def _check_objectives(self) -> None:
        require(
            bool(self.objectives),
            f"The recipe '{self.recipe}' has nothing to learn: set contrastive.pairs, masked.target, or both",
        )
        heads = [objective.head_name for objective in self.objectives]
        require(len(set(heads)) == len(heads), f"Two objectives of the recipe have a head of one name: {heads}")
        kinds = {objective.pairs for objective in self.objectives if objective.pairs}
        require(len(kinds) < 2, f"The objectives of the recipe compare different pairs: {' and '.join(sorted(kinds))}")
        combined = self.has_masked and not all(objective.masked for objective in self.objectives)
        require(combined or not self.shared_pass, "shared_pass needs a contrastive and a masked branch to share it")
        for objective in self.objectives:
            require(
                objective.max_gradient_ratio is None or len(self.objectives) > 1,
                f"{objective.section}.max_gradient_ratio needs another branch, such as a masked one, to compare with",
            )
            objective.check()
        self._check_balance()

    def _check_balance(self) -> None:
        """Refuse a balance that the branches do not suit, or numbers that would do nothing."""
        names = [objective.name for objective in self.objectives]
        balances = self.balance != "sum"
        require(
            not balances or len(names) > 1,
            f"balance is {self.balance}, but the recipe '{self.recipe}' has a single branch, {names[0]}, with "
            "nothing to balance it with: leave balance out",
        )
        limited = [f"{one.section}.max_gradient_ratio" for one in self.objectives if one.max_gradient_ratio is not None]
        require(
            not (balances and limited),
            f"balance is {self.balance} and {' and '.join(limited)} is set, which balances gradients, too: choose one "
            "of them, with max_gradient_ratio=null or without balance",
        )
        require(
            balances or not self.branches,
            f"branches has numbers for {' and '.join(self.branches)}, which balance=sum does not use: set balance to "
            "clip, equal_norms or learning_rates",
        )
        strange = sorted(self.branches.keys() - set(names))
        require(
            not strange,
            f"branches has a number for {' and '.join(strange)}; the branches of the recipe '{self.recipe}' are "
            f"{' and '.join(names)}",
        )

    def _check_patch(self) -> None:
        require(min(self.patch_size) >= 1, f"patch_size is {list(self.patch_size)}; sizes are at least 1")
        if max(self.patch_size) > self.stride:
            return
        single = f"patch_size {list(self.patch_size)} is a single cell of {self.stride} voxels"
        require(
            not self.has_masked,
            f"{single}, of which the masked branch could hide all or nothing: use a larger patch",
        )
        require(
            not backbone_of(self.backbone).normalises_maps,
            f"{single}, which the encoder of backbone {self.backbone} cannot normalise: use a larger patch",
        )

    @property
    def _network(self) -> BackboneConfig:
        return self.section(backbone_of(self.backbone).name) or backbone_of(self.backbone).settings()

    @property
    def stride(self) -> int:
        """Voxels per cell of the bottleneck along each axis; unless a backbone says it, every map halves the grid."""
        return getattr(self._network, "stride", 2**self._network.maps)

    @property
    def maps(self) -> int:
        """How many maps the encoder has."""
        return self._network.maps

    def section(self, name: str) -> Any:
        """The settings of an objective or a backbone, by the section's name; None where the recipe has none."""
        return getattr(self, name) if name in _OWN_SECTIONS else self.others.get(name)

    @functools.cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """What is to be learnt, in a fixed order."""
        return tuple(kind(self) for kind in known() if kind.is_on(self))

    @property
    def branch_numbers(self) -> dict[str, float]:
        """The number that `balance` takes of each branch, in the order of the objectives."""
        return {objective.name: self.branches.get(objective.name, 1.0) for objective in self.objectives}

    @property
    def pairs(self) -> Pairs | None:
        """Which pairs of views the objectives compare; None if single scans serve them all."""
        return next((objective.pairs for objective in self.objectives if objective.pairs), None)

    @property
    def has_masked(self) -> bool:
        """Whether cells of views are hidden."""
        return any(objective.masked for objective in self.objectives)

    @property
    def passes(self) -> list[tuple[Objective, ...]]:
        """The objectives by the pass of the query network that serves them: of whole views, of views with hidden cells;
        with `shared_pass` one of these for all."""
        if self.shared_pass:
            return [self.objectives]
        whole, masked = (tuple(one for one in self.objectives if one.masked is hides) for hides in (False, True))
        return [objectives for objectives in (whole, masked) if objectives]

    @property
    def needs_keys(self) -> bool:
        """Whether there is a key network."""
        return any(objective.needs_keys for objective in self.objectives)

    def architecture(self) -> dict[str, Any]:
        """What :func:`nnunet_ssl.architectures.networks.build_encoder` takes, in types that JSON keeps."""
        return {
            "backbone": self.backbone,
            "in_channels": 1,
            **self._network.architecture(masked=self.has_masked),
        }

    def as_dict(self) -> dict[str, Any]:
        """Nested plain types (tuples as lists), which :func:`from_dict` reads back."""
        return yaml.safe_load(self.as_yaml())

    def as_yaml(self) -> str:
        values = asdict(self)
        return yaml.dump(values | values.pop("others"), Dumper=_Dumper, sort_keys=False, width=120)


def load_config(recipe: str | Path, overrides: list[str] | None = None) -> PretrainingConfig:
    """Read a recipe and apply overrides.

    Args:
        recipe: the name of a recipe of the package, or the path of a YAML file.
        overrides: ``key=value``, nested keys with dots: ``swin.embed_dim=24``.

    Raises:
        UserError: no such recipe or file, an unknown key, a value of the wrong type or out of range.
    """
    return from_dict(values_of(recipe, overrides))


def values_of(recipe: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """What :func:`load_config` makes a configuration of; only the name, ``recipe``, is there in any case."""
    path = recipe_file(recipe)
    values = {key: value for key, value in read_recipe(path).items() if key != "about"}
    values.setdefault("recipe", path.stem)
    for override in overrides or []:
        assign(values, override)
    return values


def from_dict(values: dict[str, Any]) -> PretrainingConfig:
    """Build the configuration from nested plain values, checking every key and type.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range.
    """
    values = with_todays_names(values)
    elsewhere = _sections_of_other_packages()
    others: dict[str, Any] = {
        name: build(elsewhere[name], value or {}, f"{name}.") for name, value in values.items() if name in elsewhere
    }
    own = {name: value for name, value in values.items() if name not in elsewhere}
    return build(PretrainingConfig, own, built={"others": others})


def _sections_of_other_packages() -> dict[str, type]:
    """By key: the dataclasses of the settings that announced objectives and backbones have.

    Raises:
        UserError: two have one key, or one has a key of ours, which would hide what the user says.
    """
    found = [(kind.section, kind.section_type) for kind in announced()]
    found += [(name, one.settings) for name, one in known_backbones().items() if name not in _OWN_SECTIONS]
    taken = {one.name for one in fields(PretrainingConfig)}
    for name, _ in found:
        require(
            name not in taken,
            f"An installed package announces an objective or a backbone with the section '{name}', which is taken: "
            "it must have a name of its own",
        )
        taken.add(name)
    return dict(found)


def with_todays_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Take settings of version 0.1.0, whose section ``swin`` was called ``encoder``."""
    if "encoder" not in values:
        return dict(values)
    logger.info("The section 'encoder' is called 'swin' now: write swin.embed_dim for encoder.embed_dim.")
    rest = {name: value for name, value in values.items() if name != "encoder"}
    sections = [one for one in (rest.get("swin"), values["encoder"]) if one is not None]
    if not all(isinstance(one, Mapping) for one in sections):
        return rest | {"swin": sections[-1]}  # what is wrong with it is said where sections are read
    return rest | {"swin": {name: value for one in sections for name, value in one.items()}}


class _Dumper(yaml.SafeDumper):
    """Plain YAML with tuples on one line."""


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))
