"""Trainers whose workers load and crop and do nothing else: augmentation is the training device's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.console import exit_on_user_error
from nnunet_ssl.errors import UserError
from nnunet_ssl.requirements import check_requirements
from nnunet_ssl.trainers.augmentation import BatchAugmentation


class AugmentsOnDevice(nnUNetTrainer):
    """What a trainer needs to augment whole batches where it trains; validation stays as it is.

    Attributes:
        augments_on_device: whether it does; if not, nnU-Net's workers augment.
    """

    augments_on_device = True
    batch_augmentation: BatchAugmentation | None = None

    def get_training_transforms(self, *arguments: Any, **named: Any) -> Any:
        """Keep nnU-Net's transforms for :meth:`augmented`; its workers get none, so they crop and no more."""
        transforms = super().get_training_transforms(*arguments, **named)
        if not self.augments_on_device:
            return transforms
        with exit_on_user_error():
            manager = self.label_manager
            labels = [*manager.all_labels, *([manager.ignore_label] if manager.has_ignore_label else [])]
            self.batch_augmentation = BatchAugmentation(transforms, labels)
        return None

    def augmented(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of the training loader as the network is to see it, on the training device where that augments."""
        return self.batch_augmentation(batch, self.device) if self.batch_augmentation else batch

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        return super().train_step(self.augmented(batch))


class nnUNetTrainerGPUAugmentation(AugmentsOnDevice):
    """nnU-Net's own training, but for where the augmentation is done."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        with exit_on_user_error():
            check_requirements()
            check_augmentation(type(self), plans, configuration, device)
        super().__init__(plans, configuration, fold, dataset_json, device)


def check_augmentation(
    trainer: type[AugmentsOnDevice], plans: Mapping[str, Any], configuration: str, device: torch.device
) -> None:
    """Refuse what cannot be augmented on the training device, before anything is made.

    Raises:
        UserError: the second stage of a cascade, a device that cannot resample volumes, or a transform that is not
            known.
    """
    if PlansManager(dict(plans)).get_configuration(configuration).previous_stage_name is not None:
        raise UserError(
            f"{configuration} is the second stage of a cascade, whose masks nnU-Net changes at random on the CPU: "
            "augment on the CPU, with nnUNetTrainer."
        )
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"Augmentation on the training device needs CUDA, not {device.type}: augment on the CPU.")
    stock: Any = super(AugmentsOnDevice, trainer)
    BatchAugmentation(stock.get_training_transforms((8, 8, 8), (0, 0), None, (0,), False), [])
