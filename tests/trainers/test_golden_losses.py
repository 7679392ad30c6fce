"""The losses of fine-tunings, compared with those that were recorded: a change of them must be a decision."""

import pytest
import torch
from golden import recorded

from nnunet_ssl.trainers.arms import nnUNetTrainerMCLMIM

ENCODERS = {
    "swin": {"embed_dim": 6, "depths": [2, 1], "num_heads": [1, 2], "window_size": 3},
    "resenc": {"features": [4, 8, 8], "blocks": [1, 2, 2]},
}
STEPS = "steps=30,epoch_steps=10,freeze_share=0.4,lr=0.01,encoder_lr=0.005"
"""The encoder moves from the third step of the second epoch, at a pace that losses show."""


def balls(step):
    """Two noisy volumes, the ball in each, and the ball at half the resolution."""
    generator = torch.Generator().manual_seed(step)
    grid = torch.cartesian_prod(*[torch.arange(16.0)] * 3).view(16, 16, 16, 3)
    centres = torch.rand(2, 1, 1, 1, 3, generator=generator) * 6 + 5
    inside = ((grid - centres).square().sum(-1) < 16).float()[:, None]
    return 2 * inside + torch.randn(inside.shape, generator=generator), inside


@pytest.mark.parametrize("backbone", ENCODERS)
def test_losses_of_finetuning(backbone, golden, workplace, results, write_checkpoint, tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path, {"backbone": backbone, "in_channels": 1, **ENCODERS[backbone]})
    workplace.enter(monkeypatch, nnUNet_results=results, nnssl_checkpoint=checkpoint, nnssl_settings=STEPS)
    trainer = workplace.trainer(nnUNetTrainerMCLMIM)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    losses = []
    for trainer.current_epoch in range(3):
        trainer.on_train_epoch_start()
        for step in range(10):
            data, target = balls(10 * trainer.current_epoch + step)
            scales = [target[:, :, :: 2**level, :: 2**level, :: 2**level] for level in range(5)]
            if trainer.enable_deep_supervision:
                target = scales[: len(trainer._get_deep_supervision_scales())]
            losses.append(float(trainer.train_step({"data": data, "target": target})["loss"]))
    golden(f"finetuning: {backbone}", {"loss": losses})


def test_every_recorded_run_is_still_run():
    assert {name for name in recorded() if name.startswith("finetuning")} == {
        f"finetuning: {name}" for name in ENCODERS
    }
