"""What a recipe looks at: its pairs or single scans, the scans that cannot pair, and the masks."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.corpus.prepared import Corpus
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining import distributed
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.pretraining.objectives.base import Examples
from nnunet_ssl.pretraining.objectives.masked import bottleneck_grid, draw_masks
from nnunet_ssl.pretraining.views.augmentation import Batch, augment
from nnunet_ssl.pretraining.views.loading import make_loader
from nnunet_ssl.pretraining.views.sampling import MASKS, PAIRS, UNPAIRED
from nnunet_ssl.pretraining.views.transfer import send


class Stream:
    """An endless iterator over this rank's :class:`Examples`, step by step, each step in `accumulation` parts.

    What a step sees is the same for one seed, in however many parts and processes it comes.

    Args:
        corpus: the scans to draw from.
        config: the recipe.
        device: where views are augmented.
        start: the first step: a resumed run passes the number of steps it has done.
        workers: processes that read.

    Raises:
        UserError: the corpus has nothing to draw for this recipe, or batches cannot be shared out evenly.
    """

    def __init__(
        self, corpus: Corpus, config: PretrainingConfig, *, device: torch.device, start: int, workers: int
    ) -> None:
        self.config = config
        self.device = device
        self._parts = itertools.cycle(range(config.accumulation))
        self.waited = 0.0  # seconds in which there was nothing to do but wait for the workers
        load = functools.partial(
            make_loader,
            corpus,
            patch_size=config.patch_size,
            sampling=config.sampling,
            augmentation=config.augmentation,
            seed=config.seed,
            rank=distributed.rank(),
            parts=config.accumulation,
            start_step=start,
            pin_memory=device.type == "cuda",
        )
        self._batches = iter(
            load(
                kind=config.pairs or "mim",
                batch_size=share_of(config.batch_size, config, "batch_size"),
                stream=PAIRS,
                workers=workers,
            )
        )
        self._unpaired = None
        if has_unpaired_stream(corpus, config):
            self._unpaired = iter(
                load(
                    kind="mim",
                    only_unpaired=True,
                    batch_size=share_of(config.masked.unpaired_batch_size, config, "masked.unpaired_batch_size"),
                    stream=UNPAIRED,
                    workers=min(1, workers),
                )
            )

    def __iter__(self) -> Iterator[Examples]:
        return self

    def __next__(self) -> Examples:
        started = time.perf_counter()
        raw = [next(batches) for batches in (self._batches, self._unpaired) if batches is not None]
        self.waited += time.perf_counter() - started
        batch, *rest = [augment(one, self.device) for one in raw]
        unpaired = rest[0] if rest else None
        part, mask = next(self._parts), None
        if self.config.has_masked:
            mask = torch.cat([self._masks(stream, one, part) for stream, one in enumerate([batch, *rest])])
        return Examples(batch=batch, unpaired=unpaired, mask=mask, first=self._first(batch, part))

    def _first(self, batch: Batch, part: int) -> int:
        """The place of this part's first example in the batch of the whole step."""
        return (distributed.rank() * self.config.accumulation + part) * batch.views.shape[1]

    def _masks(self, stream: int, batch: Batch, part: int) -> Tensor:
        """The masks of a batch's views, (V * B, *grid): this part's share of those of the whole step."""
        views, count = batch.views.shape[:2]
        everyone = count * self.config.accumulation * distributed.world_size()
        seed = np.random.SeedSequence([self.config.seed, MASKS, stream, batch.step]).generate_state(1)[0]
        grid = bottleneck_grid(self.config.patch_size, self.config.stride)
        generator = torch.Generator().manual_seed(int(seed))
        masks = draw_masks(views * everyone, grid, self.config.masked.ratio, generator)
        first = self._first(batch, part)
        own = masks.unflatten(0, (views, everyone))[:, first : first + count]
        return send(own.flatten(0, 1), self.device)


def has_unpaired_stream(corpus: Corpus, config: PretrainingConfig) -> bool:
    """Whether scans that cannot form a pair are left for the objectives with masks."""
    wanted = config.pairs is not None and config.has_masked and config.masked.unpaired_batch_size > 0
    return wanted and len(corpus.unpaired_scans()) > 0


def share_of(batch_size: int, config: PretrainingConfig, name: str) -> int:
    """A rank's examples in a step.

    Raises:
        UserError: processes and parts do not divide the batch.
    """
    parts = distributed.world_size() * config.accumulation
    if batch_size % parts:
        raise UserError(
            f"{name}={batch_size} cannot be shared by {distributed.world_size()} processes in {config.accumulation} "
            f"parts: choose a multiple of {parts}."
        )
    return batch_size // distributed.world_size()
