"""Self-supervised brain-MRI pre-training for stock nnU-Net v2.

In Python, beside the commands::

    encoder = nnunet_ssl.load_encoder("encoder.safetensors")
    vector = nnunet_ssl.embed(encoder, "sub-1_T1w.nii.gz")

"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_ssl.interface.encoders import LoadedEncoder, embed, feature_maps, load_encoder
    from nnunet_ssl.interface.scans import Scan, read_scan, read_session
    from nnunet_ssl.interface.segmentation import segment

__version__ = "0.1.0"

_HOMES = {
    "encoders": ("LoadedEncoder", "embed", "feature_maps", "load_encoder"),
    "scans": ("Scan", "read_scan", "read_session"),
    "segmentation": ("segment",),
}
"""By module of nnunet_ssl.interface: what it offers. Imported when first asked for, since torch takes seconds."""

__all__ = [
    "LoadedEncoder",
    "Scan",
    "embed",
    "feature_maps",
    "load_encoder",
    "read_scan",
    "read_session",
    "segment",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"nnunet_ssl.interface.{module}"), name)
    raise AttributeError(f"module 'nnunet_ssl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
