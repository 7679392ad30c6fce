"""From the store to the training device: workers read the boxes that the drawn views need, and nothing else.

An example's random numbers derive from (seed, stream, step, place in the global batch), never from the worker that
happens to make it. So the k-th batch is the same for any number of workers and after a resume, and two ranks, or two
parts of a step, with half the batch each see together what one process sees at once.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import blosc2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nnunet_ssl.corpus.prepared import Corpus
from nnunet_ssl.corpus.store import UnreadableScan, read_box
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.interruption import exit_on_parents_signal, stop_signals_blocked
from nnunet_ssl.pretraining.views.augmentation import (
    AugmentationConfig,
    Intensities,
    RawBatch,
    draw_flip,
    draw_intensities,
    draw_matrix,
)
from nnunet_ssl.pretraining.views.sampling import (
    Kind,
    SamplingConfig,
    common_box,
    draw_centre,
    draw_jitter,
    example_table,
)
from nnunet_ssl.pretraining.views.spatial import source_box

ATTEMPTS = 20
"""Draws for one example before the training stops: that many failures in a row are no accident."""

DRAWS_BEFORE_JUDGEMENT = 200
"""One unreadable scan among the first few drawn is no large share yet."""

WORKER_DIED = (
    "A process that reads scans died, as happens when memory, or the shared memory in /dev/shm, runs out: give the job "
    "more memory, a container more shared memory (--shm-size 8g), or ask for fewer workers; --c goes on from the last "
    "checkpoint."
)

logger = logging.getLogger(__name__)


def make_loader(
    corpus: Corpus,
    *,
    kind: Kind,
    batch_size: int,
    patch_size: tuple[int, int, int],
    sampling: SamplingConfig,
    augmentation: AugmentationConfig,
    seed: int,
    only_unpaired: bool = False,
    stream: int = 0,
    rank: int = 0,
    parts: int = 1,
    start_step: int = 0,
    stop_step: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Batches:
    """Return the batches of one rank, from `start_step` on; workers start, and read ahead, once they are iterated.

    Args:
        corpus: the prepared scans to draw from.
        kind: "mcl": patches at the same place of two modalities of a session; "cl": two patches at the same place of
            one scan, from the scans that mcl draws; "mim": one patch of any scan.
        batch_size: examples per step on this rank, a multiple of `parts`.
        patch_size: voxels of a view along each axis.
        sampling: weights, jitter and the tolerated share of unreadable scans.
        augmentation: ranges and probabilities.
        seed: of the run.
        only_unpaired: mim draws only the scans that cannot enter a pair: the second stream of a combined recipe.
        stream: distinguishes the loaders of one run: other random numbers for the same seed.
        rank: of this process.
        parts: batches in which a step's examples come.
        start_step: the first step; a resumed run passes the number of steps it has done.
        stop_step: the first step not to be read for; None goes on for ever.
        workers: processes that read; 0 reads in this process.
        pin_memory: hand batches over in page-locked memory, for a training on a GPU.

    Raises:
        UserError: there is nothing to draw, or every scan is smaller than the patch. While iterating: too large a share
            of the scans drawn cannot be read.
    """
    dataset = ExampleReader(
        corpus,
        kind=kind,
        places=range(rank * batch_size, (rank + 1) * batch_size),
        parts=parts,
        patch_size=patch_size,
        sampling=sampling,
        augmentation=augmentation,
        seed=(seed, stream),
        only_unpaired=only_unpaired,
    )
    first = start_step * parts
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=itertools.count(first) if stop_step is None else range(first, stop_step * parts),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # Processes that torch.multiprocessing spawned would spawn workers too: seconds for each, and nothing shared.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    return Batches(loader, sampling.max_failed_share, corpus.how_to_mend)


@contextmanager
def lost_workers_explained() -> Iterator[None]:
    """Say in one sentence what torch says when a reading process has died.

    Its handler of SIGCHLD raises wherever the training happens to be, so this belongs around all of it.

    Raises:
        UserError: in place of the error about a worker or the thread that pins memory; others pass.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("DataLoader worker (pid", "Pin memory thread exited")):
            raise
        raise UserError(WORKER_DIED) from error


