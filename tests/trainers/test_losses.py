"""The losses that can be chosen are nnU-Net's."""

import copy

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerTopkLoss import nnUNetTrainerDiceTopK10Loss
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.losses import check_loss, with_hardest_voxels

LABELS = LabelManager({"background": 0, "lesion": 1, "core": 2}, None)
IGNORING = LabelManager({"background": 0, "lesion": 1, "core": 2, "ignore": 3}, None)
REGIONS = LabelManager({"background": 0, "lesion": [1, 2], "core": 2}, [1, 2])


class Stock(nnUNetTrainerDiceTopK10Loss):
    """nnU-Net's trainer with as much of a training as its loss asks for."""

    def __init__(self, labels, batch_dice, scales):
        self.label_manager = labels
        self.is_ddp = False
        self.enable_deep_supervision = scales is not None
        self.configuration_manager = type("Configuration", (), {"batch_dice": batch_dice})()
        self.scales = scales

    def _get_deep_supervision_scales(self):
        return self.scales


@pytest.mark.parametrize("labels", [LABELS, IGNORING], ids=["all labelled", "some ignored"])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("scales", [None, [[1.0] * 3, [0.5] * 3, [0.25] * 3]], ids=["one scale", "three scales"])
def test_dice_with_the_hardest_voxels_is_nnunets(labels, batch_dice, scales):
    ours = with_hardest_voxels(default_loss(labels, batch_dice, scales), labels, batch_dice=batch_dice, ddp=False)
    theirs = Stock(labels, batch_dice, scales)._build_loss()
    generator = torch.Generator().manual_seed(0)
    sizes = [16] if scales is None else [16, 8, 4]
    logits = [3 * torch.randn(2, 3, *[size] * 3, generator=generator) for size in sizes]
    classes = 4 if labels.has_ignore_label else 3
    targets = [torch.randint(0, classes, (2, 1, *[size] * 3), generator=generator).float() for size in sizes]
    if scales is None:
        logits, targets = logits[0], targets[0]
    assert value_and_gradients(ours, logits, targets) == value_and_gradients(theirs, logits, targets)
    default = default_loss(labels, batch_dice, scales)
    assert value_and_gradients(ours, logits, targets) != value_and_gradients(default, logits, targets)


def default_loss(labels, batch_dice, scales):
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, ignore_label=labels.ignore_label)
    return loss if scales is None else DeepSupervisionWrapper(loss, [2 / 3, 1 / 3, 0])


def value_and_gradients(loss, logits, targets):
    leaves = [one.clone().requires_grad_() for one in ([logits] if torch.is_tensor(logits) else logits)]
    value = loss(leaves[0] if torch.is_tensor(logits) else leaves, copy.deepcopy(targets))
    value.backward()
    return value.item(), [None if leaf.grad is None else leaf.grad.tolist() for leaf in leaves]


def test_regions_are_refused_where_voxels_have_more_than_one_label():
    with pytest.raises(UserError, match="this data set has regions"):
        check_loss("dice_topk", REGIONS)
    check_loss("dice_ce", REGIONS)
    check_loss("dice_topk", IGNORING)
