"""InfoNCE with a queue, against a reference that loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from nnunet_ssl.pretraining.objectives.contrastive import EMPTY, ProjectionHead, info_nce, symmetric_info_nce


def sphere(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def naive(queries, keys, subjects, queue_keys, queue_subjects, temperature):
    losses = []
    for query, key, subject in zip(queries, keys, subjects):
        positive = math.exp(float(query @ key) / temperature)
        total = positive
        for negative, owner in zip(queue_keys, queue_subjects):
            if owner != EMPTY and owner != subject:
                total += math.exp(float(query @ negative) / temperature)
        losses.append(-math.log(positive / total))
    return sum(losses) / len(losses)


@pytest.fixture
def problem():
    subjects = torch.tensor([0, 1, 2, 2])
    queue_subjects = torch.tensor([0, 1, 1, 5, EMPTY, 2, 7, EMPTY])
    return sphere(4, 6), sphere(4, 6, seed=1), subjects, sphere(8, 6, seed=2), queue_subjects


@pytest.mark.parametrize("filled", [0, 1, 5, 8])
def test_guessing_is_one_however_full_the_queue_is(filled):
    """Keys that are all alike cannot be told apart; each query is left the negatives of other subjects."""
    alike = torch.ones(8, 4) / 2
    subjects = torch.tensor([0, 1, 0, 2, 3, 4, 5, 6]).masked_fill(torch.arange(8) >= filled, EMPTY)
    result = info_nce(alike[:3], alike[:3], torch.tensor([0, 1, 9]), alike, subjects, 0.2)
    assert float(result.over_guessing) == pytest.approx(1, abs=1e-5)


def test_what_beats_guessing_is_below_one_and_what_loses_to_it_above():
    keys = torch.eye(4)
    subjects = torch.arange(4) + 10
    for queries, below in ((keys, True), (keys.roll(1, dims=0), False)):
        result = info_nce(queries, keys, torch.arange(4), keys.roll(1, dims=0), subjects, 0.2)
        assert (float(result.over_guessing) < 1) == below


def test_info_nce_equals_the_sum_over_other_subjects(problem):
    assert float(info_nce(*problem, 0.2).loss) == pytest.approx(naive(*problem, 0.2), abs=1e-12)


def test_entries_of_the_own_subject_and_empty_slots_change_nothing(problem):
    queries, keys, subjects, queue_keys, queue_subjects = problem
    subjects = torch.zeros_like(subjects)
    queries.requires_grad_()
    reference = info_nce(queries, keys, subjects, queue_keys, queue_subjects, 0.2)
    changed = queue_keys.clone()
    changed[(queue_subjects == 0) | (queue_subjects == EMPTY)] = 100.0
    result = info_nce(queries, keys, subjects, changed, queue_subjects, 0.2)
    assert torch.equal(result.loss, reference.loss)
    assert torch.equal(torch.autograd.grad(result.loss, queries)[0], torch.autograd.grad(reference.loss, queries)[0])


def test_without_negatives_the_loss_and_its_gradient_are_zero_and_finite(problem):
    queries, keys, subjects, queue_keys, _ = problem
    queries.requires_grad_()
    result = info_nce(queries, keys, subjects, queue_keys, torch.full((8,), EMPTY), 0.2)
    result.loss.backward()
    assert result.loss == 0
    assert result.negatives == 0
    assert torch.equal(queries.grad, torch.zeros_like(queries))


def test_negatives_are_counted_and_accuracy_is_the_share_of_keys_found():
    axes = torch.eye(4)
    queue_keys, queue_subjects = axes[[2, 3]], torch.tensor([2, EMPTY])
    queries, keys = axes[[0, 1, 2]], axes[[0, 1, 3]]  # the third query lies on the negative
    result = info_nce(queries, keys, torch.tensor([0, 1, 3]), queue_keys, queue_subjects, 0.2)
    assert float(result.accuracy) == pytest.approx(2 / 3)
    assert float(result.negatives) == 1


def test_symmetric_loss_is_the_mean_of_both_directions(problem):
    queries, keys, subjects, queue_keys, queue_subjects = problem
    queries, keys = torch.stack([queries, sphere(4, 6, seed=3)]), torch.stack([keys, sphere(4, 6, seed=4)])
    rest = (subjects, queue_keys, queue_subjects, 0.2)
    expected = 0.5 * (naive(queries[0], keys[1], *rest) + naive(queries[1], keys[0], *rest))
    assert float(symmetric_info_nce(queries, keys, *rest).loss) == pytest.approx(expected, abs=1e-12)


def test_projections_lie_on_the_unit_sphere_and_forget_where_things_are():
    head = ProjectionHead(12, 8, 4)
    bottleneck = torch.randn(3, 12, 2, 2, 2)
    projected = head(bottleneck)
    assert projected.shape == (3, 4)
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(head(bottleneck.flip(2, 3, 4)), projected)
