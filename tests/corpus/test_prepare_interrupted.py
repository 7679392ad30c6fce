"""Kill -9 at any instant, then carry on: the store must be the one of an unbroken run."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from nnunet_ssl.corpus.indexing import index_corpus
from nnunet_ssl.corpus.plans import PreparationConfig
from nnunet_ssl.corpus.prepare import prepare_corpus
from nnunet_ssl.corpus.prepared import open_corpus

SESSIONS = 16
NAME = "Dataset500_FOMO60K"


@pytest.fixture
def store(nnunet_folders, tmp_path, write_scan):
    """The folder where the store will be; the corpus is indexed and has a bad scan too."""
    for subject in range(SESSIONS):
        for stem in ("t1", "t2"):
            write_scan(tmp_path / f"fomo/sub_{subject}/ses_1/{stem}.nii.gz", seed=subject, shape=(28, 36, 30))
    (tmp_path / "fomo/sub_0/ses_1/flair.nii.gz").write_bytes(b"")
    index_corpus(tmp_path / "fomo", 500, "FOMO60K")
    return nnunet_folders["nnUNet_preprocessed"] / NAME


@pytest.fixture
def unbroken(store, contents):
    """What every file holds after a run that nothing interrupted."""
    prepare_corpus(500, PreparationConfig())
    whole = contents(store)
    shutil.rmtree(store)
    return whole


def test_a_store_finished_after_many_kills_equals_an_unbroken_one(store, unbroken, contents):
    rng = random.Random(0)
    kills = 0
    for _ in range(100):
        run = multiprocessing.get_context("fork").Process(target=prepare_corpus, args=(500, PreparationConfig()))
        run.start()
        run.join(rng.uniform(0.05, 0.3))
        if not run.is_alive():
            break
        run.kill()
        run.join()
        kills += 1
        present = (store / "manifest.tsv").is_file()
        assert not present or (store / "manifest.tsv").read_bytes() == unbroken["manifest.tsv"]
    assert kills >= 3
    prepare_corpus(500, PreparationConfig())
    assert contents(store) == unbroken


def test_scans_finished_before_a_kill_are_not_touched_after_it(store, unbroken):
    run = multiprocessing.get_context("fork").Process(target=prepare_corpus, args=(500, PreparationConfig()))
    run.start()
    cases = store / "nnUNetSSLPlans_3d_fullres"
    while not cases.is_dir() or len(list(cases.glob("[!.]*.pkl"))) < 7:
        time.sleep(0.005)
    run.kill()
    run.join()
    finished = {path: path.stat().st_mtime_ns for path in cases.glob("[!.]*.pkl")}
    assert 7 <= len(finished) < 2 * SESSIONS
    prepare_corpus(500, PreparationConfig())
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


@pytest.mark.slow
def test_the_command_killed_with_its_workers_at_work_goes_on(store, unbroken, contents):
    command = [
        sys.executable,
        "-c",
        "from nnunet_ssl.corpus.cli import prepare; prepare()",
        "-d",
        "500",
        "-np",
        "2",
    ]
    run = subprocess.Popen(command, start_new_session=True)
    while not list(store.glob("nnUNetSSLPlans_3d_fullres/[!.]*.pkl")):
        time.sleep(0.02)
    run.kill()
    run.wait()
    assert not (store / "manifest.tsv").exists()

    deadline = time.monotonic() + 20
    while group_lives(run.pid):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, "finished, with a scan that failed"
    assert "1 scans could not be used" in done.stdout.splitlines()[-1]
    assert contents(store) == unbroken
    assert len(open_corpus(500)) == 2 * SESSIONS


def group_lives(group):
    try:
        os.killpg(group, signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True
