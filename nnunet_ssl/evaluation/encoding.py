"""From a checkpoint and a prepared corpus to one embedding per scan."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from nnunet_ssl.corpus.prepared import Corpus, open_corpus
from nnunet_ssl.corpus.store import UnreadableScan
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.embeddings import Embeddings
from nnunet_ssl.interface.encoders import View, load_encoder, patch_starts, pooled_bottleneck
from nnunet_ssl.weights.pretrained import PretrainedEncoder

INTERNAL_COLUMNS = (
    *("scan_id", "subject", "session", "shape", "bbox", "subject_index", "session_index", "place_index"),
    *("x0", "x1", "y0", "y1", "z0", "z1", "size_x", "size_y", "size_z"),
)
"""Of a corpus' manifest, what says where a scan lies; the rest says what it is, and stays with its embedding."""

Subjects = Literal["all", "validation"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """What of a scan is shown to the encoder, and which scans.

    Attributes:
        view: "centre", one patch around the centre of the foreground's box, as the paper does; "tiles", patches evenly
            spaced over the whole box, whose embeddings are averaged.
        patch_size: voxels; None takes the pre-training's, or 96^3 where the checkpoint does not tell.
        subjects: "all", or the "validation" subjects that the pre-training held out of this corpus.
        max_subjects: at most so many subjects, drawn with a fixed seed; measures compare all pairs of scans.
        batch_size: patches at a time.
    """

    view: View = "centre"
    patch_size: tuple[int, int, int] | None = None
    subjects: Subjects = "all"
    max_subjects: int = 500
    batch_size: int = 4


def embed_corpus(checkpoint: Path, dataset: int | str, config: EncodingConfig, device: torch.device) -> Embeddings:
    """Embed the scans of a prepared corpus; those that cannot be read are left out, with a warning.

    An embedding is the encoder's bottleneck (its last map, stride 32) averaged over space, before any projection head:
    the quantity whose distances arXiv 2511.11311 publishes.

    Args:
        checkpoint: what ``nnssl_weights`` reads, or the folder of a finished pre-training.

    Raises:
        UserError: the checkpoint or the corpus cannot be read, or not one of its scans.
    """
    encoder = load_encoder(checkpoint, device)
    corpus = open_corpus(dataset)
    compare_preprocessing(encoder.pretrained, corpus)
    rows = choose_rows(corpus, encoder.pretrained, config)
    patch_size = config.patch_size or encoder.patch_size
    rows, vectors = encode_scans(encoder.network, corpus, rows, patch_size, config)
    return Embeddings(vectors=vectors, scans=describe_scans(corpus, rows))


def describe_scans(corpus: Corpus, rows: np.ndarray) -> pd.DataFrame:
    """Return what the manifest knows of the scans in `rows`, as strings: who they are of, and what they are."""
    scans = corpus.scans.loc[rows].reset_index(drop=True)
    identity = scans[["subject", "session", "scan_id"]].set_axis(["patient_id", "session_id", "filename"], axis=1)
    elsewhere = [*INTERNAL_COLUMNS, *scans.columns.intersection(identity.columns)]  # a table may name a patient_id, too
    known = scans.drop(columns=elsewhere).astype(object)
    return identity.join(known.where(known.notna(), "").astype(str))


def choose_rows(corpus: Corpus, pretrained: PretrainedEncoder, config: EncodingConfig) -> np.ndarray:
    """Return the row numbers of the scans to embed, in the corpus' order.

    Raises:
        UserError: the validation subjects are wanted, and the checkpoint does not say which those were.
    """
    scans = corpus.scans
    if config.subjects == "validation":
        try:
            settings = pretrained.metadata["config"]
            fraction, seed = settings["validation"]["fraction"], settings["seed"]
        except KeyError:
            raise UserError(
                f"A checkpoint of {pretrained.origin} without its pre-training's configuration does not say which "
                "subjects were held out: take all of them (--subjects all; in a study, subjects: all)."
            ) from None
        _, validation = corpus.split(fraction, seed)
        then, now = (pretrained.metadata.get("corpus") or {}).get("subjects"), scans["subject"].nunique()
        if then not in (None, now):
            logger.warning(
                "The corpus of the pre-training had %d subjects, and this one has %d: unless it is another corpus, "
                "some of those that are taken for held out may have been trained on.",
                *(then, now),
            )
        scans = scans[scans["scan_id"].isin(validation.scans["scan_id"])]
    names = np.unique(scans["subject"].to_numpy(str))
    if len(names) > config.max_subjects:
        logger.info("%d of %d subjects are drawn (--max_subjects).", config.max_subjects, len(names))
        names = np.random.default_rng(0).choice(names, config.max_subjects, replace=False)
    return scans.index[scans["subject"].isin(names)].to_numpy()


def encode_scans(
    network: nn.Module, corpus: Corpus, rows: np.ndarray, patch_size: tuple[int, int, int], config: EncodingConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Embed the scans in `rows` that can be read.

    Returns:
        their row numbers (N,), and the pooled bottleneck of each, averaged over its patches, (N, D).

    Raises:
        UserError: not one of them can be read.
    """
    places = [
        (place, start)
        for place, row in enumerate(rows)
        for start in patch_starts(corpus.foreground_box(row), patch_size, config.view)
    ]
    progress = tqdm(total=len(places), desc="embedding patches", disable=None)
    failures: dict[int, UnreadableScan] = {}
    patches = _read_patches(corpus, rows, places, patch_size, failures)
    sums, counts = None, np.zeros(len(rows))
    while batch := list(itertools.islice(patches, config.batch_size)):
        owners = np.array([place for place, _ in batch])
        pooled = pooled_bottleneck(network, torch.from_numpy(np.stack([patch for _, patch in batch])))
        sums = np.zeros((len(rows), pooled.shape[1])) if sums is None else sums
        np.add.at(sums, owners, pooled)
        np.add.at(counts, owners, 1)
        progress.update(len(batch))
    progress.close()
    corpus.warn_of_unreadable(list(failures.values()), len(rows))
    assert sums is not None, "some scan could be read"
    good = ~np.isin(np.arange(len(rows)), list(failures))
    return rows[good], sums[good] / counts[good, None]


def _read_patches(
    corpus: Corpus,
    rows: np.ndarray,
    places: list[tuple[int, tuple[int, int, int]]],
    patch_size: tuple[int, int, int],
    failures: dict[int, UnreadableScan],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each scan's place in `rows` with one of its patches; scans that cannot be read go to `failures`."""
    for place, start in places:
        if place not in failures:
            try:
                yield place, corpus.read_patch(rows[place], start, patch_size)
            except UnreadableScan as failure:
                failures[place] = failure


def compare_preprocessing(pretrained: PretrainedEncoder, corpus: Corpus) -> None:
    """Warn where a corpus is not prepared as that of a pre-training."""
    theirs, ours = pretrained.preprocessing, corpus.preprocessing
    different = sorted(key for key in ours if theirs and theirs.get(key) != ours[key])
    if different:
        logger.warning(
            "The corpus is not prepared as the checkpoint's was: %s differ. What is measured is what the encoder sees.",
            ", ".join(different),
        )
