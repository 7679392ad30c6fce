"""From an indexed corpus to a store that a training loop samples from, safe against interruption at any instant.

Three things make it safe. Every stored file appears by one rename, a case's .pkl last (see :mod:`.store`). The
journal gets a line for each finished session, with a fingerprint of its inputs and options. The manifest, which
:func:`nnunet_ssl.pretraining.corpus.open_corpus` asks for, is there only while the whole store is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import filelock
import pandas as pd
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import written_beside
from nnunet_ssl.imaging.skull_strip import require_hd_bet
from nnunet_ssl.nnunet_folders import dataset_folder, folder_of
from nnunet_ssl.pretraining.corpus import CONFIGURATION, DATA_IDENTIFIER, PLANS_NAME, summarize
from nnunet_ssl.pretraining.session import ScanTask, SessionResult, SessionTask, prepare_session
from nnunet_ssl.pretraining.store import SUFFIXES
from nnunet_ssl.pretraining.workers import run_locally, run_on_cluster

JOURNAL = f"{PLANS_NAME}_journal.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """What is done to the scans.

    Attributes:
        spacing: voxel size in mm, in nnU-Net's order of axes for RAS images: superior, anterior, right.
        dtype: float16 halves the bytes. It costs at most 2^-11 of a standard deviation up to |z| = 2, 2^-10 up to 4.
        patch_size: the crops that chunks and blocks of the files are chosen for, in voxels.
        skull_strip: None, or "hd-bet" to strip the sessions that are not stripped yet.
        stripped: datasets known to be stripped, not_stripped: known not to be; the others are judged by their images.
    """

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    dtype: Literal["float16", "float32"] = "float16"
    patch_size: tuple[int, int, int] = (96, 96, 96)
    skull_strip: Literal["hd-bet"] | None = None
    stripped: tuple[str, ...] = ()
    not_stripped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.spacing) <= 0:
            raise UserError(f"The voxel size must be positive, not {self.spacing} mm.")
        both = set(self.stripped) & set(self.not_stripped)
        if both:
            raise UserError(f"Said to be stripped and not to be stripped: {', '.join(sorted(both))}.")

    def is_stripped(self, dataset: str) -> bool | None:
        """What was said of a data set; None if nothing was."""
        return True if dataset in self.stripped else False if dataset in self.not_stripped else None


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
        config: must equal the one that an earlier run began with.
        processes: how many processes work on this machine.
        scheduler: address of a Dask scheduler whose workers do it instead.
        device: where HD-BET runs.

    Raises:
        UserError: no such corpus, other options than before, another run at work, no scan could be prepared, ...
        OSError: the store cannot be written.
    """
    raw = dataset_folder(dataset, "nnUNet_raw")
    scans = _read_raw_manifest(raw)
    if config.skull_strip and not scheduler:
        require_hd_bet()
    folder = folder_of("nnUNet_preprocessed") / raw.name
    (folder / DATA_IDENTIFIER).mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        plans = _settle_plans(folder, make_plans(raw.name, config))
        with written_beside(folder / "dataset.json") as path:
            path.write_text((raw / "dataset.json").read_text())
        tasks = _make_tasks(scans, config, plans, folder / DATA_IDENTIFIER, device)
        done = _finished(folder, tasks)
        pending = [task for task in tasks if task.session not in done]
        strangers = _strangers(folder / DATA_IDENTIFIER, scans["scan_id"])
        if pending or strangers:
            (folder / "manifest.tsv").unlink(missing_ok=True)
        for path in strangers:
            path.unlink()
        if scheduler:
            outcomes = run_on_cluster(prepare_session, pending, scheduler)
        else:
            outcomes = run_locally(prepare_session, pending, processes)
        done |= _work(folder, tasks, done, outcomes)
        return _conclude(folder, scans, [done[task.session] for task in tasks])


def _read_raw_manifest(raw: Path) -> pd.DataFrame:
    path = raw / "manifest.tsv"
    if not path.is_file():
        raise UserError(
            f"{raw} has no manifest.tsv, so it is no corpus for pre-training. Index one first: "
            "python dataset_conversion/Dataset500_FOMO60K.py -i DIR"
        )
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one run at a time work on a store; the lock falls with its process, even by kill -9."""
    lock = filelock.FileLock(folder / ".nnssl_prepare.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"Another nnssl_prepare is at work on {folder}. Wait for it, or stop it.") from error
    except NotImplementedError:
        logger.warning("%s lies on a file system without locks: see to it yourself that one run works on it.", folder)
    try:
        yield
    finally:
        lock.release()


def make_plans(dataset_name: str, config: PreparationConfig) -> dict[str, Any]:
    """Write the options as an nnU-Net plans file; ``preprocessing`` is what checkpoints carry on."""
    return {
        "dataset_name": dataset_name,
        "plans_name": PLANS_NAME,
        "original_median_spacing_after_transp": list(config.spacing),
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "nnssl_prepare",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {
            CONFIGURATION: {
                "data_identifier": DATA_IDENTIFIER,
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(config.patch_size),
                "spacing": list(config.spacing),
                "normalization_schemes": ["PercentileZScoreNormalization"],
                "use_mask_for_norm": [True],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
                "resampling_fn_seg": "resample_torch_fornnunet",
                "resampling_fn_seg_kwargs": {"is_seg": True, "num_threads": 1},
                "batch_dice": False,
                "architecture": {},
            }
        },
        "preprocessing": {
            "orientation": "RAS",
            "axes": ["superior", "anterior", "right"],
            "spacing": list(config.spacing),
            "normalization": "clip to the 0.5-99.5 percentiles of the foreground, z-score inside it, zero outside",
            "crop": "union of the foregrounds of a session",
            "skull_strip": config.skull_strip,
            "dtype": config.dtype,
        },
    }


def _settle_plans(folder: Path, plans: dict[str, Any]) -> dict[str, Any]:
    """Write the plans of a new store; for a begun one make sure that they are the same.

    Raises:
        UserError: the store was begun with other options.
    """
    path = folder / f"{PLANS_NAME}.json"
    if not path.is_file():
        with written_beside(path) as temporary:
            temporary.write_text(json.dumps(plans, indent=4))
        return plans
    begun = json.loads(path.read_text())
    if begun == plans:
        return plans
    differences = [f"{name}: {old} there, {new} now" for name, old, new in _differences(begun, plans)]
    raise UserError(
        f"The store in {folder} was begun with other options ({'; '.join(differences)}). Call with the same ones, or "
        f"remove that folder, or index the corpus under another id."
    )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _differences(old.get(key), new.get(key), key)
    elif old != new:
        yield name, old, new


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
            fingerprint=_fingerprint(group, options),
            scans=tuple(group),
            folder=str(store),
            plans=plans,
            device=device,
        )
        for session, group in members.items()
    ]


def _fingerprint(scans: Sequence[ScanTask], options: str) -> str:
    """Stand for everything a session's stored arrays depend on; a file by its size and its time of change."""
    digest = hashlib.blake2b(options.encode(), digest_size=16)
    for scan in scans:
        try:
            status = Path(scan.path).stat()
            state = (status.st_size, status.st_mtime_ns)
        except OSError:
            state = None
        digest.update(repr((scan.scan_id, scan.modality, scan.stripped, state)).encode())
    return digest.hexdigest()


