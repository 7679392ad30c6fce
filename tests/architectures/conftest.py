"""A small encoder and MONAI's with the same weights."""

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformer

from nnunet_ssl.architectures.origins import from_monai
from nnunet_ssl.architectures.swin import SwinEncoder

SMALL = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}


def monai_encoder(*, embed_dim, depths, num_heads, window_size, in_channels=1, use_v2=True) -> SwinTransformer:
    """Build MONAI's encoder from SwinEncoder's keywords."""
    return SwinTransformer(
        in_chans=in_channels,
        embed_dim=embed_dim,
        window_size=(window_size,) * 3,
        patch_size=(2, 2, 2),
        depths=depths,
        num_heads=num_heads,
        use_v2=use_v2,
    )


@pytest.fixture
def twins() -> tuple[SwinEncoder, SwinTransformer]:
    """Ours and MONAI's, same weights, float64."""
    torch.manual_seed(0)
    theirs = monai_encoder(**SMALL)
    ours = SwinEncoder(**SMALL, conv_norm="instance", mask_token=False)
    state = theirs.state_dict()
    ours.load_state_dict({from_monai(name): state[name] for name in state if "relative_position_index" not in name})
    return ours.double(), theirs.double()
