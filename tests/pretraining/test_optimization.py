"""Decay groups and schedules."""

import pytest
import torch

from nnunet_ssl.decay import decay_groups
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.optimization import build_optimizer, restore_optimizer, schedules


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
