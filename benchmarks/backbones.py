"""What a backbone costs: parameters, FLOPs, time of a training step and memory, Swin beside nnU-Net's residual encoder.

A step is the masked branch of recipe mim on one batch: encode with hidden cells, reconstruct through the FPN, error,
backward pass. All combinations take turns in one process, round by round; times are medians [min-max] over rounds.

    python benchmarks/backbones.py -device cuda --batch-size 8 --rounds 20
    MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184 python benchmarks/backbones.py --rounds 5
    python benchmarks/backbones.py --sizes 64 --set swin.embed_dim=12 resenc.features=8,16,32,64,80,80

FLOPs are those of one patch (multiply and add count as two), activations what one batch's forward pass keeps for its
backward pass, peak memory what the device held at most, weights and gradients included (GPU only).
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch
from steps import machine, memory, seconds_per_step
from tables import markdown
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunet_ssl.architectures.compiling import compile_parts
from nnunet_ssl.pretraining.config import PretrainingConfig, load_config
from nnunet_ssl.pretraining.model import Network
from nnunet_ssl.pretraining.objectives.masked import bottleneck_grid, draw_masks, reconstruction_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=["swin", "resenc"], default=["swin", "resenc"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[96, 128], help="edges of the patches, in voxels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--set", dest="settings", nargs="+", default=[], metavar="KEY=VALUE", help="checkpointing=true")
    arguments = parser.parse_args()

    runs = {
        (backbone, size): load_config("mim", [f"backbone={backbone}", f"patch_size={size}", *arguments.settings])
        for size in arguments.sizes
        for backbone in arguments.backbones
    }
    rows = {run: {"parameters (M)": parameters(config), **flops(config)} for run, config in runs.items()}
    steps = {run: Step(config, arguments.batch_size, arguments.device) for run, config in runs.items()}
    for run, step in steps.items():
        rows[run] |= memory(step)
    for run, seconds in seconds_per_step(steps, arguments.rounds).items():
        rows[run]["s/step"] = seconds

    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["backbone", "patch"])
    print(
        machine(arguments.device),
        f"batch {arguments.batch_size}, {arguments.rounds} rounds",
        *arguments.settings,
        sep=", ",
        end="\n\n",
    )
    print(markdown(table.reset_index(), decimals=2))


class Step:
    """Forward and backward pass of the masked branch, on numbers that are the same every time."""

    def __init__(self, config: PretrainingConfig, batch_size: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.config, self.device = config, device
        self.network = Network(config).to(device)
        if config.compile:
            compile_parts(self.network.encoder)
        self.volumes = torch.randn(batch_size, 1, *config.patch_size).to(device)
        self.mask = masks(config, batch_size).to(device)

    def forward(self) -> Tensor:
        maps = self.network.encode(self.volumes, self.mask)
        prediction = self.network.head("decoder", maps, self.config.patch_size)
        return reconstruction_error(prediction, self.volumes, self.mask, self.config.stride).mean()

    def __call__(self) -> None:
        self.forward().backward()
        self.network.zero_grad()


def masks(config: PretrainingConfig, count: int) -> Tensor:
    grid = bottleneck_grid(config.patch_size, config.stride)
    return draw_masks(count, grid, config.masked.ratio, torch.Generator().manual_seed(0))


def parameters(config: PretrainingConfig) -> float:
    """Millions in the encoder."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Network(config).encoder.parameters()) / 1e6


def flops(config: PretrainingConfig) -> dict[str, float]:
    """Of encoder and decoder for one patch, counted without computing: tensors on the meta device have no contents."""
    with torch.device("meta"):
        network = Network(config)
        volumes = torch.empty(1, 1, *config.patch_size)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # attention as matrix products, which are counted on every device
        prediction = network.decoder(network.encoder(volumes, masks(config, 1).to("meta")), config.patch_size)
        forward = counter.get_total_flops()
        prediction.sum().backward()
    return {"forward (GFLOP)": forward / 1e9, "forward+backward (GFLOP)": counter.get_total_flops() / 1e9}


if __name__ == "__main__":
    main()
