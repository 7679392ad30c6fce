"""Reading: exact boxes, co-located pairs, the same batch whoever makes it, damaged files, and a long life."""

import itertools
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import blosc2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_ssl.corpus.prepared import Corpus, number_rows
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.views.augmentation import AugmentationConfig, augment
from nnunet_ssl.pretraining.views.loading import lost_workers_explained, make_loader
from nnunet_ssl.pretraining.views.sampling import SamplingConfig

SHAPE = (40, 48, 44)
SPACING = (1.0, 2.0, 0.5)
BOX = ((2, 38), (4, 44), (1, 43))
MARK = np.array([19.0, 26.0, 21.0])
PATCH = (24, 20, 22)


@pytest.fixture(scope="module")
def write_corpus(tmp_path_factory):
    """A function that writes sessions of two modalities, in which Gaussian blobs of opposite signs mark one place."""

    def write(subjects=4, shape=SHAPE, box=BOX, dtype=np.float16):
        folder, rows = tmp_path_factory.mktemp("store"), []
        distance = sum((place - mark) ** 2 for place, mark in zip(np.indices(shape), MARK))
        mark = np.exp(-distance / (2 * 1.5**2))
        for subject in range(subjects):
            for sign, modality in ((1, "t1"), (-1, "flair")):
                scan = f"A__sub_{subject}__ses_1__{modality}"
                texture = np.random.default_rng([subject, sign + 1]).normal(0, 1e-3, shape)
                data = (sign * mark + texture).astype(dtype)[None]
                blosc2.asarray(data, urlpath=str(folder / f"{scan}.b2nd"), chunks=data.shape, blocks=(1, 16, 16, 16))
                rows.append(
                    {
                        "scan_id": scan,
                        "dataset": "A",
                        "subject": f"A/sub_{subject}",
                        "session": f"A/sub_{subject}/ses_1",
                        "modality": modality,
                        "repeat": 1,
                        "shape": ",".join(map(str, shape)),
                        "bbox": ",".join(str(end) for ends in box for end in ends),
                    }
                )
        return Corpus(folder, number_rows(pd.DataFrame(rows)), {"spacing": SPACING})

    return write


@pytest.fixture(scope="module")
def corpus(write_corpus):
    return write_corpus()


def loader(corpus, *, jitter_mm=0.0, max_failed_share=0.05, augmentation=None, **options):
    given = {
        "kind": "mcl",
        "batch_size": 4,
        "patch_size": PATCH,
        "sampling": SamplingConfig(jitter_mm=jitter_mm, max_failed_share=max_failed_share),
        "augmentation": augmentation or AugmentationConfig(),
        "seed": 0,
    }
    return make_loader(corpus, **given | options)


def batches(corpus, count=3, **options):
    return list(itertools.islice(loader(corpus, **options), count))


def assert_same(one, other):
    """Two raw batches are equal in everything."""
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(other, name), name)
        else:
            assert value == getattr(other, name), name


def of_views(raw):
    """What belongs to each view: its scan, crop, matrix, centre in the volume, and origin of the crop."""
    scans = [scan for view in raw.scan_ids for scan in view]
    crops = raw.voxels.split(raw.sizes.prod(axis=1).tolist())
    crops = [crop.view(*size) for crop, size in zip(crops, raw.sizes.tolist())]
    return list(zip(scans, crops, raw.matrices, raw.centres, raw.origins))


def place_of_the_mark(view, matrix, centre):
    """Where in the volume a view shows the blob: its centroid in the view, with the augmentation undone."""
    weight = (view.abs() - 0.05).clamp_min(0).double()
    places = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in view.shape), indexing="ij"))
    centroid = (places * weight).sum(dim=(1, 2, 3)) / weight.sum()
    return centre + matrix @ (centroid.numpy() - (np.array(view.shape) - 1) / 2)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), jitter_mm=st.sampled_from([0.0, 3.0]), kind=st.sampled_from(["mcl", "cl"]))
def test_the_views_of_a_pair_show_the_same_place(corpus, seed, jitter_mm, kind):
    """A mark is found at its place in the volume in both views, and their centres differ by the jitter alone."""
    raw = batches(corpus, 1, seed=seed, jitter_mm=jitter_mm, kind=kind, batch_size=2)[0]
    shown = augment(raw, "cpu").targets.view(-1, *PATCH)
    for view, (_, _, matrix, centre, _) in zip(shown, of_views(raw)):
        in_view = np.linalg.solve(matrix, MARK - centre) + (np.array(PATCH) - 1) / 2
        if (in_view > 5).all() and (in_view < np.array(PATCH) - 6).all():  # not cut by a face
            np.testing.assert_allclose(place_of_the_mark(view, matrix, centre), MARK, atol=0.1)
    apart = np.linalg.norm((raw.centres[:2] - raw.centres[2:]) * SPACING, axis=1)
    assert (apart <= jitter_mm + 1e-9).all()
    assert (apart > 0).all() == (jitter_mm > 0)


