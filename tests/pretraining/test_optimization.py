"""Decay groups and schedules."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_ssl.decay import decay_groups
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.optimization import (
    BranchAdamW,
    build_optimizer,
    restore_optimizer,
    schedules,
    set_learning_rate,
)


def test_biases_norms_position_biases_and_the_mask_token_do_not_decay(tiny):
    network = Learner(load_config("mcl_mim", tiny)).query
    decayed, free = build_optimizer(network, load_config("mcl_mim", tiny)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, free = ([names[id(parameter)] for parameter in group["params"]] for group in (decayed, free))
    assert sorted(decayed + free) == sorted(names.values())
    assert "encoder.mask_token" in free
    assert any("relative_position_bias_table" in name for name in free)
    assert not any(name.endswith(".bias") or "norm" in name for name in decayed)
    assert "projection.layers.0.weight" in decayed


def test_a_resumed_optimizer_keeps_its_own_weight_decay_and_kind_of_update():
    network = torch.nn.Linear(3, 2)

    def optimizer(**options):
        groups = decay_groups(network.named_parameters(), options.pop("weight_decay"))
        return torch.optim.AdamW(groups, lr=0.1, **options)

    before = optimizer(weight_decay=0.01, fused=False)
    network(torch.ones(1, 3)).sum().backward()
    before.step()
    saved = before.state_dict()
    after = optimizer(weight_decay=0.5, fused=True)
    restore_optimizer(after, saved)
    assert [group["weight_decay"] for group in after.param_groups] == [0.5, 0.0]
    assert [group["fused"] for group in after.param_groups] == [True, True]
    for parameter in network.parameters():
        assert torch.equal(after.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])
        assert after.state[parameter]["step"] == 1
    after.step()
    assert saved["param_groups"][0]["weight_decay"] == 0.01


def test_the_numbers_of_the_papers_schedule():
    config = load_config("mcl_mim")
    numbers = {step: schedules(step, config) for step in (0, 2000, 3999, 4000, 10_000, 15_000, 40_000, 199_999)}
    assert numbers[0]["learning_rate"] == pytest.approx(1e-4 / 4000)
    assert numbers[3999]["learning_rate"] == numbers[4000]["learning_rate"] == pytest.approx(1e-4)
    assert numbers[199_999]["learning_rate"] == pytest.approx(1e-5)
    assert numbers[10_000]["contrastive_weight"] == pytest.approx(0.1)
    assert numbers[15_000]["contrastive_weight"] == pytest.approx(0.55)
    assert numbers[40_000]["contrastive_weight"] == 1.0
    assert numbers[10_000]["momentum"] == pytest.approx(0.996)
    assert numbers[40_000]["momentum"] == pytest.approx(0.999)


def test_a_schedule_has_no_numbers_that_its_recipe_does_not_use():
    assert set(schedules(0, load_config("mim"))) == {"learning_rate"}
    assert set(schedules(0, load_config("cl"))) == {"learning_rate", "momentum"}
    assert set(schedules(0, load_config("cl_mim"))) == {"learning_rate", "momentum", "contrastive_weight"}


def two_layers():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"encoder": torch.nn.Linear(3, 4), "head": torch.nn.Linear(4, 1)})


def branch_adamw(network, factors, weight_decay=0.3):
    groups = decay_groups(network.named_parameters(), weight_decay)
    return BranchAdamW(groups, list(network["encoder"].parameters()), factors, lr=0.01)


def feed(network, optimizer, step, branches):
    """Gradients drawn for `step`: of the head, and by branch of the encoder; the bias gets none in some steps."""
    generator = torch.Generator().manual_seed(step)
    for parameter in network["head"].parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return {
        branch: [
            None if parameter.ndim == 1 and step % 3 == 1 else torch.randn(parameter.shape, generator=generator)
            for parameter in network["encoder"].parameters()
        ]
        for branch in branches
    }


@given(st.floats(0, 10), st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_adamw_by_branch_with_one_branch_is_adamw(weight_decay, steps):
    plain, apart = two_layers(), two_layers()
    one = torch.optim.AdamW(decay_groups(plain.named_parameters(), weight_decay), lr=0.01)
    other = branch_adamw(apart, {"only": 1.0}, weight_decay)
    for step in range(steps):
        set_learning_rate(one, 0.01 / (1 + step))
        set_learning_rate(other, 0.01 / (1 + step))
        (gradients,) = feed(plain, one, step, ["only"]).values()
        for parameter, gradient in zip(plain["encoder"].parameters(), gradients):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
        other.take({"only": [parameter.grad.clone() for parameter in plain["encoder"].parameters()]})
        feed(apart, other, step, [])
        one.step()
        other.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(apart.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


def test_branches_move_the_encoder_by_the_sum_of_what_each_would_and_it_decays_once():
    start, factors = two_layers(), {"a": 1.0, "b": 0.1}
    moved = {}
    for branches in (["a"], ["b"], ["a", "b"], []):
        network = copy.deepcopy(start)
        optimizer = branch_adamw(network, factors)
        for step in range(4):
            gradients = feed(network, optimizer, step, factors)
            optimizer.take({name: one if name in branches else [None, None] for name, one in gradients.items()})
            optimizer.step()
        moved["".join(branches)] = network["encoder"].bias - start["encoder"].bias  # does not decay
    torch.testing.assert_close(moved["ab"], moved["a"] + moved["b"])
    assert moved["a"].abs().sum() > 5 * moved["b"].abs().sum() > 0
    assert not moved[""].any()
    torch.testing.assert_close(network["encoder"].weight, start["encoder"].weight * (1 - 0.01 * 0.3) ** 4)


def test_a_branch_with_larger_gradients_moves_the_encoder_no_further():
    """Its moments are its own: that is what learning rates by branch are for."""
    moved = []
    for size in (1.0, 1000.0):
        network = two_layers()
        optimizer = branch_adamw(network, {"a": 1.0, "b": 1.0}, 0.0)
        for step in range(3):
            gradients = feed(network, optimizer, 3 * step, ["a", "b"])
            optimizer.take(gradients | {"b": [size * one for one in gradients["b"]]})
            optimizer.step()
        moved.append(network["encoder"].weight.detach())
    torch.testing.assert_close(*moved)


def test_adamw_by_branch_goes_on_from_its_state_bit_for_bit_and_takes_a_new_factor():
    factors = {"a": 1.0, "b": 0.3}
    unbroken, broken = two_layers(), two_layers()
    first, second = branch_adamw(unbroken, factors), branch_adamw(broken, factors)
    for step in range(6):
        if step == 3:
            saved, second = copy.deepcopy(second.state_dict()), branch_adamw(broken, factors)
            restore_optimizer(second, saved)
        for network, optimizer in ((unbroken, first), (broken, second)):
            set_learning_rate(optimizer, 0.01)
            optimizer.take(feed(network, optimizer, step, factors))
            optimizer.step()
    for name, parameter in unbroken.named_parameters():
        assert torch.equal(broken.get_parameter(name), parameter), name
    changed = branch_adamw(broken, {"a": 1.0, "b": 0.5})
    restore_optimizer(changed, first.state_dict())
    set_learning_rate(changed, 0.02)
    assert [group["lr"] for group in changed.param_groups] == [0.02, 0.02, 0.02, 0.01]
