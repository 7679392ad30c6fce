"""Embeddings of scans and what is known of each scan: the input of alignment and probes, stored or freshly computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.results import read_table
from nnunet_ssl.files import written_beside

IDENTITY = ("patient_id", "session_id", "filename")
COLUMNS = (*IDENTITY, "modality", "embedding_index")


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """One vector per scan.

    Attributes:
        vectors: (N, D) float64, finite.
        scans: N rows of strings, at least patient_id, session_id, filename (together unique) and modality.
    """

    vectors: np.ndarray
    scans: pd.DataFrame

    def __post_init__(self) -> None:
        """Raise UserError where a vector is not finite: any measure would be of nothing."""
        broken = np.flatnonzero(~np.isfinite(self.vectors).all(axis=1))
        if len(broken):
            first = ", ".join(f"{name} {self.scans[name].iloc[broken[0]]}" for name in IDENTITY if name in self.scans)
            raise UserError(
                f"{len(broken)} of {len(self.vectors)} embeddings are not finite, the first that of {first}: the "
                "encoder or the scan holds numbers that are not finite or far too large."
            )

    def __len__(self) -> int:
        return len(self.scans)

    def where(self, rows: np.ndarray) -> Embeddings:
        """Keep the rows for which the boolean (N,) array is true."""
        return Embeddings(vectors=self.vectors[rows], scans=self.scans[rows].reset_index(drop=True))


def read_embeddings(vectors_path: Path, metadata_path: Path) -> Embeddings:
    """Read stored embeddings: an .npz with one array (N, D), and a CSV or TSV that says what each row is.

    The table has the columns filename, embedding_index (the row in the array), modality, patient_id and session_id;
    others are kept. A scan listed more than once, by patient, session and file name, counts once, as first listed.

    Raises:
        UserError: a file is missing or is not what is said above.
    """
    for path in (vectors_path, metadata_path):
        if not path.is_file():
            raise UserError(f"There is no file {path}.")
    vectors = _read_array(vectors_path)
    separator = "\t" if metadata_path.suffix == ".tsv" else ","
    scans = read_table(metadata_path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    if missing := [name for name in COLUMNS if name not in scans]:
        raise UserError(
            f"{metadata_path} lacks the column(s) {', '.join(missing)}. It must have {', '.join(COLUMNS)}; "
            f"it has {', '.join(scans.columns)}."
        )
    scans = scans.drop_duplicates(list(IDENTITY), ignore_index=True)
    index = pd.to_numeric(scans["embedding_index"], errors="coerce")
    if not index.isin(range(len(vectors))).all():
        wrong = scans.loc[~index.isin(range(len(vectors))), "embedding_index"].iloc[0]
        raise UserError(
            f"{metadata_path}: embedding_index '{wrong}' is no row of {vectors_path} ({len(vectors)} rows)."
        )
    return Embeddings(vectors=vectors[index.astype(int)], scans=scans.drop(columns="embedding_index"))


def write_embeddings(embeddings: Embeddings, folder: Path) -> None:
    """Write embeddings.npz and metadata.csv into `folder`, as :func:`read_embeddings` reads them."""
    with written_beside(folder / "embeddings.npz") as temporary:
        np.savez_compressed(temporary, embeddings=embeddings.vectors.astype(np.float32))
    with written_beside(folder / "metadata.csv") as temporary:
        embeddings.scans.assign(embedding_index=range(len(embeddings))).to_csv(temporary, index=False)


def _read_array(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise UserError(f"{path} is a bare array (.npy). Store it as .npz: numpy.savez(FILE, embeddings=array).")
        with loaded as arrays:
            names = [name for name in arrays if arrays[name].ndim == 2]
            if len(names) != 1:
                raise UserError(f"{path} must hold one array of shape (scans, dimensions); it holds {len(names)}.")
            vectors = arrays[names[0]].astype(np.float64)
    except UserError:
        raise
    except Exception as error:  # a damaged archive fails in zipfile, in zlib, or where numpy parses its headers
        raise UserError(f"{path} cannot be read as a .npz of embeddings: {error}.") from error
    if not np.isfinite(vectors).all():
        raise UserError(f"{path} has embeddings that are not finite, the first in row {_first_broken(vectors)}.")
    return vectors


def _first_broken(vectors: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
