"""Compare a corpus for pre-training with a labelled data set: origins, names, and the content of the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from nnunet_ssl.audit.fingerprints import Fingerprint, detail_in_common, similarities
from nnunet_ssl.audit.origins import known_origins, origins_in
from nnunet_ssl.audit.scans import LabelledCase, numbered_alike, same_names
from nnunet_ssl.corpus.workers import run_locally
from nnunet_ssl.errors import one_line
from nnunet_ssl.imaging.geometry import read_scan
from nnunet_ssl.live import live_line

ALIKE = 0.78
"""Correlation of fingerprints from which on two scans are looked at closely. Between 24 real scans of 10 heads, and the
same scans turned, resampled and with other intensities: two heads at most 0.73; two sessions of one head, one contrast,
0.86 to 0.98; one scan and its other edition 0.97 to 1."""

SAME_HEAD, SAME_SCAN = 0.65, 0.95
"""Detail in common. Two heads in one contrast: 0.25 to 0.31; two sessions of one head: 0.81 to 0.94; one scan and its
other edition: 0.96 to 1, less where slices are thick and the heads badly placed."""

_CLOSEST = 5  # of the corpus' subjects that are looked at for each labelled image, and of the scans of each

Verdict = Literal["same scan", "same head", "same name", "alike"]
LEAKS: tuple[Verdict, ...] = ("same scan", "same head", "same name")
"""The verdicts by which a subject is left out; of what is only alike, the list tells."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A labelled image and a scan of a corpus that belong together, and how that is known.

    Attributes:
        reason: why the images of a pair that is alike could not be looked at closely; else empty.
    """

    case: str
    verdict: Verdict
    subject: str
    scan_id: str
    similarity: float = float("nan")
    detail: float = float("nan")
    image: str = ""
    path: str = ""
    reason: str = ""


def shared_origins(scans: pd.DataFrame, raw: Path, cases: Sequence[LabelledCase]) -> dict[str, tuple[str, str]]:
    """Return the origins of which both sides speak: origin -> (why of the corpus, why of the labelled data set)."""
    texts = [name for name in ("dataset", "dataset_doi", "original_path", "old_path") if name in scans]
    corpus = origins_in({text for name in texts for text in scans[name].unique()})
    labelled = origins_in(
        {raw.name, *(case.name for case in cases), *_below(source for c in cases for source in c.sources)}
    )
    return {name: (corpus[name], labelled[name]) for name in corpus if name in labelled}


def _below(sources: Iterable[str]) -> set[str]:
    """Paths without the folders that all of them lie in, which are the user's own."""
    paths = [Path(path) for path in sources]
    if not paths:
        return set()
    shared = 0
    for parts in zip(*(path.parts[:-1] for path in paths)):
        if len(set(parts)) > 1:
            break
        shared += 1
    return {"/".join(path.parts[max(shared - 1, 0) :]) for path in paths}


def pairs_by_name(scans: pd.DataFrame, cases: Sequence[LabelledCase], origins: Mapping[str, object]) -> list[Pair]:
    """Find the scans of a corpus that have the name of a case's subject."""
    found = set(same_names(scans, cases))
    for name in origins:
        found |= set(numbered_alike(scans, cases, known_origins()[name]))
    return [_pair(scans, row, case, "same name") for case, row in sorted(found)]


def pairs_by_content(
    scans: pd.DataFrame,
    cases: Sequence[LabelledCase],
    corpus: Mapping[str, Fingerprint],
    labelled: Mapping[str, Fingerprint],
    processes: int = 1,
) -> list[Pair]:
    """Find the scans of a corpus that show what a labelled image shows, or the same head.

    Args:
        scans: of the corpus; column `path`.
        cases: of the labelled data set.
        corpus: fingerprints by path.
        labelled: fingerprints by path.
        processes: how many compare pairs at a time.
    """
    rows = [row for row, path in enumerate(scans["path"]) if path in corpus]
    images = [(case.name, str(path)) for case in cases for path in case.images if str(path) in labelled]
    if not rows or not images:
        return []
    candidates = _candidates(
        np.stack([labelled[path].values for _, path in images]),
        np.stack([corpus[scans["path"].iat[row]].values for row in rows]),
        scans["subject"].iloc[rows].tolist(),
    )
    tasks = []
    for image, place, similarity in candidates:
        case, path = images[image]
        pair = replace(_pair(scans, rows[place], case, "alike"), image=path, similarity=similarity)
        tasks.append(_Candidate(pair, labelled[path].matrix, corpus[pair.path].matrix))
    pairs = []
    with live_line("Pairs that are alike", len(tasks), unit="pair") as line:
        for task, outcome in run_locally(_detail_of, tasks, processes):
            pairs.append(_judged(task.pair, outcome))
            line.set_postfix(Counter(pair.verdict for pair in pairs), refresh=False)
            line.update()
    return sorted(pairs, key=lambda pair: (pair.case, pair.image, pair.scan_id))


@dataclass(frozen=True)
class _Candidate:
    pair: Pair
    image_matrix: np.ndarray
    path_matrix: np.ndarray


def _detail_of(candidate: _Candidate) -> float:
    image, scan = (read_scan(path) for path in (candidate.pair.image, candidate.pair.path))
    return detail_in_common(image, scan, (candidate.image_matrix, candidate.path_matrix))


def _judged(pair: Pair, detail: float | BaseException) -> Pair:
    """Give a pair its verdict; one whose images could not be compared stays alike, with the reason."""
    if isinstance(detail, BaseException):
        return replace(pair, reason=one_line(detail))
    verdict: Verdict = "same scan" if detail >= SAME_SCAN else "same head" if detail >= SAME_HEAD else "alike"
    return replace(pair, verdict=verdict, detail=detail)


def _candidates(
    labelled: np.ndarray, corpus: np.ndarray, subjects: Sequence[str], block: int = 4096
) -> list[tuple[int, int, float]]:
    """Return (labelled image, corpus scan, similarity) of the closest pairs that are alike, by labelled image.

    Closest are subjects: one head may be two subjects of a corpus, and have more scans as the first than are looked at.
    """
    found: dict[int, list[tuple[float, int]]] = {}
    for start in range(0, len(corpus), block):
        table = similarities(labelled, corpus[start : start + block])
        for image, place in np.argwhere(table >= ALIKE):
            found.setdefault(int(image), []).append((float(table[image, place]), start + int(place)))
    pairs = []
    for image in sorted(found):
        closest: dict[str, list[tuple[float, int]]] = {}
        for value, place in sorted(found[image], reverse=True):
            closest.setdefault(subjects[place], []).append((value, place))
        for scans in list(closest.values())[:_CLOSEST]:
            pairs += [(image, place, value) for value, place in scans[:_CLOSEST]]
    return pairs


def _pair(scans: pd.DataFrame, row: int, case: str, verdict: Verdict) -> Pair:
    subject, scan_id, path = (str(scans[name].iat[row]) for name in ("subject", "scan_id", "path"))
    return Pair(case=case, verdict=verdict, subject=subject, scan_id=scan_id, path=path)


def as_table(pairs: Sequence[Pair]) -> pd.DataFrame:
    """Return pairs as a table, a row each."""
    return pd.DataFrame([asdict(pair) for pair in pairs], columns=list(Pair.__dataclass_fields__))