def test_the_mark_is_seen_often_enough_for_the_test_above_to_mean_something(corpus):
    shown = torch.cat([augment(raw, "cpu").targets.flatten(0, 1) for raw in batches(corpus, 5)])
    assert (shown.abs().amax(dim=(1, 2, 3, 4)) > 0.8).float().mean() > 0.5


def test_the_views_of_a_pair_have_their_own_affine_map_and_one_flip(corpus):
    mirrored = []
    for raw in batches(corpus, 20):
        first, second = raw.matrices[:4], raw.matrices[4:]
        assert not np.isclose(first, second).all(axis=(1, 2)).any()
        np.testing.assert_array_equal(np.sign(np.linalg.det(first)), np.sign(np.linalg.det(second)))
        mirrored += (np.linalg.det(first) < 0).tolist()
    assert 0.3 < np.mean(mirrored) < 0.7


def test_an_affine_map_can_be_shared(corpus):
    for raw in batches(corpus, 3, augmentation=AugmentationConfig(shared_affine=True)):
        np.testing.assert_array_equal(raw.matrices[:4], raw.matrices[4:])
        assert raw.intensities[:4] != raw.intensities[4:]


def test_what_is_read_is_the_box_and_exactly_what_is_stored(corpus):
    for raw in batches(corpus, 3, jitter_mm=10.0):
        for scan, crop, matrix, centre, origin in of_views(raw):
            reach = np.abs(matrix) @ ((np.array(PATCH) - 1) / 2)
            np.testing.assert_array_equal(origin, np.clip(np.floor(centre - reach), 0, None))
            end = np.clip(np.ceil(centre + reach) + 1, None, SHAPE)
            np.testing.assert_array_equal(origin + crop.shape, end)
            stored = blosc2.open(str(corpus.folder / f"{scan}.b2nd"))[:]
            expected = stored[(0, *(slice(*ends) for ends in zip(origin, end.astype(int))))]
            np.testing.assert_array_equal(crop.numpy(), expected)


def test_a_store_in_single_precision_is_rounded_once(write_corpus):
    corpus = write_corpus(subjects=2, dtype=np.float32)
    raw = batches(corpus, 1, batch_size=1)[0]
    assert raw.voxels.dtype == torch.float16
    scan, crop, _, _, origin = of_views(raw)[0]
    stored = blosc2.open(str(corpus.folder / f"{scan}.b2nd"))[:]
    expected = stored[(0, *(slice(start, start + size) for start, size in zip(origin, crop.shape)))]
    np.testing.assert_array_equal(crop.numpy(), expected.astype(np.float16))


def test_patches_lie_in_the_brain(corpus):
    for raw in batches(corpus, 20):
        start = raw.centres - (np.array(PATCH) - 1) / 2
        low, high = np.array(BOX).T
        assert (start >= low).all() and (start + PATCH <= high).all()


def test_a_patch_larger_than_the_scan_repeats_the_edge(write_corpus):
    corpus = write_corpus(subjects=2, shape=(40, 20, 44), box=((0, 40), (0, 20), (0, 44)))
    still = AugmentationConfig(flip_probability=0, rotation=0, scale=0, shear=0)
    raw = batches(corpus, 1, patch_size=(24, 32, 22), batch_size=1, augmentation=still)[0]
    assert raw.sizes.tolist() == [[24, 20, 22]] * 2
    target = augment(raw, "cpu").targets[0, 0, 0]
    above = int(raw.origins[0, 1] - (raw.centres[0, 1] - 15.5))
    crop = of_views(raw)[0][1].float()
    expected = torch.cat([crop[:, :1]] * above + [crop] + [crop[:, -1:]] * (12 - above), dim=1)
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=0)


def test_a_patch_larger_than_every_scan_is_refused(corpus):
    with pytest.raises(UserError, match=r"smaller, along every axis, than patch_size \[64, 64, 64\].*\[40, 48, 44\]"):
        loader(corpus, patch_size=(64, 64, 64))


