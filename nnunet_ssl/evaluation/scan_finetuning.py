"""Fine-tune an encoder on whole scans, to predict what is known of them: what a probe asks of a frozen one.

The recipe is that of fine-tuning for segmentation (arXiv 2511.11311), as far as there is one image and one answer: the
encoder rests while the head learns, and then learns at a tenth of the head's rate.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_ssl.architectures.networks import build_encoder, pooled
from nnunet_ssl.corpus.prepared import Corpus, open_corpus
from nnunet_ssl.devices import computes_in_bf16
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.encoding import EncodingConfig, choose_rows, compare_preprocessing, describe_scans
from nnunet_ssl.evaluation.scan_prediction import Prediction, ScanTarget, choose_target, predict_held_out
from nnunet_ssl.learning import check_gradients
from nnunet_ssl.trainers.freezing import with_trainable_encoder
from nnunet_ssl.trainers.optimization import GRADIENT_CLIP, StepSchedule, build_optimizer
from nnunet_ssl.trainers.schedules import Schedule
from nnunet_ssl.weights import encoders
from nnunet_ssl.weights.pretrained import PretrainedEncoder
from nnunet_ssl.weights.zoo import named_checkpoint

ENCODER_SHARE = 0.1  # of the head's learning rate: arXiv 2511.11311
FREEZE_SHARE = 0.3  # of the steps: arXiv 2511.11311
WARMUP_SHARE = 0.05  # of the steps: arXiv 2511.11311
JITTER_SHARE = 1 / 16  # of the box: how far it is shifted at most

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig:
    """How an encoder is fine-tuned on scans.

    Attributes:
        steps: of the optimizer, in each training.
        batch_size: scans of a step.
        learning_rate: of the head at its peak; the encoder's is a tenth of it.
        scratch: start from random weights of the same architecture, whose encoder never rests and learns at the
            head's rate.
        box: voxels of the scan that the network sees, around the centre of the foreground; None for the smallest box
            of whole cells of the encoder's coarsest map that holds every scan's foreground.
        max_subjects: at most so many subjects, drawn with a fixed seed.
        seed: of the weights that are drawn, the order of the scans, and their augmentation.
    """

    steps: int = 500
    batch_size: int = 8
    learning_rate: float = 5e-4
    scratch: bool = False
    box: tuple[int, int, int] | None = None
    max_subjects: int = 10_000
    seed: int = 0


class ScanNetwork(nn.Module):
    """An encoder, and a linear head on the average of its last map.

    The average is normalised over batches without being scaled again, as is usual before a linear head (He et al.
    2022): what all scans share is much more than what tells them apart. When training is over, :meth:`settle` puts the
    statistics of all training scans in the place of the batches' moving ones, which lag behind an encoder that learns
    (Wu and Johnson 2021, "precise" batch normalisation).

    Args:
        encoder: of a backbone.
        outputs: numbers to predict of a scan.
    """

    def __init__(self, encoder: nn.Module, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        width: int = encoder.channels[-1]  # type: ignore[assignment, index]
        self.head = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 1, X, Y, Z) to (B, outputs)."""
        return self.head(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """Map (B, 1, X, Y, Z) to what the head sees, (B, channels)."""
        return pooled(self.encoder(x)[-1].float())

    @torch.no_grad()
    def settle(self, batches: Iterable[Tensor]) -> ScanNetwork:
        """Go into evaluation mode, with the statistics of all these scans (B, 1, X, Y, Z)."""
        self.eval()
        embedded = torch.cat([self.embed(batch) for batch in batches])
        norm: nn.BatchNorm1d = self.head[0]  # type: ignore[assignment]
        norm.running_mean, norm.running_var = embedded.mean(dim=0), embedded.var(dim=0)
        return self


def finetune_scans(
    checkpoint: Path,
    dataset: int | str,
    target: str,
    config: FinetuningConfig,
    device: torch.device,
    *,
    across: bool = False,
    **choice: Any,
) -> Prediction:
    """Fine-tune an encoder in each fold of a cross-validation by subject, and predict the scans it was not shown.

    Args:
        checkpoint: what ``nnssl_weights`` reads, or the folder of a finished pre-training.
        dataset: a prepared corpus.
        target: a column of its manifest.
        config: how to train.
        device: where.
        across: train on each modality alone, too, see
            :func:`~nnunet_ssl.evaluation.scan_prediction.predict_held_out`.
        choice: ``task``, ``modalities``, ``folds`` and ``seed`` of
            :func:`~nnunet_ssl.evaluation.scan_prediction.choose_target`.

    Raises:
        UserError: the checkpoint or the corpus cannot be read, the target cannot be predicted, or a training cannot go
            on.
    """
    pretrained = encoders.read_checkpoint(named_checkpoint(str(checkpoint)))
    corpus = open_corpus(dataset).readable()
    compare_preprocessing(pretrained, corpus)
    rows = choose_rows(corpus, pretrained, EncodingConfig(max_subjects=config.max_subjects))
    used, known = choose_target(describe_scans(corpus, rows), target, **choice)
    rows = rows[used]
    stride: int = _encoder(pretrained, scratch=True).strides[-1]  # type: ignore[assignment, index]
    box = config.box or box_around(corpus, rows, stride)
    logger.info("The network sees a box of %d x %d x %d voxels of each scan.", *box)

    scans = _Scans(corpus, rows, box)

    def learn(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        answers = _Answers(known, train)
        network = _train(pretrained, scans, train, answers, config, device)
        return answers.read(_predict(network, scans, test, config.batch_size))

    return predict_held_out(known, learn, across=across)


def box_around(corpus: Corpus, rows: np.ndarray, stride: int) -> tuple[int, int, int]:
    """Return the smallest box, in whole multiples of `stride` voxels, that holds the foreground of each scan."""
    extent = np.max([corpus.foreground_box(row) @ (-1, 1) for row in rows], axis=0)
    x, y, z = (int(-(-size // stride) * stride) for size in extent)
    return x, y, z


@dataclass(frozen=True)
class _Scans:
    """The scans of a corpus in some rows, counted from 0, as the network sees them: (B, 1, X, Y, Z) of a box each."""

    corpus: Corpus
    rows: np.ndarray
    box: tuple[int, int, int]

    def central(self, numbers: np.ndarray) -> Tensor:
        """Read the boxes around the centres of the scans' foreground."""
        return torch.stack([self._read(number, np.zeros(3)) for number in numbers])

    def batches(self, numbers: np.ndarray, size: int, device: torch.device) -> Iterator[Tensor]:
        """Read them in batches of at most `size`, onto a device."""
        for part in np.split(numbers, range(size, len(numbers), size)):
            yield self.central(part).to(device)

    def augmented(self, numbers: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Read boxes a little off the centre, the hemispheres of every second scan swapped."""
        reach = np.array(self.box) * JITTER_SHARE
        scans = [self._read(number, rng.uniform(-reach, reach)) for number in numbers]
        axis = 1 + self.corpus.left_right_axis
        return torch.stack([scan.flip(axis) if rng.random() < 0.5 else scan for scan in scans])

    def _read(self, number: int, shift: np.ndarray) -> Tensor:
        row = self.rows[number]
        start = (self.corpus.foreground_box(row).sum(axis=1) - self.box) // 2 + shift.round().astype(int)
        return torch.from_numpy(self.corpus.read_patch(row, start, self.box).astype(np.float32))


def _train(
    pretrained: PretrainedEncoder,
    scans: _Scans,
    train: np.ndarray,
    answers: _Answers,
    config: FinetuningConfig,
    device: torch.device,
) -> ScanNetwork:
    """Train on the scans numbered in `train`; the network comes back in evaluation mode.

    Raises:
        UserError: a part of the network gets no gradient, or the loss is not finite.
    """
    torch.manual_seed(config.seed)
    network = ScanNetwork(_encoder(pretrained, config.scratch), answers.outputs).to(device).train()
    schedule = Schedule(
        steps=config.steps,
        freeze_steps=0 if config.scratch else round(FREEZE_SHARE * config.steps),
        warmup_steps=round(WARMUP_SHARE * config.steps),
        decay="cosine",
        restarts=False,
    )
    share = 1.0 if config.scratch else ENCODER_SHARE
    optimizer = build_optimizer(network, config.learning_rate, share * config.learning_rate)
    rates = StepSchedule(optimizer, schedule, epoch_steps=1)
    rng = np.random.default_rng(config.seed)
    with_trainable_encoder(network, schedule.freeze_steps == 0)
    for step, batch in enumerate(itertools.islice(_batches(train, config.batch_size, rng), config.steps)):
        if step == schedule.freeze_steps:
            with_trainable_encoder(network, True)
        rates.set_step(step)
        views = scans.augmented(batch, rng).to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(device)):
            loss = answers.loss(network(views), batch)
        if not torch.isfinite(loss):
            raise UserError(f"The loss is not finite at step {step}: train slower (--learning_rate), or look at scans.")
        loss.backward()
        if step in (0, schedule.freeze_steps):
            check_gradients({"encoder": network.encoder, "head": network.head})
        nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_CLIP["adamw"])
        optimizer.step()
    return network.settle(scans.batches(train, config.batch_size, device))


class _Answers:
    """What is to be learnt of scans as a network's output: a standardised number, or a logit for each class.

    Attributes:
        outputs: how many numbers the network has to give.
    """

    def __init__(self, target: ScanTarget, train: np.ndarray) -> None:
        self.target = target
        values = target.values[train]
        if target.task == "regression":
            self.outputs = 1
            self.mean, self.spread = float(values.mean()), max(float(values.std()), 1e-6)
            self.truth = torch.from_numpy((target.values - self.mean) / self.spread).float()
        else:
            self.outputs = len(target.classes)
            self.truth = torch.from_numpy(np.searchsorted(target.classes, target.values))
            counts = np.bincount(np.searchsorted(target.classes, values), minlength=self.outputs)
            self.weight = torch.from_numpy(len(values) / (self.outputs * np.maximum(counts, 1))).float()

    def loss(self, output: Tensor, rows: np.ndarray) -> Tensor:
        """Return the squared error, or the cross-entropy with classes weighted equally, of scans' outputs (B, K)."""
        truth = self.truth[torch.from_numpy(rows)].to(output.device)
        if self.target.task == "regression":
            return functional.mse_loss(output.float()[:, 0], truth)
        return functional.cross_entropy(output.float(), truth, self.weight.to(output.device))

    def read(self, output: Tensor) -> np.ndarray:
        """Return outputs (T, K) as a :data:`~nnunet_ssl.evaluation.scan_prediction.Learner` returns them."""
        if self.target.task == "regression":
            return output[:, 0].double().numpy() * self.spread + self.mean
        return output.double().softmax(dim=1).numpy()


def _encoder(pretrained: PretrainedEncoder, scratch: bool) -> nn.Module:
    """Build the encoder of a checkpoint for one channel, with its weights or with random ones."""
    encoder = build_encoder({**pretrained.architecture, "in_channels": 1})
    if not scratch:
        logger.debug("%s", encoders.load_encoder(encoder, pretrained))
    if isinstance(getattr(encoder, "mask_token", None), nn.Parameter):
        encoder.register_parameter("mask_token", None)  # nothing is hidden here, so no loss would reach it
    return encoder


def _batches(train: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield full batches of the scans in random order, again and again."""
    size = min(size, len(train))
    while True:
        order = rng.permutation(train)
        yield from (order[start : start + size] for start in range(0, len(order) - size + 1, size))


@torch.no_grad()
def _predict(network: ScanNetwork, scans: _Scans, numbers: np.ndarray, batch_size: int) -> Tensor:
    """Return the outputs (T, K) for the scans with these numbers, on the CPU."""
    device = next(network.parameters()).device
    return torch.cat([network(batch).cpu() for batch in scans.batches(numbers, batch_size, device)])
