"""What tests share: processes of one thread, memory that is not given back too eagerly, nnU-Net's folders."""

import functools
import os
import signal
from pathlib import Path

import pytest

from nnunet_ssl.commands import KEPT_MEMORY, SHARED_CORES

pytest_plugins = ["corpora"]

# Before torch is imported, and for the commands that tests start: with two test processes on two cores, more threads
# only get in each other's way; the allocator's thresholds make convolutions on a CPU about twice as fast.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name, value in (KEPT_MEMORY | SHARED_CORES).items():
    os.environ.setdefault(name, value)
os.environ.setdefault("nnUNet_compile", "f")
os.environ.setdefault("nnUNet_def_n_proc", "2")  # processes that import PyTorch, to write a small file each


@pytest.fixture(autouse=True)
def signal_handlers():
    """Handlers that a command sets in this process go with the test: forked workers, which nnU-Net's pools end by a
    signal, would inherit them, and wait forever where the signal comes just before they fall asleep."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def nnunet_folders(tmp_path, monkeypatch):
    """nnU-Net's three folders, empty, as its variables name them."""
    folders = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    return folders


@pytest.fixture
def launches(monkeypatch):
    """A function that does some work on the device "meta" and returns how many operators a GPU would be asked for."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from launches import META, launches

    return lambda work: launches(work, META).total()


def pytest_addoption(parser):
    parser.addoption("--renew-golden", action="store_true", help="record the losses of tests/golden anew")


@pytest.fixture
def golden(request, monkeypatch):
    """A function that compares a run's losses with the recorded ones, or records them where that was asked for.

    So that machines and versions agree, AdamW's epsilon is large: with the usual one, the rounding of a gradient near
    zero becomes a full step. And PyTorch's versions draw truncated normal numbers differently. Ours are cut at a
    hundred standard deviations, so that plain ones, which all versions draw alike, are the same.
    """
    import torch
    from golden import assert_recorded, record

    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", torch.nn.init.normal_)
    return record if request.config.getoption("--renew-golden") else assert_recorded


@pytest.fixture
def installed(tmp_path_factory):
    """A function that makes a folder for ``sys.path`` in which a package claims to be of a release."""

    packages = tmp_path_factory.mktemp("packages")

    def claim(name, release):
        folder = packages / f"{name.replace('-', '_')}-{release}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
        return packages

    return claim
