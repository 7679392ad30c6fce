"""Pre-trained encoders in files: write them, read them back whatever their origin, load them, report what was loaded.

Our own format is a safetensors file: the encoder's tensors, those of the decoder that was trained with it under
``decoder.``, which readers of an encoder pass over, and in its header what a reader needs to use them, each entry a
JSON string (architecture, method, step, preprocessing, metadata) beside ``format = nnunet_ssl``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ssl.architectures.swin import check_merging
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside
from nnunet_ssl.weights.decoders import DECODER, HEADS
from nnunet_ssl.weights.origins import READERS, check_finite, recognise, unwrapped_name
from nnunet_ssl.weights.pretrained import DESCRIBED, FORMAT, PretrainedEncoder
from nnunet_ssl.weights.safe_files import read_file

__all__ = [
    "FORMAT",
    "LoadReport",
    "PretrainedEncoder",
    "check_decoder",
    "load_decoder",
    "load_encoder",
    "read_checkpoint",
    "write_encoder",
]

SHOWN = 20
"""Names of a kind that a report spells out."""

STEMS = ("patch_embed.proj.weight", "stem.convs.0.conv.weight", "down_projection.proj.weight")
"""The first convolution of an encoder, which alone may be adapted to another number of input channels."""

TRUNK = re.compile(r"patch_embed\.|stem\.|down_projection\.|eva\.(?:pos_embed|norm\.)|stages\.(\d+)\.merging\.")
"""Tensors that everything after them depends on, for no residual connection leads around them."""


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor when weights were loaded; a tensor is loaded, adapted, missing or mismatched."""

    loaded: tuple[str, ...]
    adapted: tuple[str, ...]  # a stem that was fitted to another number of channels, and how
    missing: tuple[str, ...]  # in the module, not in the checkpoint: kept as they were
    mismatched: tuple[str, ...]  # in both, with shapes that do not fit ("name: (2,) in the file, (3,) in ..."): kept
    unexpected: tuple[str, ...]  # in the checkpoint, not in the module
    fraction: float  # of the module's numbers that came from the checkpoint
    module: str = "encoder"
    excluded: tuple[str, ...] = ()  # heads: neither looked for nor counted

    def __str__(self) -> str:
        lines = [f"{self.fraction:.1%} of the {self.module} loaded"]
        for kind in ("loaded", "adapted", "missing", "mismatched", "unexpected", "excluded"):
            names = getattr(self, kind)
            if kind == "excluded" and not names:
                continue
            lines.append(f"  {kind}: {len(names)}")
            if kind != "loaded":
                lines += [f"    {name}" for name in names[:SHOWN]]
                lines += [f"    and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
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
    decoder: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an encoder's state dict as a file of our own format.

    Args:
        path: the file, ``*.safetensors``.
        encoder: the tensors by the encoder's parameter names, on any device. One that has several names, as nnU-Net's
            layers have, is written under the first.
        architecture: what :func:`networks.build_encoder` takes.
        method: the recipe that made the weights (``mcl_mim``).
        step: training steps behind the weights.
        preprocessing: what was done to the scans (spacing, orientation, normalisation), if known.
        metadata: anything else worth keeping, JSON-serialisable.
        decoder: the tensors of the decoder that was trained with it, by the decoder's parameter names.
    """
    from safetensors.torch import save

    values = dict(zip(DESCRIBED, (architecture, method, step, preprocessing, metadata), strict=True))
    header = {"format": FORMAT} | {key: json.dumps(value) for key, value in values.items()}
    state = {**encoder, **{DECODER + name: tensor for name, tensor in (decoder or {}).items()}}
    tensors = {names[0]: state[names[0]].detach().cpu().contiguous().clone() for names in _names_of_each(state)}
    with written_beside(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=header))  # save_file would let nobody else read it


def read_checkpoint(path: Path | str, origin: str | None = None, merging: str | None = None) -> PretrainedEncoder:
    """Read the encoder in a checkpoint; code in the file is never executed.

    Where neither the file nor `merging` tells which tokens a Swin encoder's patch mergings take, its architecture says
    ``merging: None``, and :func:`networks.build_encoder` refuses it.

    Args:
        path: the file.
        origin: whose it is, a key of :data:`origins.READERS`; None to find out.
        merging: a key of :data:`swin.MERGINGS`; None for what the file, or the family that it belongs to, tells.

    Raises:
        UserError: there is no such file, it cannot be read safely, it holds no encoder that is known here, some of its
            numbers are not finite, or it tells another merging.
    """
    if origin not in (None, *READERS):
        raise UserError(f"There is no origin '{origin}'; there are: {', '.join(READERS)}.")
    file = read_file(path)
    try:
        pretrained = READERS[origin or recognise(file)](file)
        return pretrained if merging is None else _with_merging(pretrained, merging)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def _with_merging(pretrained: PretrainedEncoder, merging: str) -> PretrainedEncoder:
    """Say of weights with which merging they were trained; what is only known of their family may be overruled."""
    check_merging(merging)
    if pretrained.architecture["backbone"] != "swin":
        raise UserError(f"its backbone is {pretrained.architecture['backbone']}, which has no patch mergings.")
    told = pretrained.architecture.get("merging", "monai")
    if pretrained.origin in (FORMAT, "nnunet") and "merging" not in pretrained.assumed and told not in (merging, None):
        raise UserError(f"its patch merging is {told}, not {merging}.")
    assumed = {key: why for key, why in pretrained.assumed.items() if key != "merging"}
    return dataclasses.replace(
        pretrained, architecture={**pretrained.architecture, "merging": merging}, assumed=assumed
    )


def load_encoder(encoder: nn.Module, pretrained: PretrainedEncoder, *, minimum_fraction: float = 0.9) -> LoadReport:
    """Copy pre-trained weights into `encoder`, in place.

    The first convolution may have another number of input channels than the file's. It is then averaged over those of
    the file, repeated for each of the encoder's N, and divided by N: an image given N times yields the features of a
    1-channel file's image given once.

    Args:
        encoder: the network to fill.
        pretrained: what :func:`read_checkpoint` returned.
        minimum_fraction: of the encoder's numbers that must come from the file. 0 only tells what would be loaded.

    Raises:
        UserError: less than that was loaded, or a tensor was not that all others depend on. The encoder is then
            unchanged.
    """
    own = encoder.state_dict()
    fitted, report = _fit(own, pretrained.tensors)
    if report.fraction < minimum_fraction:
        raise UserError(
            f"The weights ({pretrained.origin}) fill only {report.fraction:.1%} of the encoder, less than the "
            f"{minimum_fraction:.0%} asked for: is it built with the checkpoint's architecture "
            f"{pretrained.architecture}?\n{report}"
        )
    not_loaded = [name for name in _first_names(own) if name not in fitted and _is_in_the_trunk(name, own)]
    if not_loaded and minimum_fraction > 0:
        raise UserError(
            f"The weights ({pretrained.origin}) cannot be used: all features depend on {', '.join(not_loaded)}, which "
            f"the file lacks or has in another shape.\n{report}"
        )
    _copy(fitted, own)
    return report


def check_decoder(decoder: Mapping[str, Tensor]) -> None:
    """Refuse a decoder with numbers that are not finite, which reading a file for its encoder passes over.

    Raises:
        UserError: names the first such tensor.
    """
    try:
        check_finite({DECODER + name: tensor for name, tensor in decoder.items() if not HEADS.match(name)})
    except UserError as error:
        raise UserError(f"The decoder in the checkpoint cannot be used: {error}") from error


def load_decoder(decoder: nn.Module, pretrained: PretrainedEncoder, *, minimum_fraction: float = 0.9) -> LoadReport:
    """Copy the weights of a pre-trained decoder into `decoder`, in place, all but its heads.

    Args:
        decoder: of a segmentation network. The alias of the encoder that nnU-Net's decoders hold has no part in this.
        pretrained: what :func:`read_checkpoint` returned.
        minimum_fraction: of the decoder's numbers, without the heads', that must come from the file.

    Raises:
        UserError: less than that was loaded, or not all numbers are finite. The decoder is then unchanged.
    """
    check_decoder(pretrained.decoder)
    state = {unwrapped_name(name): tensor for name, tensor in decoder.state_dict().items()}
    own = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}
    heads = tuple(name for name in own if HEADS.match(name))
    body = {name: tensor for name, tensor in own.items() if name not in heads}
    fitted, report = _fit(body, {name: one for name, one in pretrained.decoder.items() if not HEADS.match(name)})
    report = dataclasses.replace(report, module="decoder", excluded=heads)
    if report.fraction < minimum_fraction:
        raise UserError(
            f"The decoder in the file ({pretrained.origin}) fills only {report.fraction:.1%} of the network's, less "
            f"than the {minimum_fraction:.0%} asked for; leave decoder=pretrained out.\n{report}"
        )
    _copy(fitted, body)
    return report


def _fit(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    """Return what of a file fits a module's tensors, by their first names, and what becomes of each."""
    fitted: dict[str, Tensor] = {}
    kinds: dict[str, list[str]] = {"loaded": [], "adapted": [], "missing": [], "mismatched": []}
    each = _names_of_each(own)
    for names in each:
        name, target = names[0], own[names[0]]
        source = next((theirs[other] for other in names if other in theirs), None)
        if source is None:
            kinds["missing"].append(name)
        elif source.shape == target.shape:
            kinds["loaded"].append(name)
            fitted[name] = source
        elif _is_stem(names, source, target):
            kinds["adapted"].append(f"{name}: {_adaptation(source.shape[1], target.shape[1])}")
            fitted[name] = source.mean(dim=1, keepdim=True).expand_as(target) / target.shape[1]
        else:
            kinds["mismatched"].append(f"{name}: {tuple(source.shape)} in the file, {tuple(target.shape)} here")
    report = LoadReport(
        loaded=tuple(kinds["loaded"]),
        adapted=tuple(kinds["adapted"]),
        missing=tuple(kinds["missing"]),
        mismatched=tuple(kinds["mismatched"]),
        unexpected=tuple(name for name in theirs if name not in own),
        fraction=sum(own[name].numel() for name in fitted) / sum(own[names[0]].numel() for names in each),
    )
    return fitted, report


def _copy(fitted: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, source in fitted.items():
            own[name].copy_(source)


def _first_names(tensors: Mapping[str, Tensor]) -> list[str]:
    return [names[0] for names in _names_of_each(tensors)]


def _names_of_each(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return all names of each tensor: nnU-Net's layers register one parameter as ``conv`` and ``all_modules.0``."""
    names: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    return list(names.values())


def _is_stem(names: list[str], source: Tensor, target: Tensor) -> bool:
    """Tell whether both are an encoder's first convolution and differ in their input channels alone."""
    same = source.ndim == target.ndim and source.shape[0] == target.shape[0] and source.shape[2:] == target.shape[2:]
    return same and bool(set(names) & set(STEMS))


def _adaptation(theirs: int, ours: int) -> str:
    averaged = f"averaged over the file's {theirs} channels" if theirs > 1 else ""
    repeated = f"repeated for {ours} channels and divided by {ours}" if ours > 1 else ""
    return " and ".join(filter(None, (averaged, repeated)))


def _is_in_the_trunk(name: str, own: Mapping[str, Tensor]) -> bool:
    """Tell whether all other features depend on a tensor; on the last merging, only the last map does."""
    match = TRUNK.match(name)
    return match is not None and (match[1] is None or any(f"stages.{int(match[1]) + 1}." in other for other in own))
