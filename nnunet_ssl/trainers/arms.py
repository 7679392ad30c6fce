"""The arms of the comparison: one trainer for each pre-training recipe, and the twin without pre-training."""

from __future__ import annotations

from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL


class nnUNetTrainerCL(nnUNetTrainerSSL):
    """From contrastive pre-training on two views of the same scan."""

    recipe = "cl"


class nnUNetTrainerMCL(nnUNetTrainerSSL):
    """From modality-invariant contrastive pre-training on two modalities of one session."""

    recipe = "mcl"


class nnUNetTrainerMIM(nnUNetTrainerSSL):
    """From masked image modelling."""

    recipe = "mim"


class nnUNetTrainerCLMIM(nnUNetTrainerSSL):
    """From contrastive pre-training with masked image modelling."""

    recipe = "cl_mim"


class nnUNetTrainerMCLMIM(nnUNetTrainerSSL):
    """From modality-invariant contrastive pre-training with masked image modelling."""

    recipe = "mcl_mim"


class nnUNetTrainerMCLMIMBalanced(nnUNetTrainerSSL):
    """From modality-invariant contrastive pre-training with masked image modelling, their gradients balanced."""

    recipe = "mcl_mim_balanced"


class nnUNetTrainerMCLiBOT(nnUNetTrainerSSL):
    """From modality-invariant contrastive pre-training with masked tokens predicted between modalities."""

    recipe = "mcl_ibot"


class nnUNetTrainerSwinFPNScratch(nnUNetTrainerSSL):
    """The honest twin: the same network and schedule from random weights, nothing frozen.

    Its encoder learns at the decoder's rate, which a randomly initialised network needs. ``nnssl_checkpoint`` gives it
    the sizes of another encoder than the paper's, never the weights.
    """

    from_scratch = True