def test_views_of_one_scan_for_cl_and_single_scans_for_mim(corpus):
    raw = batches(corpus, 1, kind="cl")[0]
    assert raw.scan_ids[0] == raw.scan_ids[1]
    assert not np.array_equal(raw.matrices[:4], raw.matrices[4:])
    raw = batches(corpus, 1, kind="mim")[0]
    assert raw.modality.shape == (1, 4) and len(raw.sizes) == 4
    raw = batches(corpus, 1)[0]
    assert (raw.modality[0] != raw.modality[1]).all()


def test_the_same_batches_for_any_number_of_workers(corpus):
    expected = batches(corpus, 5)
    for workers in (1, 3):
        for one, other in zip(expected, batches(corpus, 5, workers=workers), strict=True):
            assert_same(one, other)


def test_the_same_batches_after_a_resume(corpus):
    for one, other in zip(batches(corpus, 5)[3:], batches(corpus, 2, start_step=3, workers=2), strict=True):
        assert_same(one, other)


def test_two_ranks_see_together_what_one_process_sees(corpus):
    alone = augment(batches(corpus, 1)[0], "cpu")
    ranks = [augment(batches(corpus, 1, batch_size=2, rank=rank)[0], "cpu") for rank in range(2)]
    assert torch.equal(torch.cat([one.views for one in ranks], dim=1), alone.views)
    assert torch.equal(torch.cat([one.subject for one in ranks]), alone.subject)
    assert [a + b for a, b in zip(*(one.scan_ids for one in ranks))] == alone.scan_ids


@pytest.mark.parametrize("other", [{"seed": 1}, {"stream": 1}, {"start_step": 1}, {"rank": 1}])
def test_another_seed_stream_step_or_rank_draws_other_views(corpus, other):
    assert (
        not np.isclose(batches(corpus, 1, **other)[0].matrices, batches(corpus, 1)[0].matrices).all(axis=(1, 2)).any()
    )


def test_a_loader_ends_where_it_is_told_to(corpus):
    assert [raw.step for raw in loader(corpus, start_step=2, stop_step=5)] == [2, 3, 4]


# --- damaged files


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def garble(path):
    path.write_bytes(bytes(path.stat().st_size))


def reshape(path):
    blosc2.asarray(np.zeros((1, 5, 6, 7), np.float16), urlpath=str(path), mode="w")


