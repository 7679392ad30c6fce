"""What each step sees."""

import itertools

import pytest
import torch

from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining import distributed
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.views import streams
from nnunet_ssl.pretraining.views.loading import make_loader
from nnunet_ssl.pretraining.views.streams import Stream


@pytest.fixture
def corpus(write_prepared):
    write_prepared()
    return open_corpus(500)


@pytest.fixture
def open_stream(corpus, tiny):
    def open_one(recipe, *overrides, start=0):
        config = load_config(recipe, [*tiny, *overrides])
        return Stream(corpus, config, device=torch.device("cpu"), start=start, workers=0)

    return open_one


def test_a_combined_recipe_sees_pairs_and_the_scans_that_cannot_pair(open_stream):
    examples = next(open_stream("mcl_mim"))
    assert examples.batch.views.shape == (2, 2, 1, 64, 32, 32)
    assert examples.unpaired.views.shape == (1, 2, 1, 64, 32, 32)
    assert examples.mask.shape == (6, 2, 1, 1)
    assert examples.views.shape == examples.targets.shape == (6, 1, 64, 32, 32)
    assert all("scan_1" in scan for scan in examples.unpaired.scan_ids[0])
    assert torch.equal(examples.views[:4], examples.paired_views)


def test_a_single_branch_sees_no_second_stream(open_stream):
    assert next(open_stream("mcl")).unpaired is None
    assert next(open_stream("mcl")).mask is None
    examples = next(open_stream("mim"))
    assert examples.unpaired is None
    assert examples.batch.views.shape[:2] == (1, 2)
    assert next(open_stream("mcl_mim", "masked.unpaired_batch_size=0")).unpaired is None


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_memory_is_pinned_for_a_training_on_a_gpu_alone(corpus, tiny, monkeypatch, device, pinned):
    """A training on the CPU leaves the machine's GPUs to others."""
    loaders = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(streams, "make_loader", lambda *_, **options: loaders.append(make_loader(*_, **options)) or [])
    Stream(corpus, load_config("mcl_mim", tiny), device=torch.device(device), start=0, workers=0)
    assert [one.loader.pin_memory for one in loaders] == [pinned, pinned]


def test_a_later_start_continues_the_same_sequence(open_stream):
    whole = list(itertools.islice(open_stream("mcl_mim"), 4))
    rest = list(itertools.islice(open_stream("mcl_mim", start=2), 2))
    for expected, found in zip(whole[2:], rest):
        assert torch.equal(expected.views, found.views)
        assert torch.equal(expected.mask, found.mask)
    assert not torch.equal(whole[0].mask, whole[1].mask) or not torch.equal(whole[1].mask, whole[2].mask)


def test_two_ranks_see_together_what_one_process_sees(open_stream, monkeypatch):
    alone = next(open_stream("mcl_mim", "batch_size=4", "patch_size=64,64,32"))
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        ranks.append(next(open_stream("mcl_mim", "batch_size=4", "patch_size=64,64,32")))
    torch.testing.assert_close(torch.cat([one.batch.views for one in ranks], dim=1), alone.batch.views)
    torch.testing.assert_close(torch.cat([one.unpaired.views for one in ranks], dim=1), alone.unpaired.views)
    paired = torch.cat([one.mask[:4].unflatten(0, (2, 2)) for one in ranks], dim=1).flatten(0, 1)
    assert torch.equal(paired, alone.mask[:8])
    assert torch.equal(torch.cat([one.mask[4:] for one in ranks]), alone.mask[8:])


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_parts_of_a_step_see_together_what_it_sees_at_once(open_stream, monkeypatch, world_size):
    settings = ("batch_size=8", "masked.unpaired_batch_size=4", "patch_size=64,64,32")
    alone = list(itertools.islice(open_stream("mcl_mim", *settings), 3))[1:]
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    ranks = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        stream = open_stream("mcl_mim", *settings, "accumulation=2", start=1)
        ranks.append(list(itertools.islice(stream, 4)))
    for step, whole in enumerate(alone):
        parts = [part for rank in ranks for part in rank[2 * step : 2 * step + 2]]
        count = 8 // len(parts)
        torch.testing.assert_close(torch.cat([one.batch.views for one in parts], dim=1), whole.batch.views)
        torch.testing.assert_close(torch.cat([one.unpaired.views for one in parts], dim=1), whole.unpaired.views)
        paired = torch.cat([one.mask[: 2 * count].unflatten(0, (2, count)) for one in parts], dim=1).flatten(0, 1)
        assert torch.equal(paired, whole.mask[:16])
        assert torch.equal(torch.cat([one.mask[2 * count :] for one in parts]), whole.mask[16:])


def test_a_batch_must_divide_among_processes_and_parts(open_stream, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(UserError, match="batch_size=2 cannot be shared by 4 processes in 1 parts"):
        open_stream("mim")
    with pytest.raises(UserError, match=r"masked.unpaired_batch_size=2 cannot be shared"):
        open_stream("mcl_mim", "batch_size=4")
