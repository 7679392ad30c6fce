"""The only module of the only folder that nnU-Net scans for this package's trainers."""

from nnunet_ssl.trainers.arms import ARMS, nnUNetTrainerSwinFPNScratch
from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL
from nnunet_ssl.trainers.gpu_augmentation import nnUNetTrainerGPUAugmentation

globals().update(ARMS)

__all__ = ["nnUNetTrainerGPUAugmentation", "nnUNetTrainerSSL", "nnUNetTrainerSwinFPNScratch", *ARMS]
