"""The losses of fine-tuning, all of them nnU-Net's own."""

from __future__ import annotations

from nnunetv2.training.loss.compound_losses import DC_and_topk_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from nnunet_ssl.errors import UserError

HARDEST_PERCENT = 10  # nnU-Net's nnUNetTrainerDiceTopK10Loss


def check_loss(name: str, labels: LabelManager) -> None:
    """Refuse a loss that a data set's labels do not allow.

    Raises:
        UserError: Dice + TopK for regions, which overlap: nnU-Net's takes one label a voxel.
    """
    if name == "dice_topk" and labels.has_regions:
        raise UserError(
            "loss=dice_topk needs one label for each voxel, and this data set has regions, which overlap: take "
            "loss=dice_ce, which is Dice + BCE for regions (recipe=long brings dice_topk: add it there)."
        )


def with_hardest_voxels(loss: nn.Module, labels: LabelManager, *, batch_dice: bool, ddp: bool) -> nn.Module:
    """Return nnU-Net's Dice + cross-entropy `loss` with the cross-entropy of the hardest tenth of the voxels.

    Args:
        loss: as nnU-Net built it; a wrapper for deep supervision keeps its weights.
    """
    topk = DC_and_topk_loss(
        {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": ddp},
        {"k": HARDEST_PERCENT},
        ignore_label=labels.ignore_label,
    )
    return DeepSupervisionWrapper(topk, loss.weight_factors) if isinstance(loss, DeepSupervisionWrapper) else topk
