"""Everything a pre-training can be told, as one typed, frozen configuration; the defaults are arXiv 2511.11311's.

A recipe is data: what the two views are, what is reconstructed, weights and schedules. The YAML files in ``configs/``
say only what differs from the defaults here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from nnunet_ssl.architectures.resenc import PRESETS
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.augmentation import AugmentationConfig
from nnunet_ssl.pretraining.sampling import SamplingConfig
from nnunet_ssl.pretraining.typed import assign, build
from nnunet_ssl.schedules import ramp


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"{message}.")


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A number that stays at `low`, goes linearly to `high` between two shares of the training, and stays there."""

    low: float
    high: float
    begin: float = 0.0  # share of the steps
    until: float = 0.0  # share of the steps

    def __post_init__(self) -> None:
        _require(
            0 <= self.begin <= self.until <= 1,
            f"a ramp must have 0 <= begin <= until <= 1 (shares of the steps), not {self.begin} and {self.until}",
        )

    def at(self, step: int, steps: int) -> float:
        """The value at `step` of `steps`."""
        return ramp(step, start=int(self.begin * steps), end=int(self.until * steps), low=self.low, high=self.high)


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Of ``backbone: swin``; see :class:`nnunet_ssl.architectures.swin.SwinEncoder`."""

    embed_dim: int = 48
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7  # tokens; 6 needs no padding at 96^3 and is faster, but is not the paper's
    mlp_ratio: float = 4.0
    conv_norm: Literal["group", "instance"] = "group"

    @property
    def maps(self) -> int:
        """How many maps it has: the patch embedding's, and one of each stage's merging."""
        return len(self.depths) + 1


@dataclass(frozen=True, kw_only=True)
class ResEncConfig:
    """Of ``backbone: resenc``; see :class:`nnunet_ssl.architectures.resenc.ResEncEncoder`."""

    preset: Literal["resenc_m", "resenc_l"] = "resenc_l"  # nnU-Net's; M and L are one encoder, see docs/backbones.md
    features: tuple[int, ...] | None = None  # channels per stage, in place of the preset's
    blocks: tuple[int, ...] | None = None  # residual blocks per stage, in place of the preset's

    def __post_init__(self) -> None:
        sizes = self.sizes()
        _require(
            len(sizes["features"]) == len(sizes["blocks"]) >= 2,
            f"resenc.features {list(sizes['features'])} and resenc.blocks {list(sizes['blocks'])} must have one number "
            "for each stage, and two stages at least",
        )

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The numbers that build the encoder."""
        given = {"features": self.features, "blocks": self.blocks}
        return PRESETS[self.preset] | {name: values for name, values in given.items() if values is not None}

    @property
    def maps(self) -> int:
        """How many maps it has: one of each stage but the first, which works at full resolution."""
        return len(self.sizes()["features"]) - 1


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """The contrastive branch: MoCo v2 with a queue, where only other subjects are negatives."""

    pairs: Literal["mcl", "cl", "none"] = "none"  # two modalities of one session, two views of one scan, or no branch
    temperature: float = 0.2
    hidden: int = 512  # width of the projection head's hidden layer
    dim: int = 128  # of queries and keys
    weight: Ramp = Ramp(low=0.1, high=1.0, begin=0.05, until=0.10)  # alpha; 1 without a masked branch
    max_gradient_ratio: float | None = None  # scale this branch's gradient on the encoder down to at most so many times
    # the masked branch's norm

    def __post_init__(self) -> None:
        _require(
            self.max_gradient_ratio is None or self.max_gradient_ratio > 0,
            f"contrastive.max_gradient_ratio is {self.max_gradient_ratio}; it must be positive, or null for no limit",
        )


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """Targets of ``masked.target: tokens``: the key network's view of hidden tokens (iBOT, arXiv 2111.07832)."""

    level: int = 3  # of the encoder's maps, 0 the finest: stride 16, where 96^3 has 216 tokens
    prototypes: int = 4096  # classes of the self-distillation
    hidden: int = 1024  # width of the head
    bottleneck: int = 256  # dimension in which tokens are compared with prototypes
    student_temperature: float = 0.1
    teacher_temperature: Ramp = Ramp(low=0.04, high=0.07, until=0.10)
    centre_momentum: float = 0.9  # of the running mean that keeps one prototype from taking all tokens


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """The masked branch: cells of the bottleneck grid are hidden, and something of them is to be told."""

    target: Literal["voxels", "tokens", "none"] = "none"  # intensities, the key network's tokens, or no branch
    ratio: tuple[float, float] = (0.5, 0.75)  # share of hidden cells, drawn uniformly for each view
    weight: float = 1.0  # of the mean over views: 0.5 * (MIM1 + MIM2)
    width: int = 32  # of the decoder
    unpaired_batch_size: int = 8  # scans per step that cannot form a pair, for this branch alone; 0 leaves them out
    tokens: TokenConfig = TokenConfig()

    def __post_init__(self) -> None:
        low, high = self.ratio
        _require(0 < low <= high < 1, f"masked.ratio is {list(self.ratio)}; it must be 0 < low <= high < 1")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is measured on subjects that are never trained on."""

    fraction: float = 0.02  # of the subjects
    every: int = 2000  # steps
    batches: int = 8  # fixed batches on which the training's own losses are taken, per process
    sessions: int = 64  # sessions on whose scans alignment and reconstruction are measured

    def __post_init__(self) -> None:
        _require(0 < self.fraction < 1, f"validation.fraction is {self.fraction}; it must lie between 0 and 1")


_RANGES: dict[str, tuple[str, ...]] = {
    "at least 1": (
        "encoder.embed_dim",
        "encoder.window_size",
        "contrastive.hidden",
        "contrastive.dim",
        "masked.width",
        "masked.tokens.prototypes",
        "masked.tokens.hidden",
        "masked.tokens.bottleneck",
        "queue_size",
        "batch_size",
        "steps",
        "accumulation",
        "log_every",
        "gradients_every",
        "save_every",
        "keep_checkpoints",
        "max_nonfinite",
        "validation.every",
        "validation.sessions",
    ),
    "positive": (
        "encoder.mlp_ratio",
        "contrastive.temperature",
        "masked.tokens.student_temperature",
        "masked.tokens.teacher_temperature.low",
        "masked.tokens.teacher_temperature.high",
        "learning_rate",
        "gradient_clip",
    ),
    "0 or more": (
        "contrastive.weight.low",
        "contrastive.weight.high",
        "masked.weight",
        "masked.unpaired_batch_size",
        "workers",
        "seed",
        "minimum_learning_rate",
        "weight_decay",
        "validation.batches",
    ),
    "between 0 and 1": ("momentum.low", "momentum.high", "warmup", "masked.tokens.centre_momentum"),
}
_HOLDS: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "positive": lambda value: value > 0,
    "0 or more": lambda value: value >= 0,
    "between 0 and 1": lambda value: 0 <= value <= 1,
}


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """One pre-training."""

    recipe: str  # names the results folder

    backbone: Literal["swin", "resenc"] = "swin"  # which of the next two is pre-trained
    encoder: SwinConfig = SwinConfig()
    resenc: ResEncConfig = ResEncConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    masked: MaskedConfig = MaskedConfig()
    shared_pass: bool = False  # one masked pass of the query network for both branches: faster, not the paper's
    queue_size: int = 16384  # keys kept as negatives
    momentum: Ramp = Ramp(low=0.996, high=0.999, begin=0.05, until=0.20)  # of the key network

    patch_size: tuple[int, int, int] = (96, 96, 96)
    batch_size: int = 16  # examples (pairs, for a contrastive recipe) per optimizer step, over all processes
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    workers: int = 8  # processes that read scans, for each training process
    seed: int = 0

    steps: int = 200_000
    learning_rate: float = 1e-4
    minimum_learning_rate: float = 1e-5
    warmup: float = 0.02  # share of the steps
    weight_decay: float = 0.01  # not on biases, norms, position biases and the mask token
    gradient_clip: float = 10.0  # norm
    accumulation: int = 1  # a step's examples come in so many parts, to save memory
    bf16: bool = True  # autocast, on GPUs that have it
    compile: bool = False  # torch.compile for the encoder
    checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more time

    log_every: int = 100  # steps
    gradients_every: int = 100  # steps between measurements of each branch's gradient
    save_every: int = 1000  # steps
    keep_checkpoints: int = 2
    max_nonfinite: int = 10  # steps in a row whose loss or gradient is not finite before the training stops
    validation: ValidationConfig = ValidationConfig()

    def __post_init__(self) -> None:
        _require(
            self.recipe.replace("-", "_").isidentifier(),
            f"recipe is '{self.recipe}'; it names a folder, so use letters, digits, - and _",
        )
        for wanted, keys in _RANGES.items():
            for key in keys:
                value = operator.attrgetter(key)(self)
                _require(_HOLDS[wanted](value), f"{key} is {value}; it must be {wanted}")
        _require(
            self.minimum_learning_rate <= self.learning_rate,
            f"minimum_learning_rate is {self.minimum_learning_rate}, above learning_rate {self.learning_rate}",
        )
        self._check_patch()
        self._check_branches()

    def _check_branches(self) -> None:
        _require(
            self.has_contrastive or self.has_masked,
            f"The recipe '{self.recipe}' has nothing to learn: set contrastive.pairs, masked.target, or both",
        )
        combined = self.has_contrastive and self.has_masked
        _require(combined or not self.shared_pass, "shared_pass needs a contrastive and a masked branch to share it")
        _require(
            combined or self.contrastive.max_gradient_ratio is None,
            "contrastive.max_gradient_ratio needs a masked branch to compare with",
        )
        _require(
            self.masked.target != "tokens" or not self.has_contrastive or self.augmentation.shared_affine,
            "masked.target=tokens compares the two views place by place: set augmentation.shared_affine=true",
        )
        _require(
            self.masked.target != "tokens" or 0 <= self.masked.tokens.level < self._network.maps,
            f"masked.tokens.level is {self.masked.tokens.level}; the maps are 0 to {self._network.maps - 1}",
        )

    def _check_patch(self) -> None:
        _require(min(self.patch_size) >= 1, f"patch_size is {list(self.patch_size)}; sizes are at least 1")
        if max(self.patch_size) > self.stride:
            return
        single = f"patch_size {list(self.patch_size)} is a single cell of {self.stride} voxels"
        _require(
            not self.has_masked,
            f"{single}, of which the masked branch could hide all or nothing: use a larger patch",
        )
        _require(
            self.backbone != "resenc", f"{single}, which the residual encoder cannot normalise: use a larger patch"
        )

    @property
    def _network(self) -> SwinConfig | ResEncConfig:
        return self.encoder if self.backbone == "swin" else self.resenc

    @property
    def stride(self) -> int:
        """Voxels per cell of the bottleneck along each axis, whatever the backbone: every map halves the grid."""
        return 2**self._network.maps

    @property
    def has_contrastive(self) -> bool:
        return self.contrastive.pairs != "none"

    @property
    def has_masked(self) -> bool:
        return self.masked.target != "none"

    @property
    def needs_keys(self) -> bool:
        """Whether there is a momentum network: it gives the contrastive keys and the tokens' targets."""
        return self.has_contrastive or self.masked.target == "tokens"

    def architecture(self) -> dict[str, Any]:
        """What :func:`nnunet_ssl.architectures.networks.build_encoder` takes, in types that JSON keeps."""
        if self.backbone == "swin":
            own = {**self.as_dict()["encoder"], "mask_token": self.has_masked}
        else:
            own = {name: list(values) for name, values in self.resenc.sizes().items()}
        return {"backbone": self.backbone, "in_channels": 1, **own}

    def as_dict(self) -> dict[str, Any]:
        """Nested plain types (tuples as lists), which :func:`from_dict` reads back."""
        return yaml.safe_load(self.as_yaml())

    def as_yaml(self) -> str:
        return yaml.dump(asdict(self), Dumper=_Dumper, sort_keys=False, width=120)


def recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in _shipped().glob("*.yaml"))


def load_config(recipe: str | Path, overrides: list[str] | None = None) -> PretrainingConfig:
    """Read a recipe and apply overrides.

    Args:
        recipe: the name of a recipe of the package, or the path of a YAML file.
        overrides: ``key=value``, nested keys with dots: ``encoder.embed_dim=24``.

    Raises:
        UserError: no such recipe or file, an unknown key, a value of the wrong type or out of range.
    """
    path = _shipped() / f"{recipe}.yaml"
    if not path.is_file():
        path = Path(recipe)
    if not path.is_file():
        raise UserError(
            f"There is no recipe '{recipe}' and no file of that name. Recipes: {', '.join(recipes())}; "
            "or give the path of a YAML file."
        )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'key: value' lines.")
    values.setdefault("recipe", path.stem)
    for override in overrides or []:
        assign(values, override)
    return from_dict(values)


def from_dict(values: dict[str, Any]) -> PretrainingConfig:
    """Build the configuration from nested plain values, checking every key and type.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range.
    """
    return build(PretrainingConfig, values)


def _shipped() -> Path:
    return Path(str(resources.files("nnunet_ssl.pretraining") / "configs"))


class _Dumper(yaml.SafeDumper):
    """Plain YAML with tuples on one line."""


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))
