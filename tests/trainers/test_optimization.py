"""Learning rates and weight decay of encoder and decoder."""

import pytest
import torch

from nnunet_ssl.architectures.networks import SwinFPN
from nnunet_ssl.trainers.optimization import StepSchedule, build_optimizer

STEPS, FREEZE = 1000, 300


@pytest.fixture
def network():
    return SwinFPN(1, 2, embed_dim=6, depths=[1, 1], num_heads=[1, 1], window_size=2)


def rates(optimizer, step):
    schedule = StepSchedule(optimizer, steps=STEPS, epoch_steps=10, freeze_steps=FREEZE)
    schedule.set_step(step)
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def test_every_parameter_is_in_one_group_with_the_decay_of_its_kind(network):
    optimizer = build_optimizer(network, 5e-4, 5e-5)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups) == len([*network.parameters()])
    for name, parameter in network.named_parameters():
        plain = parameter.ndim == 1 or "relative_position_bias" in name
        assert decay[id(parameter)] == (0 if plain else 1e-3 if name.startswith("encoder.") else 1e-2), name


def test_the_decoder_warms_up_at_once_and_the_encoder_when_it_is_unfrozen(network):
    optimizer = build_optimizer(network, 5e-4, 5e-5)
    assert rates(optimizer, 0) == {"decoder": pytest.approx(5e-4 / 50), "encoder": 0}
    assert rates(optimizer, 49)["decoder"] == pytest.approx(5e-4)
    assert rates(optimizer, FREEZE - 1)["encoder"] == 0
    assert rates(optimizer, FREEZE)["encoder"] == pytest.approx(5e-5 / 50)
    assert rates(optimizer, FREEZE + 49)["encoder"] == pytest.approx(5e-5)


def test_both_end_at_a_fiftieth_of_their_peak(network):
    last = rates(build_optimizer(network, 5e-4, 5e-5), STEPS - 1)
    assert last == {"decoder": pytest.approx(1e-5), "encoder": pytest.approx(1e-6)}


def test_nnunets_call_once_an_epoch_sets_the_epochs_first_step(network):
    optimizer = build_optimizer(network, 5e-4, 5e-5)
    expected = rates(optimizer, 70)
    StepSchedule(optimizer, steps=STEPS, epoch_steps=10, freeze_steps=FREEZE).step(7)
    assert {group["part"]: group["lr"] for group in optimizer.param_groups} == expected


def test_parameters_shared_between_encoder_and_decoder_are_the_encoders():
    """nnU-Net's U-Net keeps its encoder inside the decoder as well."""
    network = torch.nn.Module()
    network.encoder, network.decoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    network.decoder.encoder = network.encoder
    groups = build_optimizer(network, 1.0, 0.5).param_groups
    assert {group["part"]: len(group["params"]) for group in groups} == {"decoder": 1, "encoder": 1}
