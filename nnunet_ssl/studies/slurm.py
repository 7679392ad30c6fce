"""Hand the runs of a study to SLURM, one job each, through submitit."""

from __future__ import annotations

import getpass
import logging
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from nnunet_ssl.errors import UserError
from nnunet_ssl.studies.running import execute, read_record, write_record
from nnunet_ssl.studies.study import AnyRun, Study

logger = logging.getLogger(__name__)


def submit(runs: Sequence[AnyRun], study: Study, folder: Path, device: str) -> list[str]:
    """Submit one job per run, as one array; return the jobs' numbers.

    Args:
        study: its ``slurm`` holds sbatch's options, as submitit's ``SlurmExecutor`` names them.

    Raises:
        UserError: submitit or SLURM is not here, or refuses the options.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--executor slurm needs submitit: pip install 'nnunet_ssl[cluster]'") from error
    if shutil.which("sbatch") is None:
        raise UserError("--executor slurm: there is no sbatch here. Call it where jobs are submitted, or run locally.")
    began = time.time()
    executor = submitit.SlurmExecutor(folder / "slurm")
    try:
        executor.update_parameters(**{"job_name": study.name, "stderr_to_stdout": True} | study.slurm)
        with executor.batch():
            jobs = [executor.submit(execute, run, study, folder, device) for run in runs]
    except (ValueError, TypeError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"SLURM refuses the job with the study's slurm options {study.slurm}: {error}") from error
    for run, job in zip(runs, jobs, strict=True):
        record = read_record(folder, run)
        if record.get("ended_at", 0) < began:  # a job may be faster than this loop
            write_record(folder, run, {"state": "submitted", "job": job.job_id, "seconds": record.get("seconds", {})})
    return [job.job_id for job in jobs]


def queued_jobs() -> frozenset[str]:
    """Return the numbers of the user's jobs that are pending or running; none where there is no SLURM."""
    if shutil.which("squeue") is None:
        return frozenset()
    call = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
    answer = subprocess.run(call, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UserError(f"squeue failed, so what is queued is not known: {answer.stderr.strip()}")
    return frozenset(answer.stdout.split())
