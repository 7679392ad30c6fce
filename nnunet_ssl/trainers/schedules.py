"""When encoder and decoder learn, and how fast: learning rates as functions of the step alone."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_ssl.schedules import warmup_cosine, warmup_poly
from nnunet_ssl.trainers.settings import Settings

FLOOR_OF_PEAK = 0.02  # arXiv 2511.11311, fine-tuning recipe: a cosine from 5e-4 ends at 1e-5


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The encoder rests for `freeze_steps`, then warms up and decays; the decoder learns from the first step.

    Attributes:
        steps: optimizer steps in all.
        freeze_steps: of them, at the start, those in which the encoder rests.
        warmup_steps: of every linear rise, but for that of a decoder that restarts later: half of its first phase.
        decay: ``cosine`` to a fiftieth of the peak, or nnU-Net's ``poly`` to 0.
        restarts: the decoder's rate decays to the end of the encoder's rest and rises again together with the
            encoder's (sawtooth); otherwise it follows one curve over all steps.
    """

    steps: int
    freeze_steps: int
    warmup_steps: int
    decay: str
    restarts: bool

    @classmethod
    def of_settings(cls, settings: Settings, *, from_scratch: bool) -> Schedule:
        """Return the schedule that `settings` ask for; an encoder from random weights never rests."""
        return cls(
            steps=settings.steps,
            freeze_steps=0 if from_scratch else round(settings.freeze_share * settings.steps),
            warmup_steps=round(settings.warmup_share * settings.steps),
            decay=settings.decay,
            restarts=settings.schedule == "sawtooth",
        )

    def rate(self, part: str, step: int, peak: float) -> float:
        """Return the learning rate of `part`, ``encoder`` or ``decoder``, for the step that comes after `step` others.

        The two saw teeth follow the public trainer ``PretrainedTrainer_sawtooth`` of MIC-DKFZ's OpenMind work.
        """
        if step < self.freeze_steps and part == "encoder":
            return 0.0
        if step < self.freeze_steps and self.restarts:
            return self._curve(step, self.freeze_steps, self.freeze_steps // 2, peak)
        start = self.freeze_steps if part == "encoder" or self.restarts else 0
        return self._curve(step - start, self.steps - start, self.warmup_steps, peak)

    def _curve(self, step: int, steps: int, warmup: int, peak: float) -> float:
        if self.decay == "cosine":
            return warmup_cosine(step, steps=steps, warmup=warmup, peak=peak, floor=FLOOR_OF_PEAK * peak)
        return warmup_poly(step, steps=steps, warmup=warmup, peak=peak)
