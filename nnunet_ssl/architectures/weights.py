"""Pre-trained encoders in files: write them, read them back whatever their origin, load them, report what was loaded.

Our own format is a safetensors file: the encoder's tensors, and in its header what a reader needs to use them, each
entry a JSON string (architecture, method, step, preprocessing, metadata) beside ``format = nnunet_ssl``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside

FORMAT = "nnunet_ssl"
HEADER = ("architecture", "method", "step", "preprocessing", "metadata")


@dataclass(frozen=True, kw_only=True)
class PretrainedEncoder:
    """An encoder's weights and what is known about them."""

    tensors: dict[str, Tensor]  # by the encoder's own parameter names
    architecture: dict[str, Any]  # what networks.build_encoder takes
    origin: str
    method: str | None = None
    step: int | None = None
    preprocessing: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor when weights were loaded; a tensor is loaded, adapted, missing or mismatched."""

    loaded: tuple[str, ...]
    adapted: tuple[str, ...]  # loaded after repeating a 1-channel stem
    missing: tuple[str, ...]  # in the encoder, not in the checkpoint: kept as they were
    mismatched: tuple[str, ...]  # in both, with shapes that do not fit ("name: (2,) in the file, (3,) in ..."): kept
    unexpected: tuple[str, ...]  # in the checkpoint, not in the encoder
    fraction: float  # of the encoder's numbers that came from the checkpoint

    def __str__(self) -> str:
        lines = [f"{self.fraction:.1%} of the encoder loaded"]
        for kind in ("loaded", "adapted", "missing", "mismatched", "unexpected"):
            names = getattr(self, kind)
            shown = "" if kind == "loaded" else "".join(f"\n    {name}" for name in names)
            lines.append(f"  {kind}: {len(names)}{shown}")
        return "\n".join(lines)


def write_encoder(
    path: Path | str,
    encoder: Mapping[str, Tensor],
    *,
    architecture: Mapping[str, Any],
    method: str | None,
    step: int | None,
    preprocessing: Mapping[str, Any] | None,
    metadata: Mapping[str, Any],
) -> None:
    """Write an encoder's state dict as a file of our own format.

    Args:
        path: the file, ``*.safetensors``.
        encoder: the tensors by the encoder's parameter names, on any device.
        architecture: what :func:`networks.build_encoder` takes.
        method: the recipe that made the weights (``mcl_mim``).
        step: training steps behind the weights.
        preprocessing: what was done to the scans (spacing, orientation, normalisation), if known.
        metadata: anything else worth keeping, JSON-serialisable.
    """
    from safetensors.torch import save_file

    values = dict(zip(HEADER, (architecture, method, step, preprocessing, metadata), strict=True))
    header = {"format": FORMAT} | {key: json.dumps(value) for key, value in values.items()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in encoder.items()}
    with written_beside(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def read_checkpoint(path: Path | str, origin: str | None = None) -> PretrainedEncoder:
    """Read the encoder in a checkpoint; code in the file is never executed.

    Raises:
        UserError: there is no such file, it cannot be read safely, or it holds no encoder that is known here.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}.")
    tensors, header = _read_safetensors(path)
    values = {key: json.loads(header.get(key, "null")) for key in HEADER}
    values["metadata"] = values["metadata"] or {}
    return PretrainedEncoder(tensors=tensors, origin=FORMAT, **values)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}). Copy or download it again.") from error


def load_encoder(encoder: nn.Module, pretrained: PretrainedEncoder, *, minimum_fraction: float = 0.9) -> LoadReport:
    """Copy pre-trained weights into `encoder`, in place.

    A convolution that takes one channel in the file and N in the encoder is repeated N times and divided by N, so an
    image given N times yields the features of the image given once.

    Args:
        encoder: the network to fill.
        pretrained: what :func:`read_checkpoint` returned.
        minimum_fraction: of the encoder's numbers that must come from the file.

    Raises:
        UserError: less than that was loaded. The encoder is then unchanged.
    """
    own = encoder.state_dict()
    fitted: dict[str, Tensor] = {}
    kinds: dict[str, list[str]] = {"loaded": [], "adapted": [], "missing": [], "mismatched": []}
    for name, target in own.items():
        source = pretrained.tensors.get(name)
        if source is None:
            kinds["missing"].append(name)
        elif source.shape == target.shape:
            kinds["loaded"].append(name)
            fitted[name] = source
        elif _is_stem(source, target):
            kinds["adapted"].append(name)
            fitted[name] = source.expand_as(target) / target.shape[1]
        else:
            kinds["mismatched"].append(f"{name}: {tuple(source.shape)} in the file, {tuple(target.shape)} here")
    report = LoadReport(
        **{kind: tuple(names) for kind, names in kinds.items()},
        unexpected=tuple(name for name in pretrained.tensors if name not in own),
        fraction=sum(own[name].numel() for name in fitted) / sum(tensor.numel() for tensor in own.values()),
    )
    if report.fraction < minimum_fraction:
        raise UserError(
            f"The weights ({pretrained.origin}) fill only {report.fraction:.1%} of the encoder, less than the "
            f"{minimum_fraction:.0%} asked for: is it built with the checkpoint's architecture "
            f"{pretrained.architecture}?\n{report}"
        )
    with torch.no_grad():
        for name, source in fitted.items():
            own[name].copy_(source)
    return report


def _is_stem(source: Tensor, target: Tensor) -> bool:
    """Tell whether `source` is a convolution on one channel and `target` the same convolution on more."""
    return (
        source.ndim >= 4
        and source.shape[0] == target.shape[0]
        and source.shape[1] == 1
        and source.shape[2:] == target.shape[2:]
    )
