"""The only module of the only folder that nnU-Net scans for this package's trainers."""

from nnunet_ssl.trainers.arms import ARMS, nnUNetTrainerSwinFPNScratch
from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL

globals().update(ARMS)

__all__ = ["nnUNetTrainerSSL", "nnUNetTrainerSwinFPNScratch", *ARMS]
