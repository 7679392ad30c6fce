"""The only module of the only folder that nnU-Net scans for this package's trainers."""

from nnunet_ssl.trainers.arms import (
    nnUNetTrainerCL,
    nnUNetTrainerCLMIM,
    nnUNetTrainerMCL,
    nnUNetTrainerMCLiBOT,
    nnUNetTrainerMCLMIM,
    nnUNetTrainerMCLMIMBalanced,
    nnUNetTrainerMIM,
    nnUNetTrainerSwinFPNScratch,
)
from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL

__all__ = [
    "nnUNetTrainerCL",
    "nnUNetTrainerCLMIM",
    "nnUNetTrainerMCL",
    "nnUNetTrainerMCLMIM",
    "nnUNetTrainerMCLMIMBalanced",
    "nnUNetTrainerMCLiBOT",
    "nnUNetTrainerMIM",
    "nnUNetTrainerSSL",
    "nnUNetTrainerSwinFPNScratch",
]
