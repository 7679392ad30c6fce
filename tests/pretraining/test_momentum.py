"""The moving average and the queue."""

import copy

import torch
from torch import nn

from nnunet_ssl.pretraining.momentum import move_towards
from nnunet_ssl.pretraining.objectives.contrastive import EMPTY, Queue


def fill(queue, first, count):
    """Enqueue keys that carry the numbers first .. first + count - 1."""
    numbers = torch.arange(first, first + count)
    queue.enqueue(numbers[:, None].float().expand(-1, queue.keys.shape[1]), numbers, numbers + 100)


def test_a_new_queue_is_empty():
    queue = Queue(5, 3)
    assert (queue.subjects == EMPTY).all()
    assert queue.filled().shape == (0, 3)


def test_the_queue_overwrites_its_oldest_slots():
    queue = Queue(5, 3)
    fill(queue, 0, 3)
    fill(queue, 3, 4)
    assert queue.subjects.tolist() == [5, 6, 2, 3, 4]
    assert queue.sessions.tolist() == [105, 106, 102, 103, 104]
    assert queue.keys[:, 0].tolist() == [5, 6, 2, 3, 4]
    fill(queue, 7, 1)
    assert queue.subjects.tolist() == [5, 6, 7, 3, 4]


def test_of_more_keys_than_slots_the_last_stay():
    queue = Queue(3, 2)
    fill(queue, 0, 8)
    assert sorted(queue.subjects.tolist()) == [5, 6, 7]
    assert len(queue.filled()) == 3


def test_a_checkpoint_holds_the_queue():
    queue, restored = Queue(5, 3), Queue(5, 3)
    fill(queue, 0, 7)
    restored.load_state_dict(queue.state_dict())
    for one in (queue, restored):
        fill(one, 7, 1)
    assert torch.equal(queue.keys, restored.keys)
    assert queue.subjects.tolist() == restored.subjects.tolist() == [7, 3, 4, 5, 6]


def test_the_average_moves_every_parameter_and_buffer():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = copy.deepcopy(network)
    before = copy.deepcopy(average.state_dict())
    for _ in range(2):
        network(torch.randn(8, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    move_towards(average, network, 0.9)
    for name, theirs in network.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * theirs if theirs.is_floating_point() else theirs
        torch.testing.assert_close(average.state_dict()[name], expected)
    assert average[1].num_batches_tracked == 2


def test_modules_that_the_average_lacks_are_left_out():
    network = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    average = nn.ModuleDict({"encoder": copy.deepcopy(network["encoder"])})
    with torch.no_grad():
        network["encoder"].weight += 1
    before = average["encoder"].weight.clone()
    move_towards(average, network, 0.75)
    torch.testing.assert_close(average["encoder"].weight, before + 0.25)