@pytest.mark.parametrize("damage", [Path.unlink, truncate, garble, reshape])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_scan_that_cannot_be_read_is_replaced(write_corpus, caplog, damage, workers):
    """In mid-run; the log names it and counts, and the other examples of the batch stay what they would have been."""
    corpus = write_corpus()
    whole = batches(corpus, 8)
    running = iter(loader(corpus, max_failed_share=0.5))
    first = next(running)
    damaged = corpus.path(0)
    damage(damaged)
    assert_same(first, whole[0])
    with caplog.at_level(logging.WARNING):
        rest = [*itertools.islice(running, 4)]
        from_worker = batches(corpus, 5, max_failed_share=0.5, workers=workers)
    assert caplog.messages[0].startswith(f"{damaged} cannot be read (")
    assert caplog.messages[0].endswith("; another draw takes its place (failure 1).")
    replaced = 0
    for expected, found, again in zip(whole[1:], rest, from_worker[1:]):
        assert_same(found, again)
        for place in range(4):
            scans = [[view[place] for view in raw.scan_ids] for raw in (expected, found)]
            assert damaged.stem not in scans[1]
            assert scans[0] == scans[1] or damaged.stem in scans[0]
            replaced += scans[0] != scans[1] or damaged.stem in scans[0]
    assert replaced > 0
    if damage is reshape:
        assert "its shape is (1, 5, 6, 7), the manifest says (1, 40, 48, 44)" in caplog.messages[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_when_too_many_scans_fail(write_corpus, workers):
    corpus = write_corpus()
    for row in range(2):
        corpus.path(row).unlink()
    with pytest.raises(UserError, match=r"could not be read, more than sampling.max_failed_share=0\.05 allows") as one:
        batches(corpus, 200, workers=workers)
    failed, drawn = map(int, re.match(r"(\d+) of the (\d+)", str(one.value)).groups())
    assert failed > 0.05 * max(drawn, 200)
    assert "\n" not in str(one.value)


def test_a_few_failures_are_tolerated_and_none_need_be(write_corpus):
    corpus = write_corpus()
    corpus.path(0).unlink()
    assert len(batches(corpus, 5, max_failed_share=0.5)) == 5
    with pytest.raises(UserError, match=r"of the \d+ scans drawn could .*max_failed_share=0 allows"):
        batches(corpus, 5, max_failed_share=0.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_is_gone_stops_at_once(write_corpus, workers):
    corpus = write_corpus()
    for row in range(len(corpus)):
        corpus.path(row).unlink()
    with pytest.raises(UserError, match="20 of the 20 scans drawn could not be read, 20 in a row") as one:
        batches(corpus, 1, max_failed_share=1.0, workers=workers)
    assert "\n" not in str(one.value)


# --- workers


def test_workers_read_ahead_before_the_first_batch_is_asked_for(corpus):
    before = set(multiprocessing.active_children())
    running = iter(loader(corpus, workers=2))
    assert len(set(multiprocessing.active_children()) - before) == 2
    next(running)


def test_workers_heed_no_request_to_stop_but_the_parents(corpus):
    """SLURM signals every process of a job at once, even those that have only just started."""
    before = set(multiprocessing.active_children())
    running = iter(loader(corpus, workers=2))
    workers = set(multiprocessing.active_children()) - before
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    kills = "; ".join(f"kill -{number.value} {worker.pid}" for worker in workers for number in numbers)
    try:
        for moment in range(2):  # at once, and when they are at work
            subprocess.run(["sh", "-c", kills], check=True)
            assert len([*itertools.islice(running, 10)]) == 10, moment
        assert all(worker.is_alive() for worker in workers)
        for worker in workers:
            worker.terminate()
            worker.join(20)
            assert worker.exitcode == 0
    finally:
        for worker in workers:  # one that stayed would keep the tests from ending
            worker.kill()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_a_worker_that_was_killed_is_explained(corpus):
    before = set(multiprocessing.active_children())
    running = iter(loader(corpus, workers=1))
    next(running)
    (worker,) = set(multiprocessing.active_children()) - before
    with pytest.raises(UserError, match=r"A process that reads scans died.*/dev/shm"), lost_workers_explained():
        worker.kill()
        worker.join()
        for _ in running:
            pass


@pytest.mark.parametrize(
    "error",
    [
        "DataLoader worker (pid(s) 7) exited unexpectedly",
        "DataLoader worker (pid 7) is killed by signal: Bus error. ",
        "Pin memory thread exited unexpectedly",
    ],
)
def test_whatever_torch_says_of_a_dead_worker_is_explained(error):
    with pytest.raises(UserError, match="A process that reads scans died"), lost_workers_explained():
        raise RuntimeError(error)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a bug") as one, lost_workers_explained():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0: a bug")
    assert not isinstance(one.value, UserError)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["raise RuntimeError('a bug')", "os.kill(workers[0].pid, signal.SIGKILL)"])
def test_a_crash_ends_the_process_though_workers_live(corpus, tmp_path, trouble):
    """At its exit Python waits for workers; they must let themselves be sent home."""
    corpus.scans.to_pickle(tmp_path / "scans.pkl")
    script = f"""
        import multiprocessing, os, signal
        from pathlib import Path
        import pandas as pd
        from nnunet_ssl.pretraining.views.augmentation import AugmentationConfig
        from nnunet_ssl.corpus.prepared import Corpus
        from nnunet_ssl.pretraining.views.loading import make_loader
        from nnunet_ssl.pretraining.views.sampling import SamplingConfig

        scans = pd.read_pickle({str(tmp_path / "scans.pkl")!r})
        corpus = Corpus(Path({str(corpus.folder)!r}), scans, {{"spacing": (1, 1, 1)}})
        loader = make_loader(
            corpus, kind="mcl", batch_size=2, patch_size=(16, 16, 16), sampling=SamplingConfig(),
            augmentation=AugmentationConfig(), seed=0, workers=2,
        )
        batches = iter(loader)
        next(batches)
        workers = multiprocessing.active_children()
        {trouble}
        for batch in batches:
            pass
    """
    started = time.monotonic()
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stderr
    assert time.monotonic() - started < 100


# --- a long life


def footprint():
    """Open files and resident bytes of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), resident  # noqa: PTH208


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("count", "workers"), [(300, 0), (300, 1), pytest.param(10_000, 0, marks=pytest.mark.slow)])
def test_nothing_leaks(corpus, count, workers):
    running = iter(loader(corpus, batch_size=1, patch_size=(8, 8, 8), workers=workers))
    footprints = []
    for number, raw in enumerate(itertools.islice(running, count)):
        augment(raw, "cpu")
        if number % 50 == 49:
            footprints.append(footprint())
    files, resident = np.transpose(footprints)
    assert files.max() <= files[0] + 4  # batches under way between processes hold a handle each
    assert np.median(resident[-3:]) - resident[1] < 8 * 2**20
