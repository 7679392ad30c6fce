"""From an indexed corpus to a store that a training loop samples from, safe against interruption at any instant.

Three things make it safe. Every stored file appears by one rename, a case's .pkl last (see :mod:`.store`). The
journal gets a line for each finished session, with a fingerprint of its inputs and options. The manifest, which
:func:`nnunet_ssl.corpus.prepared.open_corpus` asks for, is there only while the whole store is finished.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_ssl.corpus.indexing import EXCLUSIONS, read_index, standing_exclusions, without
from nnunet_ssl.corpus.journal import fingerprint, finished_sessions, open_journal, write_journal
from nnunet_ssl.corpus.naming import StoreNames, names_of
from nnunet_ssl.corpus.plans import PreparationConfig, make_plans, settle_plans
from nnunet_ssl.corpus.prepared import summarize
from nnunet_ssl.corpus.session import ScanTask, SessionResult, SessionTask, prepare_session
from nnunet_ssl.corpus.store import SUFFIXES
from nnunet_ssl.corpus.workers import Outcomes, run_locally, run_on_cluster
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import locked, remove_leftovers, written_beside
from nnunet_ssl.imaging.skull_strip import require_hd_bet
from nnunet_ssl.live import live_line
from nnunet_ssl.nnunet_folders import dataset_folder, folder_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreparationReport:
    """What a finished preparation leaves behind: the data set's folder, counts, and the tables that lie in it."""

    folder: Path
    summary: dict[str, Any]
    manifest: pd.DataFrame
    failures: pd.DataFrame


def prepare_corpus(
    dataset: int | str,
    config: PreparationConfig,
    *,
    processes: int = 1,
    scheduler: str | None = None,
    device: str = "cpu",
) -> PreparationReport:
    """Prepare an indexed corpus, or what is missing of it, into `$nnUNet_preprocessed`.

    Args:
        dataset: id (500) or name (Dataset500_FOMO60K) of a corpus that was indexed into `$nnUNet_raw`.
        config: must equal the one that an earlier run began with. What the files in the corpus' folder ``exclusions``
            name is left out, or removed where it was prepared already.
        processes: how many processes work on this machine.
        scheduler: address of a Dask scheduler whose workers do it instead.
        device: where HD-BET runs.

    Raises:
        UserError: no such corpus, other options than before, another run at work, no scan could be prepared, ...
        OSError: the store cannot be written.
    """
    raw = dataset_folder(dataset, "nnUNet_raw")
    scans = read_index(raw)
    if excluded := standing_exclusions(raw):
        scans = without(scans, excluded)
        if scans.empty:
            raise UserError(f"Every scan is excluded by the files in {raw / EXCLUSIONS}; nothing is left to prepare.")
    if config.skull_strip and not scheduler:
        require_hd_bet()
    folder = folder_of("nnUNet_preprocessed") / raw.name
    with locked(folder, "nnssl_prepare"):
        remove_leftovers(folder)
        names = names_of(folder)
        names.cases.mkdir(exist_ok=True)
        plans = settle_plans(names, make_plans(raw.name, config, names.plans_name))
        with written_beside(folder / "dataset.json") as path:
            path.write_text((raw / "dataset.json").read_text())
        tasks = _make_tasks(scans, config, plans, names.cases, device)
        done = finished_sessions(names, tasks)
        pending = [task for task in tasks if task.session not in done]
        strangers = _strangers(names.cases, scans["scan_id"])
        if pending or strangers:
            names.manifest.unlink(missing_ok=True)
        for path in strangers:
            path.unlink()
        if scheduler:
            outcomes = run_on_cluster(prepare_session, pending, scheduler)
        else:
            outcomes = run_locally(prepare_session, pending, processes)
        done |= _work(names, tasks, done, outcomes)
        remove_leftovers(names.cases)  # of workers that were killed
        return _conclude(names, scans, [done[task.session] for task in tasks])