class Batches:
    """Iterate over batches, log the scans that could not be read, and stop when they are too many.

    Args:
        loader: yields what :class:`ExampleReader` returns.
        max_failed_share: of the scans drawn so far, taken as at least :data:`DRAWS_BEFORE_JUDGEMENT`.
        how_to_mend: what to do about files that cannot be read.
    """

    def __init__(self, loader: DataLoader[Read], max_failed_share: float, how_to_mend: str) -> None:
        self.loader = loader
        self.max_failed_share = max_failed_share
        self.how_to_mend = how_to_mend

    def __iter__(self) -> Iterator[RawBatch]:
        with stop_signals_blocked():
            reads = iter(self.loader)
        return self._judged(self._received(reads))

    @staticmethod
    def _received(reads: Iterator[Read]) -> Iterator[Read]:
        with lost_workers_explained():
            try:
                yield from reads
            except ConnectionError as error:  # the memory of a batch is handed over by the worker that filled it
                raise UserError(WORKER_DIED) from error

    def _judged(self, reads: Iterator[Read]) -> Iterator[RawBatch]:
        drawn = failed = 0
        for read in reads:
            drawn += read.drawn
            for failure in read.failures:
                failed += 1
                logger.warning("%s; another draw takes its place (failure %d).", failure, failed)
            if read.batch is None or failed > self.max_failed_share * max(drawn, DRAWS_BEFORE_JUDGEMENT):
                share = f"more than sampling.max_failed_share={self.max_failed_share:g} allows"
                raise UserError(
                    f"{failed} of the {drawn} scans drawn could not be read, "
                    f"{f'{ATTEMPTS} in a row' if read.batch is None else share}. The last: {read.failures[-1]}. "
                    f"{self.how_to_mend}"
                )
            yield read.batch


class Read(NamedTuple):
    """A batch and what it took to read it."""

    batch: RawBatch | None  # None: an example failed ATTEMPTS times
    drawn: int  # scans
    failures: list[str]  # "<path> cannot be read (<reason>)"


class View(NamedTuple):
    """One view as drawn: a scan, the part of it that is needed, and what is to be done to it."""

    row: int
    matrix: np.ndarray  # (3, 3)
    centre: np.ndarray  # (3,) voxels
    box: np.ndarray  # (3, 2) half-open voxel ranges
    intensities: Intensities


