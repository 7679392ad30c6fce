"""Other people's encoders where ours would be in a pre-training, so that one run times both."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from nnunet_ssl.architectures.masking import check_mask, expand_mask

FLASH = "use_flash_attention"
"""The option of newer releases of MONAI that leaves attention to PyTorch's fused kernels."""


def monai_has_flash_attention() -> bool:
    return FLASH in inspect.signature(SwinTransformer).parameters


class MonaiEncoder(nn.Module):
    """MONAI's SwinTransformer of the same sizes with conv blocks, behind the interface of our encoders.

    Its conv blocks have instance norms; hidden tokens are replaced after its patch embedding, as ours are.

    Args:
        architecture: of a Swin encoder, as a recipe's configuration gives it.
        checkpointing: MONAI's own, of its blocks.
        flash: use its fused attention.
    """

    def __init__(self, architecture: Mapping[str, Any], *, checkpointing: bool, flash: bool) -> None:
        super().__init__()
        width, depths = architecture["embed_dim"], architecture["depths"]
        self.channels = tuple(width * 2**level for level in range(len(depths) + 1))
        self.strides = tuple(2 ** (level + 1) for level in range(len(depths) + 1))
        self.swin = SwinTransformer(
            in_chans=1,
            embed_dim=width,
            window_size=(architecture["window_size"],) * 3,
            patch_size=(2, 2, 2),
            depths=depths,
            num_heads=architecture["num_heads"],
            mlp_ratio=architecture["mlp_ratio"],
            use_v2=True,
            use_checkpoint=checkpointing,
            **({FLASH: True} if flash else {}),
        )
        self.mask_token = nn.Parameter(torch.zeros(width)) if architecture["mask_token"] else None
        self.swin.patch_embed.register_forward_hook(self._hide)
        self._mask: Tensor | None = None

    def parts(self) -> list[nn.Module]:
        """None: it is timed as it comes."""
        return []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Map (B, 1, X, Y, Z) to the maps, finest first."""
        if mask is not None:
            check_mask(mask, x, self.strides[-1])
        self._mask = mask
        return self.swin(x)

    def _hide(self, embedding: nn.Module, inputs: tuple[Tensor], tokens: Tensor) -> Tensor:
        if self._mask is None:
            return tokens
        hidden = expand_mask(self._mask, tokens.shape[2:], self.strides[-1] // self.strides[0])
        return torch.where(hidden[:, None], self.mask_token.to(tokens.dtype)[:, None, None, None], tokens)
