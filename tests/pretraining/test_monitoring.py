"""What is measured on held-out subjects."""

import functools
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nnunet_ssl.architectures.compiling import forget_compiled
from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.model import CPU, Learner
from nnunet_ssl.pretraining.monitoring import Validation, alignment, read_held_out
from nnunet_ssl.pretraining.objectives.contrastive import Queue, pooled, queue_figures
from nnunet_ssl.pretraining.optimization import schedules
from nnunet_ssl.representation import cross_modality_distance, cross_subject_distance


@pytest.fixture
def corpus(write_prepared):
    write_prepared(n_subjects=3, unpaired=2)
    return open_corpus(500)


def test_patches_are_central_and_only_of_known_modality(corpus, tiny):
    held_out = read_held_out(corpus, load_config("mim", tiny))
    assert held_out.patches.shape == (9, 1, 64, 32, 32)
    assert sorted(set(held_out.modality)) == ["flair", "t1", "t2"]
    first = corpus.scans.index[(corpus.scans["subject_index"] == held_out.subject[0])]
    row = next(row for row in first if corpus.scans["modality"][row] == held_out.modality[0])
    stored = blosc2.open(str(corpus.path(row)))[:]
    assert np.array_equal(held_out.patches[0].numpy(), stored[:, 4:68, 4:36, 4:36])


def test_beyond_the_volume_the_edge_repeats(corpus, tiny):
    held_out = read_held_out(corpus, load_config("mim", [*tiny, "patch_size=96,32,32"]))
    patch = held_out.patches[0, 0]
    assert torch.equal(patch[0], patch[12])
    assert torch.equal(patch[-1], patch[-13])
    assert not torch.equal(patch[12], patch[13])


def test_different_subjects_come_first(corpus, tiny):
    held_out = read_held_out(corpus, load_config("mim", [*tiny, "validation.sessions=2"]))
    assert len(set(held_out.subject)) == 2
    assert len(held_out.patches) == 6


def truncate(path):
    path.write_bytes(path.read_bytes()[:700])


def garble(path):
    path.write_bytes(bytes(path.stat().st_size))


def reshape(path):
    path.unlink()
    blosc2.asarray(np.zeros((1, 5, 6, 7), np.float16), urlpath=str(path))


@pytest.mark.parametrize("damage", [Path.unlink, truncate, garble, reshape])
def test_scans_that_cannot_be_read_are_left_out_and_counted(corpus, tiny, caplog, damage):
    config = load_config("mim", tiny)
    whole = read_held_out(corpus, config)
    damaged = corpus.scans.index[corpus.scans["modality"] == "t2"][:2]
    for row in damaged:
        damage(corpus.path(row))
    held_out = read_held_out(corpus, config)
    assert len(held_out.patches) == len(held_out.subject) == len(held_out.modality) == 7
    kept = [any(torch.equal(one, other) for other in held_out.patches) for one in whole.patches]
    assert kept == [modality != "t2" or subject == 2 for modality, subject in zip(whole.modality, whole.subject)]
    assert all(f"{corpus.path(row)} cannot be read (" in caplog.text for row in damaged)
    assert "2 of 9 scans are left out, unreadable" in caplog.text
    assert len(corpus.readable()) == len(corpus) - 2


def test_nothing_readable_is_an_error_that_names_a_file_and_what_to_do(corpus, tiny):
    for row in range(len(corpus)):
        truncate(corpus.path(row))
    for look in (corpus.readable, lambda: read_held_out(corpus, load_config("mim", tiny))):
        with pytest.raises(UserError, match=r"Not one of .*t1\.b2nd cannot be read.*nnssl_prepare -d Dataset500"):
            look()


def test_alignment_is_taken_on_the_pooled_bottleneck_before_the_projection(corpus, tiny):
    config = load_config("mcl", tiny)
    learner, held_out = Learner(config), read_held_out(corpus, config)
    figures = alignment(learner, held_out)
    with torch.no_grad():
        embeddings = pooled(learner.query.encoder(held_out.patches.float())[-1]).numpy()
    aligned = cross_modality_distance(embeddings, held_out.subject, held_out.modality).mean
    apart = cross_subject_distance(embeddings, held_out.subject).mean
    assert figures["validation/cross_modality_distance"] == pytest.approx(aligned, rel=1e-4)
    assert figures["validation/cross_subject_distance"] == pytest.approx(apart, rel=1e-4)
    assert 1 <= figures["validation/effective_rank"] <= 9


def test_reconstruction_is_repeatable_and_by_modality(corpus, tiny):
    config = load_config("mim", tiny)
    learner, held_out = Learner(config), read_held_out(corpus, config)
    (voxels,) = config.objectives
    figures, examples = voxels.reconstruct(learner.query, held_out)
    assert voxels.reconstruct(learner.query, held_out)[0] == figures
    assert set(figures) == {"validation/error/flair", "validation/error/t1", "validation/error/t2"}
    assert all(value > 0 for value in figures.values())
    assert [example.modality for example in examples] == ["flair", "t1", "t2"]
    shown = held_out.patches[list(held_out.modality).index("t1"), 0].float()
    assert np.array_equal(examples[1].whole, shown[32].flip(0).numpy())  # front of the head upwards
    assert examples[1].hidden.all() or not examples[1].hidden.any()  # 64 x 32 x 32 is two cells, one above the other


class Collected:
    """Records that keep the figures they are given."""

    def __init__(self):
        self.figures = set()

    def add(self, figures):
        self.figures |= figures.keys()

    def picture(self, name, figure, step):
        self.figures.add(name)


@pytest.mark.compiled
def test_validation_compiles_nothing(corpus, tiny, monkeypatch):
    """Batches of the training's sizes and of others, with masks and without, through the networks of a compiled run."""
    counter, compile_module = CompileCounterWithBackend("eager"), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_module, backend=counter))
    config = load_config("mcl_mim", [*tiny, "compile=true", "validation.batches=1"])
    learner, records = Learner(config), Collected()
    figures = Validation(corpus, config, CPU).measure(learner, schedules(0, config), records, step=0)
    assert {"validation/loss/masked", "validation/loss/contrastive", "reconstruction"} <= records.figures
    assert {"validation/effective_rank", "validation/error/t1"} <= figures.keys()
    assert not counter.graphs
    with torch.no_grad():
        learner.query.encode(torch.zeros(2, 1, *config.patch_size))
    assert counter.graphs, "a training compiles"
    forget_compiled()


def test_the_queues_figures_tell_collapse_from_spread():
    def figures_of(keys):
        queue = Queue(4096, 16)
        queue.enqueue(torch.nn.functional.normalize(keys, dim=1), torch.arange(len(keys)), torch.arange(len(keys)))
        return queue_figures(queue)

    generator = torch.Generator().manual_seed(0)
    spread = figures_of(torch.randn(3000, 16, generator=generator))
    collapsed = figures_of(torch.ones(3000, 16) + 1e-3 * torch.randn(3000, 16, generator=generator))
    assert spread["queue/effective_rank"] > 14
    assert collapsed["queue/effective_rank"] < 1.5
    assert spread["queue/uniformity"] < -3
    assert collapsed["queue/uniformity"] > -0.01
    assert queue_figures(Queue(8, 4)) == {}
