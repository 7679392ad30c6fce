"""A fine-tuning step: what freezing saves, in time and memory, for either backbone; and how fast workers feed it.

A step is the trainers' own: forward pass, nnU-Net's Dice + CE, backward pass, clip, AdamW; on a GPU under nnU-Net's
float16 autocast. All combinations take turns in one process, round by round; times are medians [min-max] over rounds.

    python benchmarks/finetuning.py -device cuda --batch-size 8 --rounds 20
    MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184 python benchmarks/finetuning.py --rounds 5
    python benchmarks/finetuning.py --sizes 64 --small
    python benchmarks/finetuning.py --feed 4 -device cuda --batch-size 8 --rounds 20    # four workers

Activations are what a forward pass keeps for its backward pass; peak memory is the most that a step adds to what the
process holds already, with its own weights (GPU only). Sampling, augmentation and nnU-Net's validation are not part of
a step.

With `--feed` so many workers of nnU-Net's feed steps that train the whole network, once with nnU-Net's augmentation in
the workers and once with `augmentation=gpu`, one after the other, `--rounds` steps each. "Waiting" is the share of the
time in which the device had done everything and no batch was there. "Workers alone" is what they make if nobody trains.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch
from feeding import feed, write_cases
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from steps import machine, memory, seconds_per_step
from tables import markdown
from torch import Tensor, nn

from nnunet_ssl.architectures.backbones.resenc import RESIDUAL_UNET
from nnunet_ssl.architectures.networks import PAPER_ENCODER
from nnunet_ssl.architectures.resenc import PRESETS
from nnunet_ssl.trainers.freezing import with_trainable_encoder
from nnunet_ssl.trainers.networks import network_entry
from nnunet_ssl.trainers.optimization import GRADIENT_CLIP, build_optimizer
from nnunet_ssl.weights.nnssl import unet_arguments

ARCHITECTURES = {"swin": PAPER_ENCODER, "resenc": {"backbone": "resenc", "in_channels": 1, **PRESETS["resenc_l"]}}
SMALL = {
    "swin": {**PAPER_ENCODER, "embed_dim": 12},
    "resenc": {
        "backbone": "resenc",
        "in_channels": 1,
        "features": (8, 16, 32, 64, 80, 80),
        "blocks": (1, 3, 4, 6, 6, 6),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=["swin", "resenc"], default=["swin", "resenc"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[96], help="edges of the patches, in voxels")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="encoders of a quarter of the width")
    parser.add_argument("--feed", type=int, metavar="WORKERS", help="compare the two places of augmentation instead")
    parser.add_argument("-device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()

    architectures = SMALL if arguments.small else ARCHITECTURES
    table = fed(architectures, arguments) if arguments.feed else frozen_and_not(architectures, arguments)
    width = "a quarter of the width" if arguments.small else "full width"
    print(f"{machine(arguments.device)}; {width}, batch {arguments.batch_size}, {arguments.rounds} rounds\n")
    print(markdown(table.reset_index(), decimals=2))


def frozen_and_not(architectures: dict[str, dict], arguments: argparse.Namespace) -> pd.DataFrame:
    """Time and memory of steps on a batch that is there."""
    runs = {
        (name, size, frozen): Step(architectures[name], size, arguments.batch_size, arguments.device, frozen)
        for size in arguments.sizes
        for name in arguments.backbones
        for frozen in (True, False)
    }
    rows = {run: memory(step) for run, step in runs.items()}
    for run, seconds in seconds_per_step(runs, arguments.rounds).items():
        rows[run]["s/step"] = seconds
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["backbone", "patch", "frozen"])


def fed(architectures: dict[str, dict], arguments: argparse.Namespace) -> pd.DataFrame:
    """Steps on batches that workers make."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        write_cases(Path(folder))
        for size in arguments.sizes:
            for name in arguments.backbones:
                step = Step(architectures[name], size, arguments.batch_size, arguments.device, frozen=False)
                for place in ("workers", "device"):
                    rows[name, size, place] = feed(
                        Path(folder),
                        on_device=place == "device",
                        size=size,
                        batch_size=arguments.batch_size,
                        workers=arguments.feed,
                        device=arguments.device,
                        steps=arguments.rounds,
                        train=step.on,
                    )
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["backbone", "patch", "augmentation in"])


class Step:
    """A training step on a batch that is the same every time."""

    def __init__(self, architecture: dict, size: int, batch_size: int, device: torch.device, frozen: bool) -> None:
        torch.manual_seed(0)
        self.device = device
        entry = entry_of(architecture)
        network = get_network_from_plans(
            entry["network_class_name"],
            entry["arch_kwargs"],
            entry["_kw_requires_import"],
            1,
            2,
            deep_supervision=False,
        )
        self.network = with_trainable_encoder(network.to(device), not frozen)
        self.optimizer = build_optimizer(self.network, 5e-4, 5e-5)
        self.scaler = torch.GradScaler(device.type, enabled=device.type == "cuda")
        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
        self.loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
        self.data = torch.randn(batch_size, 1, size, size, size).to(device)
        self.target = (torch.rand_like(self.data) > 0.9).float()

    def forward(self) -> Tensor:
        with torch.autocast(self.data.device.type, enabled=self.data.is_cuda):
            return self.loss(self.network(self.data), self.target)

    def on(self, data: Tensor, target: Tensor) -> None:
        """Take the step on another batch."""
        self.data, self.target = data, target
        self()

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(self.forward()).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_CLIP["adamw"])
        self.scaler.step(self.optimizer)
        self.scaler.update()


def entry_of(architecture: dict) -> dict:
    """The network as plans hold it; an isotropic patch's, in which a residual encoder keeps all its stages."""
    residual = architecture["backbone"] == "resenc"
    planned = {
        "network_class_name": RESIDUAL_UNET,
        "arch_kwargs": unet_arguments(architecture) if residual else {},
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    return network_entry(architecture, planned)


if __name__ == "__main__":
    main()
