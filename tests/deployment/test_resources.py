"""How many CPUs a container has, by every kind of cgroup."""

import os

import pytest

from nnunet_ssl.deployment.resources import THREADS, cpu_limit, limit_threads, measured

MANY = 64


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A function that writes a cgroup file system of a host of 64 cores; returns what cpu_limit makes of it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)))

    def limit(membership, **files):
        for name, text in files.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("_", ".", 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "self").write_text(membership)
        return cpu_limit(tmp_path / "cgroup", tmp_path / "self")

    return limit


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", MANY), ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("garbage", MANY)],
)
def test_a_containers_quota(host, quota, cpus):
    assert host("0::/\n", cpu_max=quota + "\n") == cpus


def test_the_quota_of_a_group_above_counts(host):
    assert host("0::/pods/one\n", pods__cpu_max="400000 100000", pods__one__cpu_max="max 100000") == 4


def test_a_quota_of_the_first_version(host):
    assert host("1:cpu,cpuacct:/\n", cpu__cpu_cfs_quota_us="300000", cpu__cpu_cfs_period_us="100000") == 3
    assert host("1:cpu,cpuacct:/\n", cpu__cpu_cfs_quota_us="-1", cpu__cpu_cfs_period_us="100000") == MANY


def test_without_cgroups_the_cpus_that_it_is_bound_to_count(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert cpu_limit(tmp_path / "nothing", tmp_path / "nothing") == 2


def test_libraries_and_nnunet_are_told():
    environment = {"OMP_NUM_THREADS": "240"}
    threads = limit_threads(environment)
    assert environment == dict.fromkeys(THREADS, str(threads))
    assert "nnUNet_def_n_proc" in THREADS


def test_a_failed_case_raises_its_own_error():
    with pytest.raises(KeyError), measured():
        raise KeyError("own")
