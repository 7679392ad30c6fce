"""Run many independent tasks in local processes or on a Dask cluster, and outlive the death of a worker."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from nnunet_ssl.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Outcomes = Generator[tuple[Task, Result | BaseException], None, None]

logger = logging.getLogger(__name__)


class WorkerDied(Exception):
    """A task whose process was killed while it worked on it, more than once."""

    def __init__(self) -> None:
        super().__init__("the process that worked on it was killed more than once (out of memory?)")


def run_locally(function: Callable[[Task], Result], tasks: Iterable[Task], processes: int) -> Outcomes[Task, Result]:
    """Run `function` on every task in `processes` processes; one process means this one.

    When a worker is killed, the tasks that were under way are tried again one by one in a process of their own; one
    that dies there twice is given up as :class:`WorkerDied`, and the others go on.

    Yields:
        Each task with its result or the exception it raised, in the order of completion.
    """
    if processes == 1:
        for task in tasks:
            yield task, _outcome(function, task)
        return
    queue = deque(tasks)
    while queue:
        suspects = yield from _run_pool(function, queue, processes)
        for suspect in suspects:
            for _ in range(2):
                lost = yield from _run_pool(function, deque([suspect]), 1)
                if not lost:
                    break
            else:
                yield suspect, WorkerDied()


def _outcome(function: Callable[[Task], Result], task: Task) -> Result | BaseException:
    try:
        return function(task)
    except Exception as error:
        return error


def _run_pool(
    function: Callable[[Task], Result], queue: deque[Task], processes: int
) -> Generator[tuple[Task, Result | BaseException], None, list[Task]]:
    """Work `queue` off in a pool. Returns the tasks under way when a worker was killed; none if all went well."""
    running: dict[Future[Result], Task] = {}
    with ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    ) as pool:
        try:
            while queue or running:
                while queue and len(running) < 2 * processes:
                    future = pool.submit(function, queue[0])
                    running[future] = queue.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise error
                    yield running.pop(future), future.result() if error is None else error
        except BrokenProcessPool:
            logger.warning("A worker process was killed; its work is taken up again.")
            return list(running.values())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return []


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, compute on one thread, and end when the parent is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # torch comes with the first task, and obeys
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker starts so"

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def run_on_cluster(
    function: Callable[[Task], Result], tasks: Iterable[Task], scheduler: str, *, timeout: str = "30s"
) -> Outcomes[Task, Result]:
    """Run `function` on every task on the workers of a Dask scheduler, such as ``tcp://host:8786``.

    Dask gives the task of a lost worker to another one. Workers may come and go; without any, this waits.

    Yields:
        Each task with its result or the exception it raised, in the order of completion.

    Raises:
        UserError: dask.distributed is not installed, no scheduler answers, or it goes away.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise UserError('--scheduler needs dask.distributed: pip install "nnunet_ssl[cluster]"') from error
    try:
        client = Client(scheduler, timeout=timeout)
    except (OSError, ValueError) as error:
        raise UserError(f"No Dask scheduler answers at {scheduler} ({error}).") from error
    with client:
        logger.info("%d Dask workers at %s; more may join.", len(client.nthreads()), scheduler)
        queue = deque(tasks)
        running: dict[Any, Task] = {}
        completed = as_completed()
        gone = f"The Dask scheduler at {scheduler} went away. What was finished is kept: call again with another."
        while queue or running:
            try:  # a lost connection shows wherever the scheduler is asked next
                while queue and len(running) < max(64, 2 * sum(client.nthreads().values())):
                    future = client.submit(function, queue[0], pure=False)
                    running[future] = queue.popleft()
                    completed.add(future)
                future = next(completed)
                if future.cancelled():
                    raise UserError(gone)
                failure = future.exception()
                outcome = future.result() if failure is None else failure
            except OSError as lost:
                raise UserError(gone) from lost
            yield running.pop(future), WorkerDied() if isinstance(failure, KilledWorker) else outcome
