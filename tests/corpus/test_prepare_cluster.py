"""Preparation on a real Dask scheduler with workers in processes of their own, one of which is killed at work."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from nnunet_ssl.corpus.indexing import index_corpus
from nnunet_ssl.corpus.plans import PreparationConfig
from nnunet_ssl.corpus.prepare import prepare_corpus

pytest.importorskip("distributed")
SESSIONS = 24


@pytest.fixture
def cluster(tmp_path):
    """A scheduler's address, the scheduler and its two workers as processes."""
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
    yield json.loads(file.read_text())["address"], *processes
    for process in reversed(processes):
        process.kill()
        process.wait()


@pytest.fixture
def store(nnunet_folders, tmp_path, write_scan):
    """The folder where the store will be; the corpus is indexed and has a bad scan too."""
    for subject in range(SESSIONS):
        for stem in ("t1", "t2"):
            path = tmp_path / f"fomo/sub_{subject}/ses_1/{stem}.nii.gz"
            write_scan(path, seed=subject, shape=(40, 50, 44))
    (tmp_path / "fomo/sub_3/ses_1/flair.nii.gz").write_bytes(b"")
    index_corpus(tmp_path / "fomo", 500, "FOMO60K")
    return nnunet_folders["nnUNet_preprocessed"] / "Dataset500_FOMO60K"


@pytest.fixture
def start(store):
    """A function that starts the command, and returns its process when the first session is finished."""

    def start(address):
        command = [sys.executable, "-c", "from nnunet_ssl.corpus.cli import prepare; prepare()", "-d", "500"]
        run = subprocess.Popen([*command, "--scheduler", address], stderr=subprocess.PIPE, text=True)
        journal = store / "nnUNetSSLPlans_journal.jsonl"
        while not journal.is_file() or not journal.read_text():
            assert run.poll() is None
            time.sleep(0.02)
        assert len(journal.read_text().splitlines()) < SESSIONS, "what comes now comes too late to matter"
        return run

    return start


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_makes_the_store_of_one_process(cluster, store, start, contents):
    prepare_corpus(500, PreparationConfig())
    alone = contents(store)
    shutil.rmtree(store)
    address, _, worker, _ = cluster
    run = start(address)
    worker.kill()
    run.communicate(timeout=300)
    assert run.returncode == 3
    assert contents(store) == alone


@pytest.mark.slow
def test_a_lost_scheduler_ends_the_run_in_one_line(cluster, store, start):
    address, scheduler, *_ = cluster
    run = start(address)
    scheduler.kill()
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 1
    assert f"error: The Dask scheduler at {address} went away. What was finished is kept" in errors.splitlines()[-1]
    assert not (store / "manifest.tsv").exists()
