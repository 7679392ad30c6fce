"""A prepared corpus as the training loop sees it: subjects, their sessions, the sessions' scans."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_ssl.corpus.modalities import MODALITIES, UNKNOWN
from nnunet_ssl.corpus.naming import names_of
from nnunet_ssl.corpus.store import UnreadableScan, padded_patch, read_box
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import dataset_folder

logger = logging.getLogger(__name__)


def open_corpus(dataset: int | str) -> Corpus:
    """Open the corpus that ``nnssl_prepare`` wrote for `dataset`, an id (500) or a name (Dataset500_FOMO60K).

    Raises:
        UserError: nnUNet_preprocessed is not set, or the data set has not been prepared (to the end).
    """
    folder = dataset_folder(dataset, "nnUNet_preprocessed")
    names = names_of(folder)
    if not names.manifest.is_file() or not names.plans.is_file():
        raise UserError(
            f"{folder.name} has no finished pre-training store in {folder} ({names.manifest.name} and "
            f"{names.plans.name} are its signs). Run, or run to the end: nnssl_prepare -d {dataset}"
        )
    scans = read_manifest(names.manifest)
    if scans.empty:
        raise UserError(
            f"{names.manifest} lists no scan: every scan failed. The reasons are in {folder / 'failures.tsv'}."
        )
    return Corpus(names.cases, number_rows(scans), json.loads(names.plans.read_text())["preprocessing"])


def read_manifest(path: Path) -> pd.DataFrame:
    """Read a manifest.tsv: numbers in the columns that hold them (NaN: not known), strings in the others ("")."""
    scans = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    numeric = scans.columns.intersection(["repeat", "age", "foreground", "nan_voxels"])
    return scans.assign(**{name: pd.to_numeric(scans[name], errors="coerce") for name in numeric})


def number_rows(scans: pd.DataFrame) -> pd.DataFrame:
    """Add what a sampler computes with: subject_index, session_index, place_index (the scans of a session that lie in
    one place), and shape and bbox as integer columns."""
    sizes = scans["shape"].str.split(",", expand=True).astype(np.int32)
    bounds = scans["bbox"].str.split(",", expand=True).astype(np.int32)
    columns = dict(zip(("size_x", "size_y", "size_z"), (sizes[axis] for axis in range(3))))
    columns |= dict(zip(("x0", "x1", "y0", "y1", "z0", "z1"), (bounds[side] for side in range(6))))
    return scans.assign(
        subject_index=pd.factorize(scans["subject"], sort=True)[0],
        session_index=pd.factorize(scans["session"], sort=True)[0],
        place_index=pd.factorize(_places(scans), sort=True)[0],
        modality=pd.Categorical(scans["modality"], categories=MODALITIES),
        **columns,
    )


def _places(scans: pd.DataFrame) -> pd.Series:
    """Name where each scan lies: scans of one name share a grid. Where nobody looked, the session is the place."""
    if "aligned_to" not in scans:
        return scans["session"]
    return scans["session"] + "\t" + scans["aligned_to"].fillna("")


class Corpus:
    """The scans of a prepared store, or of one side of its split.

    Arrays on disk are (1, X, Y, Z) in nnU-Net's own axis order for RAS images: X runs from inferior to superior, Y from
    posterior to anterior, Z from left to right, as stock nnU-Net's fine-tuning will see them. So the left-right axis is
    the last one (:attr:`left_right_axis`).

    Attributes:
        folder: where the .b2nd files lie.
        scans: the manifest, rows 0..n-1, with ``subject_index``, ``session_index`` and ``place_index`` (numbers in the
            whole corpus: the two sides of a split keep them), ``size_x..z`` (voxels) and ``x0..z1`` (the foreground's
            box, half open).
        preprocessing: what was done to the scans; JSON types only, so that it can travel in a checkpoint.
    """

    left_right_axis = 2
    """The spatial axis (of X, Y, Z = 0, 1, 2) that runs through the two hemispheres."""

    def __init__(self, folder: Path, scans: pd.DataFrame, preprocessing: dict[str, Any]) -> None:
        self.folder = folder
        self.scans = scans.reset_index(drop=True)
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.scans)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm, in the order of the arrays' axes."""
        return tuple(self.preprocessing["spacing"])

    def path(self, row: int) -> Path:
        """The .b2nd file of a scan."""
        return self.folder / f"{self.scans['scan_id'].iat[row]}.b2nd"

    def foreground_box(self, row: int) -> np.ndarray:
        """The bounds (3, 2) of a scan's foreground in voxels, half open."""
        return self.scans[["x0", "x1", "y0", "y1", "z0", "z1"]].iloc[row].to_numpy(int).reshape(3, 2)

    def read_patch(self, row: int, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Read (1, *size) voxels from `start` on; beyond the volume its edge repeats.

        Raises:
            UnreadableScan: the scan's file is missing or damaged.
        """
        shape = self.scans[["size_x", "size_y", "size_z"]].iloc[row].to_numpy(int)
        return padded_patch(lambda box: read_box(self.path(row), shape, box), shape, start, size)[None]

    def read_central_patch(self, row: int, size: Sequence[int]) -> np.ndarray:
        """Read (1, *size) voxels around the centre of a scan's foreground; beyond the volume its edge repeats."""
        return self.read_patch(row, (self.foreground_box(row).sum(axis=1) - size) // 2, size)

    def readable(self) -> Corpus:
        """The scans whose files can be opened, judged by a voxel of each; the others are left out, with a warning.

        Raises:
            UserError: not one can be opened.
        """
        failures = {}
        for row in range(len(self)):
            try:
                self.read_central_patch(row, (1, 1, 1))
            except UnreadableScan as failure:
                failures[row] = failure
        self.warn_of_unreadable(list(failures.values()), len(self))
        return self._subset(~self.scans.index.isin(failures)) if failures else self

    def warn_of_unreadable(self, failures: Sequence[UnreadableScan], wanted: int) -> None:
        """Warn that so many of the `wanted` scans cannot be read and are left out.

        Raises:
            UserError: they are all.
        """
        if failures and len(failures) == wanted:
            raise UserError(f"Not one of {wanted} scans can be read. The first: {failures[0]}. {self.how_to_mend}")
        for failure in failures:
            logger.warning("%s; the scan is left out.", failure)
        if failures:
            logger.warning("%d of %d scans are left out, unreadable. %s", len(failures), wanted, self.how_to_mend)

    @property
    def how_to_mend(self) -> str:
        """What to do about files that cannot be read."""
        return (
            "Is the disk still there? Damaged files are mended by deleting them and running the store's nnssl_prepare "
            f"-d {self.folder.parent.name} again."
        )

    def split(self, validation_fraction: float = 0.02, seed: int = 0) -> tuple[Corpus, Corpus]:
        """Split by subject into training and validation, at least one subject on each side.

        A subject's side depends on its name, the seed and the number of subjects, not on their order, so a corpus that
        grows keeps most of its validation subjects. A corpus of one subject is its own validation set, with a warning.
        """
        names = pd.unique(self.scans["subject"])
        if len(names) == 1:
            logger.warning("The corpus has a single subject, %s: it serves for training and for validation.", names[0])
            return self, self
        names = sorted(names, key=lambda name: hashlib.blake2b(f"{seed} {name}".encode()).digest())
        count = min(max(1, round(validation_fraction * len(names))), len(names) - 1)
        validation = self.scans["subject"].isin(names[:count])
        return self._subset(~validation), self._subset(validation)

    def _subset(self, rows: pd.Series | np.ndarray) -> Corpus:
        return Corpus(self.folder, self.scans[rows], self.preprocessing)

    def paired_scans(self) -> np.ndarray:
        """Row numbers of the scans that can enter a cross-modality pair, session by session: those of known modality
        that lie in one place with another such modality."""
        known = self.scans[self.scans["modality"] != UNKNOWN]
        modalities = known.groupby("place_index")["modality"].nunique()
        paired = known[known["place_index"].isin(modalities.index[modalities >= 2])]
        return paired.sort_values(["session_index", "modality", "repeat"], kind="stable").index.to_numpy(np.int64)

    def unpaired_scans(self) -> np.ndarray:
        """Row numbers of the scans that can enter no cross-modality pair: they serve masked image modelling alone."""
        return np.setdiff1d(np.arange(len(self.scans)), self.paired_scans())

    def summary(self) -> dict[str, Any]:
        """Counts of subjects, sessions and scans; see :func:`summarize`."""
        return summarize(self.scans)


def summarize(scans: pd.DataFrame) -> dict[str, Any]:
    """Count a manifest, raw or prepared.

    ``sessions_mcl`` have two different known modalities in one place. ``sessions_cl`` is the same number, because CL
    draws from the sessions of MCL (for a fair comparison); the other sessions serve masked image modelling only.

    ``pairs`` are the pairs of scans of different known modality in one session, and ``pairs_apart`` those among them
    that preparation found not to lie in one place; both are there only if it looked.
    """
    known = scans.assign(modality=scans["modality"].astype(str), place=_places(scans))
    known = known[known["modality"] != UNKNOWN]
    in_one_place = known.groupby("place").agg(session=("session", "first"), modalities=("modality", "nunique"))
    paired = in_one_place.loc[in_one_place["modalities"] >= 2, "session"].nunique()
    looked_at = known[known["aligned_to"].fillna("") != ""] if "aligned_to" in known else known[:0]
    pairs = _count_pairs(looked_at, "session")
    sessions = scans["session"].nunique()
    counts = scans["modality"].astype(str).value_counts()
    return {
        "subjects": scans["subject"].nunique(),
        "sessions": sessions,
        "scans": len(scans),
        "scans_by_modality": {name: int(counts[name]) for name in MODALITIES if name in counts},
        "sessions_mcl": paired,
        "sessions_cl": paired,
        "sessions_mim_only": sessions - paired,
        **({"pairs": pairs, "pairs_apart": pairs - _count_pairs(looked_at, "place")} if pairs else {}),
    }


def _count_pairs(scans: pd.DataFrame, by: str) -> int:
    """Count the pairs of scans of different modality with the same value in the column `by`."""

    def pairs(sizes: pd.Series) -> int:
        return int((sizes * (sizes - 1) // 2).sum())

    return pairs(scans.groupby(by).size()) - pairs(scans.groupby([by, "modality"]).size())


def describe_corpus(summary: dict[str, Any]) -> str:
    """Write a summary as the few lines that the commands print at their end."""
    by_modality = ", ".join(f"{name} {count:,}" for name, count in summary["scans_by_modality"].items())
    lines = [
        f"{summary['subjects']:,} subjects, {summary['sessions']:,} sessions, {summary['scans']:,} scans"
        f"{f' ({by_modality})' if by_modality else ''}",
        f"sessions usable for MCL (two modalities): {summary['sessions_mcl']:,}; "
        f"for CL (the same): {summary['sessions_cl']:,}; for MIM only: {summary['sessions_mim_only']:,}",
    ]
    if "pairs" in summary:
        apart = summary["pairs_apart"]
        lines.append(
            f"pairs of two modalities in one session: {summary['pairs']:,}; "
            + (f"{apart:,} of them do not lie in one place and serve MIM only" if apart else "all lie in one place")
        )
    return "\n".join(lines)
