import functools
import os
import signal

import pytest

from nnunet_ssl.corpus.workers import WorkerDied, run_locally, run_on_cluster
from nnunet_ssl.errors import UserError


def square(number):
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number**2


def square_or_die(folder, number):
    """Kill the own process at 3 always, at 5 the first time only."""
    mark = folder / str(number)
    if number == 3 or (number == 5 and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def test_one_process_is_this_process():
    assert list(run_locally(lambda _: os.getpid(), [1], processes=1)) == [(1, os.getpid())]


def threads_of_torch(_):
    import torch

    return torch.get_num_threads()


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core has one thread in any case")
def test_a_worker_computes_on_one_thread(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert list(run_locally(threads_of_torch, [0], processes=2)) == [(0, 1)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_task_that_raises_yields_its_exception_and_the_others_their_results(processes):
    outcomes = dict(run_locally(square, [2, -1, 3], processes))
    assert (outcomes.pop(2), outcomes.pop(3)) == (4, 9)
    assert str(outcomes.pop(-1)) == "-1 is negative"
    assert not outcomes


def test_a_task_that_kills_its_process_is_given_up_and_its_neighbours_are_not(tmp_path, caplog):
    outcomes = dict(run_locally(functools.partial(square_or_die, tmp_path), range(8), processes=2))
    assert isinstance(outcomes.pop(3), WorkerDied)
    assert outcomes == {number: number**2 for number in range(8) if number != 3}
    assert "worker process was killed" in caplog.text


def test_a_silent_scheduler_is_explained():
    with pytest.raises(UserError, match=r"No Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        next(run_on_cluster(square, [1], "tcp://127.0.0.1:9", timeout="1s"))
