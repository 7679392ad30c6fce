"""Decay groups and schedules."""

import pytest

from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.optimization import build_optimizer, schedules


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
    assert set(schedules(0, load_config("cl"))) == {"learning_rate", "momentum", "contrastive_weight"}
