"""The arms of the comparison: one trainer for each pre-training recipe, and the twin without pre-training."""

from __future__ import annotations

from nnunet_ssl.pretraining.recipes import about_recipes
from nnunet_ssl.trainers.finetuning import nnUNetTrainerSSL


class nnUNetTrainerSwinFPNScratch(nnUNetTrainerSSL):
    """The honest twin: the same network and schedule from random weights, nothing frozen.

    Its encoder learns at the decoder's rate, which a randomly initialised network needs. ``nnssl_checkpoint`` gives it
    the sizes of another encoder than the paper's, never the weights.
    """

    from_scratch = True


def arm(name: str, recipe: str, learns: str) -> type[nnUNetTrainerSSL]:
    """Return the trainer class `name` that starts from the newest pre-training of `recipe`."""
    content = {"recipe": recipe, "__doc__": f"From the pre-training {recipe}: {learns}.", "__module__": __name__}
    return type(name, (nnUNetTrainerSSL,), content)


ARMS = {about.trainer: arm(about.trainer, recipe, about.learns) for recipe, about in about_recipes().items()}
"""By name, as nnU-Net's ``-tr`` takes it; each is an attribute of this module, too."""

globals().update(ARMS)
