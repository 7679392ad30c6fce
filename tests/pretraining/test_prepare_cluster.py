"""Preparation on a real Dask scheduler with workers in processes of their own, one of which is killed at work."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from nnunet_ssl.pretraining.indexing import index_corpus
from nnunet_ssl.pretraining.plans import PreparationConfig
from nnunet_ssl.pretraining.prepare import prepare_corpus

pytest.importorskip("distributed")
SESSIONS = 24


@pytest.fixture
def cluster(tmp_path):
    """A scheduler's address and its two workers as processes."""
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    processes = [
        subprocess.Popen(
            [*dask, "scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", file, "--host", "127.0.0.1"]
        )
    ]
    worker = [*dask, "worker", "--scheduler-file", file, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    processes += [subprocess.Popen([*worker, "--local-directory", tmp_path / f"worker{number}"]) for number in range(2)]
    deadline = time.monotonic() + 60
    while not file.is_file() or not file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield json.loads(file.read_text())["address"], processes[1:]
    for process in reversed(processes):
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_makes_the_store_of_one_process(
    cluster, nnunet_folders, tmp_path, write_scan, contents
):
    for subject in range(SESSIONS):
        write_scan(tmp_path / f"fomo/sub_{subject}/ses_1/t1.nii.gz", seed=subject, shape=(40, 50, 44))
        write_scan(tmp_path / f"fomo/sub_{subject}/ses_1/t2.nii.gz", seed=subject, shape=(40, 50, 44))
    (tmp_path / "fomo/sub_3/ses_1/flair.nii.gz").write_bytes(b"")
    index_corpus(tmp_path / "fomo", 500, "FOMO60K")
    store = prepare_corpus(500, PreparationConfig()).folder
    alone = contents(store)
    shutil.rmtree(store)

    address, workers = cluster
    command = [sys.executable, "-c", "from nnunet_ssl.pretraining.cli import prepare; prepare()", "-d", "500"]
    run = subprocess.Popen([*command, "--scheduler", address])
    journal = store / "nnsslPlans_journal.jsonl"
    while not journal.is_file() or not journal.read_text():
        time.sleep(0.02)
    workers[0].kill()
    assert len(journal.read_text().splitlines()) < SESSIONS, "the worker was killed too late to matter"
    assert run.wait(timeout=120) == 3
    assert contents(store) == alone
