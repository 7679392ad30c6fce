"""Load an encoder and look at scans with it: one vector for a scan, or its pyramid of maps."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_ssl.architectures.networks import build_encoder, pooled
from nnunet_ssl.corpus.store import padded_patch
from nnunet_ssl.devices import default_device
from nnunet_ssl.interface.scans import Scan, read_scan
from nnunet_ssl.weights import encoders
from nnunet_ssl.weights.pretrained import PretrainedEncoder
from nnunet_ssl.weights.zoo import named_checkpoint

DEFAULT_PATCH = (96, 96, 96)
"""Voxels of a patch where a checkpoint does not tell: arXiv 2511.11311's."""

View = Literal["centre", "tiles"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class LoadedEncoder:
    """A pre-trained encoder that is ready to look at scans.

    Attributes:
        network: an :class:`nnunet_ssl.architectures.backbones.base.Encoder` for one channel, in evaluation mode.
        pretrained: what its checkpoint tells of the weights.
    """

    network: nn.Module
    pretrained: PretrainedEncoder

    @property
    def preprocessing(self) -> Mapping[str, Any] | None:
        """What was done to the scans that it learned from; None where the checkpoint does not tell."""
        return self.pretrained.preprocessing

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Voxels of the patches that it learned from, or 96^3 where the checkpoint does not tell."""
        return tuple(self.pretrained.metadata.get("config", {}).get("patch_size", DEFAULT_PATCH))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def __repr__(self) -> str:
        backbone, method = self.pretrained.architecture["backbone"], self.pretrained.method or "unknown method"
        millions = sum(parameter.numel() for parameter in self.network.parameters()) / 1e6
        return f"LoadedEncoder({backbone}, {method}, {self.pretrained.origin}, {millions:.1f} M parameters)"


def load_encoder(path: Path | str, device: torch.device | str | None = None) -> LoadedEncoder:
    """Load a pre-trained encoder for one channel.

    Args:
        path: a checkpoint that ``nnssl_weights`` reads, the folder of a finished pre-training, or the name of published
            weights that were fetched (``nnssl_weights list``).
        device: where to put it; None for a GPU where PyTorch sees one.

    Raises:
        UserError: it cannot be read, or its weights do not fill the encoder.
    """
    pretrained = encoders.read_checkpoint(named_checkpoint(str(path)))
    for key, why in pretrained.assumed.items():
        logger.warning("Assumed of the checkpoint: %s %s (%s).", key, pretrained.architecture[key], why)
    network = build_encoder({**pretrained.architecture, "in_channels": 1})  # scans are encoded one by one
    logger.info("%s", encoders.load_encoder(network, pretrained))
    if schemes := (pretrained.preprocessing or {}).get("normalization_schemes"):  # nnU-Net's and nnssl's plans tell it
        logger.warning(
            "The encoder learned from scans normalised by %s; from files, scans are read as nnssl_prepare reads them.",
            ", ".join(map(str, schemes)),
        )
    device = device or default_device()
    return LoadedEncoder(network.to(device).eval(), pretrained)


def embed(encoder: LoadedEncoder, scan: Scan | Path | str, *, view: View = "centre") -> np.ndarray:
    """Embed a scan: the encoder's last map, averaged over space, before any projection head; (D,) float64.

    Distances between such vectors are what arXiv 2511.11311 publishes.

    Args:
        encoder: from :func:`load_encoder`.
        scan: from :func:`read_scan`, or an image file, which is then read with the encoder's own preprocessing.
        view: "centre", one patch around the centre of the foreground's box, as the paper does; "tiles", patches evenly
            spaced over the whole box, whose embeddings are averaged.
    """
    scan = _scan(encoder, scan)
    starts = patch_starts(scan.foreground, encoder.patch_size, view)
    vectors = [pooled_bottleneck(encoder.network, _patch(encoder, scan, start)[None]) for start in starts]
    return np.concatenate(vectors).mean(axis=0)


@torch.no_grad()
def feature_maps(
    encoder: LoadedEncoder, scan: Scan | Path | str, *, start: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Return the pyramid of a patch, finest map first: (C, X / stride, Y / stride, Z / stride) float32 each.

    Args:
        encoder: from :func:`load_encoder`; its `patch_size` is the patch's, `network.strides` are the strides.
        scan: as for :func:`embed`.
        start: the patch's first voxel; None for a patch around the centre of the foreground's box.
    """
    scan = _scan(encoder, scan)
    if start is None:
        (start,) = patch_starts(scan.foreground, encoder.patch_size, "centre")
    maps = encoder.network(_patch(encoder, scan, start)[None].to(encoder.device))
    return [features[0].float().cpu().numpy() for features in maps]


def patch_starts(foreground: np.ndarray, patch_size: Sequence[int], view: View) -> list[tuple[int, int, int]]:
    """Return the first voxel of each patch of a view; it may lie outside the volume.

    Args:
        foreground: (3, 2), the box of the foreground in voxels, half open.
        patch_size: voxels.
        view: see :func:`embed`.
    """
    axes = []
    for (first, last), size in zip(np.asarray(foreground).tolist(), patch_size, strict=True):
        count = 1 if view == "centre" else -(-(last - first) // size)
        if count == 1:
            axes.append([(first + last - size) // 2])
        else:
            axes.append(np.linspace(first, last - size, count).round().astype(int).tolist())
    return list(itertools.product(*axes))


@torch.no_grad()
def pooled_bottleneck(network: nn.Module, views: Tensor) -> np.ndarray:
    """Return the last map of views (N, 1, X, Y, Z), averaged over space: (N, D) float64."""
    device = next(network.parameters()).device
    return pooled(network(views.to(device).float())[-1].float()).double().cpu().numpy()


def _scan(encoder: LoadedEncoder, scan: Scan | Path | str) -> Scan:
    return scan if isinstance(scan, Scan) else read_scan(scan, encoder.preprocessing)


def _patch(encoder: LoadedEncoder, scan: Scan, start: Sequence[int]) -> Tensor:
    """The patch (1, X, Y, Z) from `start` on; beyond the volume its edge repeats."""
    voxels = scan.array[0]
    patch = padded_patch(
        lambda box: voxels[tuple(slice(*ends) for ends in box)], voxels.shape, start, encoder.patch_size
    )
    return torch.from_numpy(patch[None])
