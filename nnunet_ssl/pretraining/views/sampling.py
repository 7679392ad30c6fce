"""Which scans make a training example, and where in them the patch lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from nnunet_ssl.corpus.modalities import MODALITIES
from nnunet_ssl.corpus.prepared import Corpus
from nnunet_ssl.errors import UserError
from nnunet_ssl.typed import ranged

Kind = Literal["mcl", "cl", "mim"]

PAIRS, UNPAIRED, MASKS, LESIONS, CELLS = range(5)
"""Streams of random numbers: what is drawn for one thing says nothing of what is drawn for another."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How often each scan is drawn, and how far apart the two views of a pair may lie."""

    weighting: Literal["scan", "session", "source"] = "session"  # what is drawn alike: every scan (for pairs: sessions
    # by their number of scans), every session, or every source data set: there a large one does not drown a small one
    balanced_modalities: bool = False  # every modality (mim) or pair of modalities (mcl, cl) equally often
    jitter_mm: float = ranged(0.0, "0 or more")  # the centres of two views are at most so far apart, uniform in a ball
    max_failed_share: float = ranged(0.05, "between 0 and 1")  # if more of the scans drawn (at least 200) cannot
    # be read, the training stops


@dataclass(frozen=True)
class ExampleTable:
    """Every example that can be drawn, with its probability.

    A few flat arrays and no Python objects, so that forked workers share its memory however many scans there are.
    """

    rows: np.ndarray  # (n, 1) scans, or (n, 2) pairs of scans of different modality: row numbers of the corpus
    cumulative: np.ndarray  # (n,) running sum of their probabilities
    same_scan: bool  # both views from one scan of the pair (cl)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return the row number of the scan behind each view: (1,) for single scans, (2,) for pairs.

        The order of a pair is random. For `same_scan` one of the two is taken twice, so that cl meets every scan
        exactly as often as mcl does and the two recipes differ in nothing but the pairing.
        """
        entry = np.searchsorted(self.cumulative, rng.random() * self.cumulative[-1], side="right")
        rows = rng.permutation(self.rows[min(entry, len(self.rows) - 1)])
        return rows[[0, 0]] if self.same_scan else rows


def example_table(corpus: Corpus, kind: Kind, config: SamplingConfig, *, only_unpaired: bool = False) -> ExampleTable:
    """List the examples that `kind` can draw from `corpus`.

    Args:
        corpus: the prepared scans.
        kind: "mcl" and "cl" draw pairs of different modality from one session and place, "mim" single scans.
        config: the weights.
        only_unpaired: for "mim", draw only scans that cannot enter a pair: the second stream of a combined recipe.

    Raises:
        UserError: there is nothing to draw.
    """
    paired, unpaired = corpus.paired_scans(), corpus.unpaired_scans()
    if kind == "mim":
        entries = _single_scans(_columns(corpus.scans.loc[unpaired] if only_unpaired else corpus.scans))
    else:
        entries = _modality_pairs(_columns(corpus.scans.loc[paired]))
    if entries.empty:
        raise UserError(_nothing_to_draw(corpus, kind, only_unpaired))
    probability = _probabilities(entries, config)
    return ExampleTable(
        rows=entries.filter(like="row").to_numpy(np.int64),
        cumulative=np.cumsum(probability),
        same_scan=kind == "cl",
    )


def _columns(scans: pd.DataFrame) -> pd.DataFrame:
    """What the weights need to know of each scan."""
    return pd.DataFrame(
        {
            "row": scans.index,
            "source": scans["dataset"].to_numpy(),
            "session": scans["session_index"].to_numpy(),
            "place": scans["place_index"].to_numpy(),
            "modality": scans["modality"].cat.codes.to_numpy(np.int64),
            "scans": scans.groupby("session_index")["scan_id"].transform("size").to_numpy(),
        }
    )


def _single_scans(scans: pd.DataFrame) -> pd.DataFrame:
    """One entry per scan; the scans of a session share its weight equally."""
    return scans.assign(group=scans["modality"], share=1.0 / scans["scans"])


def _modality_pairs(scans: pd.DataFrame) -> pd.DataFrame:
    """One entry per pair of scans of different modality that lie in one place.

    The pairs of modalities of a session share its weight equally, and so do repeats within a pair of modalities: six
    repeats of a DWI do not push the T1 aside.
    """
    others = scans[["place", "row", "modality"]]
    pairs = scans.merge(others, on="place", suffixes=("", "_other"))
    pairs = pairs[pairs["modality"] < pairs["modality_other"]]
    pairs = pairs.assign(group=pairs["modality"] * len(MODALITIES) + pairs["modality_other"])
    groups = pairs.groupby("session")["group"].transform("nunique")
    repeats = pairs.groupby(["session", "group"])["group"].transform("size")
    return pairs.assign(share=1.0 / (groups * repeats))


def _probabilities(entries: pd.DataFrame, config: SamplingConfig) -> np.ndarray:
    """The probability of each entry: its session's weight times its share of the session, then balanced and normed."""
    if config.weighting == "scan":
        session_weight = entries["scans"]
    elif config.weighting == "session":
        session_weight = 1.0
    else:
        session_weight = 1.0 / entries.groupby("source")["session"].transform("nunique")
    weight = session_weight * entries["share"]
    if config.balanced_modalities:
        weight = weight / weight.groupby(entries["group"]).transform("sum")
    return (weight / weight.sum()).to_numpy(np.float64)


def _nothing_to_draw(corpus: Corpus, kind: Kind, only_unpaired: bool) -> str:
    scans = corpus.scans
    found = (
        f"{scans['subject_index'].nunique()} subjects, {scans['session_index'].nunique()} sessions, "
        f"{len(scans)} scans found in {corpus.folder}"
    )
    if kind != "mim":
        return (
            f"No session has two different known modalities in one place: {kind} needs co-registered pairs ({found}). "
            "Use the recipe mim, prepare with --register rigid if the manifest's column agreement tells of scans that "
            "lie apart, or index a corpus in which sessions hold more than one modality."
        )
    if only_unpaired:
        return f"Every scan can enter a pair, so none is left for a stream of unpaired scans ({found})."
    return f"The corpus is empty ({found}). Prepare it with nnssl_prepare."


def common_box(boxes: np.ndarray) -> np.ndarray:
    """The part that all foreground boxes share, and the first box along an axis on which they do not meet.

    Args:
        boxes: (V, 3, 2) half-open voxel ranges on one grid.

    Returns:
        (3, 2) half-open voxel ranges.
    """
    low, high = boxes[:, :, 0].max(axis=0), boxes[:, :, 1].min(axis=0)
    meets = (low < high)[:, None]
    return np.where(meets, np.stack([low, high], axis=1), boxes[0])


def draw_centre(box: np.ndarray, patch_size: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Draw where the centre of the patch lies, in voxels (a patch of even size is centred between two voxels).

    Along an axis on which the box is larger than the patch, the patch lies anywhere inside the box; on which it is
    smaller, the patch contains the box. So a patch always shows as much brain as it can.
    """
    size = np.asarray(patch_size)
    ends = np.sort(np.stack([box[:, 0], box[:, 1] - size]), axis=0)
    start = rng.integers(ends[0], ends[1], endpoint=True)
    return start + (size - 1) / 2


def draw_jitter(radius_mm: float, spacing: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Draw a displacement, uniform in a ball of `radius_mm`; returned in voxels."""
    direction = rng.standard_normal(3)
    length = radius_mm * rng.random() ** (1 / 3)
    return length * direction / np.linalg.norm(direction) / np.asarray(spacing)
