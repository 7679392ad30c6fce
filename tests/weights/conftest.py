"""A pair of encoders with the same weights, and files of checkpoints."""

from pathlib import Path

import pytest
import torch
from foreign import SMALL, twin_encoders
from monai.networks.nets.swin_unetr import SwinTransformer

from nnunet_ssl.architectures.swin import SwinEncoder


@pytest.fixture
def twins() -> tuple[SwinEncoder, SwinTransformer]:
    return twin_encoders(**SMALL)


@pytest.fixture
def stored(tmp_path):
    """Write a checkpoint as ``torch.save`` does; return its path."""

    def store(content, name: str = "checkpoint.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return store
