"""PretrainedEncoder: what this package knows of an encoder that somebody trained, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ENCODER = "encoder.safetensors"
"""The file of a finished encoder in the folder of its run: pre-training and `nnssl_weights fetch` write it, fine-tuning
and evaluation look for it."""

FORMAT = "nnunet_ssl"
"""How this package's own files call themselves, and the name of their origin."""

DESCRIBED = {"architecture": dict, "method": str, "step": int, "preprocessing": dict, "metadata": dict}
"""What those files tell of the weights, beside the weights, and of which type it is, unless null."""


UMBRAS_RECIPES = {
    "mae_only": ("mim",),
    "contrastive_only": ("cl", "mcl"),
    "combined": ("cl_mim", "mcl_mim", "mcl_mim_balanced"),
}
"""By UMBRA's word for a mode of its pre-training: the recipes it may be, since no file tells what the pairs were of."""


@dataclass(frozen=True, kw_only=True)
class PretrainedEncoder:
    """An encoder's weights, those of the decoder that was trained with it, and what is known about them."""

    tensors: dict[str, Tensor]  # by the encoder's own parameter names
    decoder: dict[str, Tensor] = field(default_factory=dict)  # by the decoder's, see `decoders`; empty without one
    architecture: dict[str, Any]  # what networks.build_encoder takes
    origin: str
    method: str | None = None  # the recipe, or the trainer, that made the weights
    step: int | None = None
    preprocessing: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # JSON types only
    left_out: dict[str, int] = field(default_factory=dict)  # the file's tensors beside the encoder, by module
    assumed: dict[str, str] = field(default_factory=dict)  # by key of the architecture: what no file tells, and why so

    def may_be_of(self, recipe: str) -> bool:
        """Tell whether the weights may come from a recipe, as far as the file says."""
        return self.method in (None, recipe, f"{recipe}_resenc") or recipe in UMBRAS_RECIPES.get(self.method or "", ())


def encoder_file(path: Path) -> Path:
    """Return the encoder in the folder of a run, or `path` itself where it is no folder; the file need not exist."""
    return path / ENCODER if path.is_dir() else path
