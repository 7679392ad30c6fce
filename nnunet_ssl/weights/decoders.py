"""The decoder that a file holds beside its encoder: where it lies, and by which names its tensors go here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

DECODER = "decoder."
"""What the names of a decoder's tensors begin with, beside those of an encoder: in our own files, in pre-training
checkpoints of this package, and in nnU-Net's and nnssl's."""

KINDS = {
    "fpn": re.compile(r"(laterals|smooths|head)\."),
    "unet": re.compile(r"(full_resolution|stages|transpconvs|seg_layers)\."),
}
"""Of decoders, with how the names of their tensors begin: :class:`fpn.FPNDecoder`; nnU-Net's, in which
:class:`unet.PyramidDecoder` has a part of its own."""

HEADS = re.compile(r"(head|seg_layers)\.")
"""Tensors that give classes or intensities, which no other training has a use for."""

FROM_UMBRA = (
    (re.compile(r"feats_decoder\.lat(\d)\."), "laterals.{}."),
    (re.compile(r"feats_decoder\.smooth(\d)\.conv\."), "smooths.{}.0."),
    (re.compile(r"feats_decoder\.smooth(\d)\.norm\."), "smooths.{}.1."),
    (re.compile(r"head\.proj\."), "head."),
)
"""UMBRA counts levels from 1, the finest, as here from 0."""


def kind_of(decoder: Mapping[str, Tensor]) -> str | None:
    """Return the kind of a decoder's tensors, a key of :data:`KINDS`; None where there are none but heads."""
    body = [name for name in decoder if not HEADS.match(name)]
    return next((kind for kind, names in KINDS.items() if any(map(names.match, body))), None)


def width_of(decoder: Mapping[str, Tensor]) -> int:
    """Return the channels inside an FPN."""
    return decoder["laterals.0.weight"].shape[0]


def stages_of(decoder: Mapping[str, Tensor]) -> int:
    """Return how many stages a U-Net's decoder has."""
    return len({name.split(".")[1] for name in decoder if name.startswith("stages.")})


def decoder_beside(state: Mapping[str, Tensor], encoder: str) -> dict[str, str]:
    """Return which tensors of a network are those of the decoder beside its encoder, with their names here.

    Args:
        state: of the whole network.
        encoder: what the names of its encoder begin with.
    """
    if encoder and not encoder.endswith("encoder."):
        return {}
    around = encoder.removesuffix("encoder.")
    renamed = {name: _renamed(name[len(around) :]) for name in state if name.startswith(around)}
    return {name: ours for name, ours in renamed.items() if any(kind.match(ours) for kind in KINDS.values())}


def _renamed(name: str) -> str:
    """Return our name of a decoder's tensor, which lies beside the encoder; an empty one for any other tensor."""
    for theirs, ours in FROM_UMBRA:
        if match := theirs.match(name):
            return ours.format(*(int(level) - 1 for level in match.groups())) + name[match.end() :]
    return name.removeprefix(DECODER) if name.startswith(DECODER) else ""
