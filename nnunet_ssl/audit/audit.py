"""An audit from its beginning to its end: what is compared, what is found, and the files that say so."""

from __future__ import annotations

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_ssl.audit.comparison import LEAKS, Pair, as_table, pairs_by_content, pairs_by_name, shared_origins
from nnunet_ssl.audit.scans import labelled_cases
from nnunet_ssl.audit.store import Prints, fingerprints_of
from nnunet_ssl.corpus.indexing import EXCLUSIONS, read_exclusions, read_index, standing_exclusions, without
from nnunet_ssl.files import written_beside
from nnunet_ssl.nnunet_folders import dataset_folder

AUDITS = "audits"
"""The folder beside a corpus' manifest that holds, for each labelled data set, what was found."""

FINGERPRINTS = "fingerprints"
VERDICT = "verdict.json"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found.

    Attributes:
        folder: with pairs.tsv, verdict.json and, where files could not be compared, not_compared.tsv.
        exclusions: the file that `nnssl_prepare` reads; what an earlier audit has named there stays, unless this one
            has compared everything.
        origins: shared public data sets, with why of the corpus and why of the labelled data set.
        pairs: of labelled images and scans of the corpus.
        still_in: subjects to exclude that nothing excludes yet, or that a prepared store still holds.
        verdict: the same in a few numbers, as model cards take it.
    """

    folder: Path
    exclusions: Path
    origins: dict[str, tuple[str, str]]
    pairs: list[Pair]
    still_in: list[str]
    verdict: dict[str, Any]


def audit(corpus: int | str, labelled: int | str, *, content: bool = True, processes: int = 1) -> Audit:
    """Compare an indexed corpus with a labelled data set, and write down what is shared.

    Args:
        corpus: id (500) or name of what was indexed for pre-training.
        labelled: id (501) or name of an nnU-Net data set.
        content: compare images, too.
        processes: how many scans and pairs at a time.

    Raises:
        UserError: one of the two is not there or not what it should be.
    """
    raw, target = dataset_folder(corpus, "nnUNet_raw"), dataset_folder(labelled, "nnUNet_raw")
    scans, cases = read_index(raw), labelled_cases(target)
    already = set(standing_exclusions(raw))
    origins = shared_origins(scans, target, cases)
    pairs = pairs_by_name(scans, cases, origins)
    theirs = ours = Prints({}, {})
    if content:
        prints = raw / FINGERPRINTS
        theirs = fingerprints_of(map(Path, scans["path"]), prints / raw.name, processes)
        ours = fingerprints_of((path for case in cases for path in case.images), prints / target.name, processes)
        pairs += pairs_by_content(scans, cases, theirs.found, ours.found, processes)
    failed = {**theirs.failed, **ours.failed}
    found = {pair.subject for pair in pairs if pair.verdict in LEAKS}
    exclusions = raw / EXCLUSIONS / f"{target.name}.txt"
    if not content or failed or any(pair.reason for pair in pairs):
        found |= _named_before(exclusions, scans)
    excluded = sorted(found)
    still_in = _still_in(raw, scans, excluded, already)
    verdict = {
        "corpus": raw.name,
        "labelled": target.name,
        "origins_shared": sorted(origins),
        "content_compared": content,
        "corpus_scans": len(scans),
        "corpus_scans_compared": len(theirs.found),
        "labelled_images_compared": len(ours.found),
        "pairs": {name: sum(pair.verdict == name for pair in pairs) for name in (*LEAKS, "alike")},
        "cases_met": len({pair.case for pair in pairs if pair.verdict in LEAKS}),
        "cases": len(cases),
        "subjects_to_exclude": len(excluded),
    }
    folder = raw / AUDITS / target.name
    _write(folder, exclusions, pairs, excluded, target.name, failed, verdict)
    return Audit(folder=folder, exclusions=exclusions, origins=origins, pairs=pairs, still_in=still_in, verdict=verdict)


def _named_before(exclusions: Path, scans: pd.DataFrame) -> set[str]:
    """Return the subjects that an earlier audit has written into its file: one that saw less takes nothing back."""
    names = set(read_exclusions(exclusions)) if exclusions.is_file() else set()
    return {subject for subject in scans["subject"].unique() if glob.escape(subject) in names}


def _still_in(raw: Path, scans: pd.DataFrame, excluded: list[str], already: set[str]) -> list[str]:
    """Return the subjects that a pre-training would see, or that the prepared store holds."""
    left = set(without(scans, sorted(already))["subject"]) if already else set(scans["subject"])
    try:
        store = dataset_folder(raw.name, "nnUNet_preprocessed") / "manifest.tsv"
        if store.is_file():
            left |= set(pd.read_csv(store, sep="\t", dtype=str, keep_default_na=False)["subject"])
    except ValueError:  # no such variable or folder: nothing is prepared here
        pass
    return [subject for subject in excluded if subject in left]


def _write(
    folder: Path,
    exclusions: Path,
    pairs: list[Pair],
    excluded: list[str],
    target: str,
    failed: dict[str, str],
    verdict: dict[str, Any],
) -> None:
    with written_beside(folder / "pairs.tsv") as path:
        as_table(pairs).to_csv(path, sep="\t", index=False, float_format="%.3f")
    with written_beside(folder / VERDICT) as path:
        path.write_text(json.dumps(verdict, indent=2))
    with written_beside(folder / "not_compared.tsv") as path:
        pd.DataFrame(failed.items(), columns=["path", "reason"]).to_csv(path, sep="\t", index=False)
    with written_beside(exclusions) as path:
        about = f"# Subjects met in {target}, found by nnssl_audit; nnssl_prepare leaves them out."
        lines = [about, *map(glob.escape, excluded)]
        path.write_text("".join(f"{line}\n" for line in lines))