class ExampleReader(Dataset[Read]):
    """The batches of one rank by number: draws views, then reads the boxes they need.

    What it knows of the scans lies in a few flat arrays, which forked workers share however many scans there are.
    Arguments as of :func:`make_loader`; `places` are this rank's places in the global batch, `seed` is (seed, stream).
    Part k of step s is number ``s * parts + k``.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        kind: Kind,
        places: range,
        parts: int,
        patch_size: tuple[int, int, int],
        sampling: SamplingConfig,
        augmentation: AugmentationConfig,
        seed: tuple[int, int],
        only_unpaired: bool,
    ) -> None:
        self.table = example_table(corpus, kind, sampling, only_unpaired=only_unpaired)
        size = len(places) // parts
        self.places = [places[part * size : (part + 1) * size] for part in range(parts)]
        self.patch_size = patch_size
        self.jitter_mm = sampling.jitter_mm
        self.augmentation = augmentation
        self.seed = seed
        self.folder = corpus.folder
        self.spacing = corpus.spacing
        self.left_right_axis = corpus.left_right_axis
        scans = corpus.scans
        self.scan_ids = scans["scan_id"].to_numpy(bytes)
        self.subjects = scans["subject_index"].to_numpy(np.int64)
        self.sessions = scans["session_index"].to_numpy(np.int64)
        self.modalities = scans["modality"].cat.codes.to_numpy(np.int64)
        self.sizes = scans[["size_x", "size_y", "size_z"]].to_numpy(np.int32)
        self.boxes = scans[["x0", "x1", "y0", "y1", "z0", "z1"]].to_numpy(np.int32).reshape(-1, 3, 2)
        self._check_patch()

    def __getitem__(self, number: int) -> Read:
        step, part = divmod(number, len(self.places))
        examples, failures, drawn = [], [], 0
        for place in self.places[part]:
            for attempt in range(ATTEMPTS):
                views = self._draw(np.random.default_rng([*self.seed, step, place, attempt]))
                crops = []
                try:
                    for view in views:
                        drawn += 1
                        crops.append(self._read(view))
                except UnreadableScan as failure:
                    failures.append(str(failure))
                else:
                    examples.append(list(zip(views, crops)))
                    break
            else:
                return Read(None, drawn, failures)
        return Read(self._collate(examples, step), drawn, failures)

    def _draw(self, rng: np.random.Generator) -> list[View]:
        """Draw the views of one example: co-located, up to the jitter, each with its own affine map."""
        rows = self.table.draw(rng)
        centre = draw_centre(common_box(self.boxes[rows]), self.patch_size, rng)
        flip_axis = self.left_right_axis if draw_flip(self.augmentation, rng) else None
        views, matrix = [], None
        for number, row in enumerate(rows):
            if matrix is None or not self.augmentation.shared_affine:
                matrix = draw_matrix(self.augmentation, flip_axis, self.spacing, rng)
            shift = draw_jitter(self.jitter_mm, self.spacing, rng) if number else 0.0
            box = source_box(matrix, centre + shift, self.patch_size, self.sizes[row])
            views.append(View(int(row), matrix, centre + shift, box, draw_intensities(self.augmentation, rng)))
        return views

    def _read(self, view: View) -> np.ndarray:
        """Decompress the box of a view, (X, Y, Z)."""
        path = self.folder / f"{self.scan_ids[view.row].decode()}.b2nd"
        return read_box(path, self.sizes[view.row], view.box)

    def _collate(self, examples: Sequence[Sequence[tuple[View, np.ndarray]]], step: int) -> RawBatch:
        """Lay the views one after the other, those of view 0 first."""
        views, crops = zip(*(read for of_one_view in zip(*examples) for read in of_one_view))
        rows = np.array([view.row for view in views]).reshape(-1, len(examples))
        return RawBatch(
            voxels=_half_in_one_piece(crops),
            sizes=np.array([crop.shape for crop in crops]),
            matrices=np.array([view.matrix for view in views]),
            centres=np.array([view.centre for view in views]),
            origins=np.array([view.box[:, 0] for view in views]),
            intensities=[view.intensities for view in views],
            patch_size=self.patch_size,
            subject=self.subjects[rows[0]],
            session=self.sessions[rows[0]],
            modality=self.modalities[rows],
            scan_ids=[[self.scan_ids[row].decode() for row in view_rows] for view_rows in rows],
            step=step,
        )

    def _check_patch(self) -> None:
        sizes = self.sizes[np.unique(self.table.rows)]
        if (sizes < self.patch_size).all():
            raise UserError(
                f"Every scan is smaller, along every axis, than patch_size {list(self.patch_size)}; the largest has "
                f"{sizes[sizes.prod(axis=1).argmax()].tolist()} voxels. Choose a smaller patch_size, or prepare the "
                "corpus with a smaller --spacing."
            )


def _half_in_one_piece(crops: Sequence[np.ndarray]) -> torch.Tensor:
    """Copy crops into one flat float16 tensor. Stores hold float16; torch rounds others much faster than numpy."""
    voxels = torch.empty(sum(crop.size for crop in crops), dtype=torch.float16)
    for piece, crop in zip(voxels.split([crop.size for crop in crops]), crops):
        piece.view(crop.shape).copy_(torch.from_numpy(crop))
    return voxels


def _start_worker(worker: int) -> None:
    """Workers are many, so they have one thread each; requests to stop are the business of the training."""
    exit_on_parents_signal()
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
