"""Maps of MONAI's SwinTransformer for weights that every machine can draw again; MONAI 1.4's are stored as a reference.

MONAI 1.5 changed what a patch merging computes, so the version before it needs a folder of its own::

    pip install --no-deps --target FOLDER monai==1.4.0
    PYTHONPATH=FOLDER python tests/support/monai_1_4.py tests/weights/reference/monai_1_4.npz
"""

import sys

import numpy as np
import torch

SIZES = {"embed_dim": 6, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 3, 4), "window_size": 3}
SHAPE = (22, 18, 14)  # grids of odd sizes, which are padded before they are merged
VARIANTS = {
    f"{downsample} {'with' if use_v2 else 'without'} conv blocks": {"downsample": downsample, "use_v2": use_v2}
    for downsample in ("merging", "mergingv2")
    for use_v2 in (True, False)
}


def drawn_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace a state dict's numbers by those of a seeded generator, in the order of the names; keep the indices."""
    generator = np.random.Generator(np.random.PCG64(0))
    return {
        name: state[name] if name.endswith("index") else torch.from_numpy(generator.normal(0, 0.2, state[name].shape))
        for name in sorted(state)
    }


def drawn_volume() -> torch.Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(1)).normal(size=(1, 1, *SHAPE)))


def encoder(*, downsample: str, use_v2: bool) -> torch.nn.Module:
    """Build MONAI's encoder with the drawn weights, in float64."""
    from monai.networks.nets.swin_unetr import SwinTransformer

    network = SwinTransformer(
        in_chans=1,
        embed_dim=SIZES["embed_dim"],
        window_size=(SIZES["window_size"],) * 3,
        patch_size=(2, 2, 2),
        depths=SIZES["depths"],
        num_heads=SIZES["num_heads"],
        downsample=downsample,
        use_v2=use_v2,
    ).double()
    network.load_state_dict(drawn_state(network.state_dict()))
    return network


@torch.no_grad()
def maps(**variant) -> list[np.ndarray]:
    """Return the four maps behind a merging."""
    return [level.numpy() for level in encoder(**variant)(drawn_volume())[1:]]


if __name__ == "__main__":
    import monai

    assert monai.__version__.startswith("1.4."), monai.__version__
    arrays = {
        f"{name}, level {level}": array
        for name, variant in VARIANTS.items()
        for level, array in enumerate(maps(**variant), start=1)
    }
    np.savez_compressed(sys.argv[1], **arrays)