def _make_tasks(
    scans: pd.DataFrame, config: PreparationConfig, plans: Mapping[str, Any], store: Path, device: str
) -> list[SessionTask]:
    members: dict[str, list[ScanTask]] = {}
    for scan in scans[["session", "scan_id", "path", "modality", "dataset"]].itertuples():
        stripped = config.is_stripped(scan.dataset) if config.skull_strip else None
        task = ScanTask(scan_id=scan.scan_id, path=scan.path, modality=scan.modality, stripped=stripped)
        members.setdefault(scan.session, []).append(task)
    options = json.dumps([plans["configurations"], plans["preprocessing"]], sort_keys=True)
    return [
        SessionTask(
            session=session,
            fingerprint=fingerprint(group, options),
            scans=tuple(group),
            folder=str(store),
            plans=plans,
            device=device,
        )
        for session, group in members.items()
    ]


def _strangers(store: Path, scan_ids: Collection[str]) -> list[Path]:
    """What does not belong in the store: files that a kill left half-written, cases that the index no longer has.

    Folders are somebody else's (a file server's, a notebook's) and do no harm.
    """
    expected = {f"{scan_id}{suffix}" for scan_id in scan_ids for suffix in SUFFIXES}
    found = (path for path in store.iterdir() if path.is_symlink() or not path.is_dir())
    strangers = [path for path in found if path.name not in expected]
    cases = sum(path.suffix == ".pkl" and not path.name.startswith(".") for path in strangers)
    if cases:
        logger.info("%d prepared scans are no longer in the index; they are removed.", cases)
    return strangers


def _work(
    names: StoreNames,
    tasks: Sequence[SessionTask],
    done: Mapping[str, SessionResult],
    outcomes: Outcomes[SessionTask, SessionResult],
) -> dict[str, SessionResult]:
    """Collect the outcomes of the pending tasks into the journal, with a live line; return them by session."""
    write_journal(names.journal, done.values())
    results, failed = {}, 0
    sizes = {task.session: len(task.scans) for task in tasks}
    already = sum(sizes[session] for session in done)
    with (
        contextlib.closing(outcomes),
        open_journal(names.journal) as record,
        live_line("Preparing", sum(sizes.values()), unit="scan", done=already) as line,
    ):
        for task, outcome in outcomes:
            result = _settled(task, outcome)
            record(result)
            results[task.session] = result
            failed += len(result.failures)
            line.set_postfix(failed=failed, refresh=False)
            line.update(len(task.scans))
    return results


def _settled(task: SessionTask, outcome: SessionResult | BaseException) -> SessionResult:
    """Turn what came of a task into its result. What the user must mend (a full disk, HD-BET's weights) is raised."""
    if isinstance(outcome, SessionResult):
        return outcome
    if isinstance(outcome, (UserError, OSError)):
        raise outcome
    logger.error("Session %s could not be prepared: %s", task.session, outcome, exc_info=outcome)
    result = SessionResult(session=task.session, fingerprint=task.fingerprint)
    for scan in task.scans:
        result.fail(scan, f"{type(outcome).__name__}: {outcome}", transient=True)
    result.remove_failed_cases(task.folder)
    return result


def _conclude(names: StoreNames, scans: pd.DataFrame, results: Sequence[SessionResult]) -> PreparationReport:
    """Write journal, failures and, last, the manifest, all in the order of the index."""
    write_journal(names.journal, results)
    failures = pd.DataFrame(
        [{"session": result.session} | failure for result in results for failure in result.failures],
        columns=["scan_id", "session", "path", "reason"],
    )
    rows = [row for result in results for row in result.rows]
    unusable = names.folder / "failures.tsv"
    with written_beside(unusable) as path:
        failures.to_csv(path, sep="\t", index=False)
    if not rows:
        raise UserError(f"Not one of {len(scans)} scans could be prepared. The reasons: {unusable}")
    prepared = pd.DataFrame(rows)
    manifest = scans.merge(prepared, on="scan_id", validate="one_to_one", suffixes=("_in_table", ""))
    with written_beside(names.manifest) as path:
        manifest.to_csv(path, sep="\t", index=False)
    return PreparationReport(folder=names.folder, summary=summarize(manifest), manifest=manifest, failures=failures)