def _finished(folder: Path, tasks: Sequence[SessionTask]) -> dict[str, SessionResult]:
    """The sessions that need no work: journalled from the same inputs, with nothing to try again, all files there."""
    fingerprints = {task.session: task.fingerprint for task in tasks}
    present = {path.name for path in (folder / DATA_IDENTIFIER).iterdir()}
    done, changed = {}, 0
    for result in _read_journal(folder / JOURNAL):
        if result.session not in fingerprints:
            continue
        same = result.fingerprint == fingerprints[result.session]
        changed += not same
        complete = all(row["scan_id"] + suffix in present for row in result.rows for suffix in SUFFIXES)
        if same and complete and not result.transient:
            done[result.session] = result
        else:
            done.pop(result.session, None)
    if changed:
        logger.info("The images of %d sessions changed since they were prepared; these are prepared again.", changed)
    return done


def _read_journal(path: Path) -> Iterator[SessionResult]:
    """The journal's entries, in the order written. A last line without an end was cut off by a kill: it is no entry."""
    if not path.is_file():
        return
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield SessionResult(**json.loads(line))


def _write_journal(path: Path, results: Collection[SessionResult]) -> None:
    with written_beside(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(asdict(result))}\n" for result in results))


def _strangers(store: Path, scan_ids: Collection[str]) -> list[Path]:
    """What does not belong in the store: files that a kill left half-written, cases that the index no longer has."""
    expected = {f"{scan_id}{suffix}" for scan_id in scan_ids for suffix in SUFFIXES}
    strangers = [path for path in store.iterdir() if path.name not in expected]
    cases = sum(path.suffix == ".pkl" and not path.name.startswith(".") for path in strangers)
    if cases:
        logger.info("%d prepared scans are no longer in the index; they are removed.", cases)
    return strangers


def _work(
    folder: Path,
    tasks: Sequence[SessionTask],
    done: Mapping[str, SessionResult],
    outcomes: Iterator[tuple[SessionTask, SessionResult | BaseException]],
) -> dict[str, SessionResult]:
    """Collect the outcomes of the pending tasks into the journal, with a progress bar; return them by session."""
    _write_journal(folder / JOURNAL, done.values())
    results = {}
    sizes = {task.session: len(task.scans) for task in tasks}
    already = sum(sizes[session] for session in done)
    with (
        contextlib.closing(outcomes),
        (folder / JOURNAL).open("a") as journal,
        # smoothing=0: the remaining time is reckoned from this run's average, not from its last few sessions.
        tqdm(total=sum(sizes.values()), initial=already, unit="scan", desc="Preparing", smoothing=0) as progress,
    ):
        for task, outcome in outcomes:
            result = _settled(task, outcome)
            journal.write(f"{json.dumps(asdict(result))}\n")
            journal.flush()
            os.fsync(journal.fileno())
            results[task.session] = result
            progress.update(len(task.scans))
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


def _conclude(folder: Path, scans: pd.DataFrame, results: Sequence[SessionResult]) -> PreparationReport:
    """Write journal, failures and, last, the manifest, all in the order of the index."""
    _write_journal(folder / JOURNAL, results)
    failures = pd.DataFrame(
        [{"session": result.session} | failure for result in results for failure in result.failures],
        columns=["scan_id", "session", "path", "reason"],
    )
    rows = [row for result in results for row in result.rows]
    with written_beside(folder / "failures.tsv") as path:
        failures.to_csv(path, sep="\t", index=False)
    if not rows:
        raise UserError(f"Not one of {len(scans)} scans could be prepared. The reasons: {folder / 'failures.tsv'}")
    manifest = scans.merge(pd.DataFrame(rows), on="scan_id", validate="one_to_one")
    with written_beside(folder / "manifest.tsv") as path:
        manifest.to_csv(path, sep="\t", index=False)
    return PreparationReport(folder=folder, summary=summarize(manifest), manifest=manifest, failures=failures)
