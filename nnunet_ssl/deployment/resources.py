"""What a container may use, and what a case used: CPUs by the cgroup, seconds, memory. Imports nothing large."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "nnUNet_def_n_proc")


def cpu_limit(root: Path = CGROUP, memberships: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many CPUs this process may use at a time, at least 1.

    The number of cores that Python and PyTorch count is the host's. A container's share is a quota of its cgroup
    (``cpu.max``; before version 2 ``cpu.cfs_quota_us``), or of a group above it, or the set of CPUs it is bound to.
    """
    limits: list[float] = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    limits += [quota for folder in _groups(root, memberships) if (quota := _quota(folder)) is not None]
    return max(1, int(min(limits)))


def limit_threads(environment: MutableMapping[str, str] = os.environ) -> int:
    """Tell the libraries that are imported from now on how many threads there are; return the number."""
    threads = cpu_limit()
    environment.update(dict.fromkeys(THREADS, str(threads)))
    return threads


@contextmanager
def measured() -> Iterator[list[str]]:
    """Yield a list that holds, after the block, what it took: seconds and the process's largest memory so far."""
    used: list[str] = []
    start = time.perf_counter()
    yield used
    used.append(f"{time.perf_counter() - start:.1f} s")
    used.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory at most")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        used.append(f"{torch.cuda.max_memory_reserved() / 2**30:.2f} GiB of GPU memory at most")


def _groups(root: Path, memberships: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups and of those above them; in a container, its own is the root."""
    lines = memberships.read_text().splitlines() if memberships.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        place = base / path.lstrip("/")
        yield from (folder for folder in (place, *place.parents) if folder == base or base in folder.parents)
    yield from (root, root / "cpu")


def _quota(folder: Path) -> float | None:
    """Return the CPUs that a group's quota gives; None where it has none."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
    except (OSError, ValueError):
        return None
