"""Learning rates and weight decay of encoder and decoder."""

import copy
import types

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_ssl.architectures.networks import SwinFPN
from nnunet_ssl.trainers.optimization import StepSchedule, build_optimizer
from nnunet_ssl.trainers.schedules import Schedule

SCHEDULE = Schedule(steps=1000, freeze_steps=300, warmup_steps=50, decay="cosine", restarts=False)
FREEZE, STEPS = SCHEDULE.freeze_steps, SCHEDULE.steps


@pytest.fixture
def network():
    return SwinFPN(1, 2, embed_dim=6, depths=[1, 1], num_heads=[1, 1], window_size=2)


def rates(optimizer, step):
    StepSchedule(optimizer, SCHEDULE, epoch_steps=10).set_step(step)
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
    StepSchedule(optimizer, SCHEDULE, epoch_steps=10).step(7)
    assert {group["part"]: group["lr"] for group in optimizer.param_groups} == expected


@pytest.fixture
def residual_unet():
    torch.manual_seed(0)
    stages = {"n_stages": 3, "features_per_stage": [4, 6, 8], "kernel_sizes": 3, "strides": [1, 2, 2]}
    blocks = {"n_blocks_per_stage": [1, 2, 1], "n_conv_per_stage_decoder": 1}
    layers = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    return ResidualEncoderUNet(1, num_classes=2, **stages, **blocks, **layers, deep_supervision=False)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_decoders_parameters_are_the_decoders_alone(residual_unet, name):
    """nnU-Net's U-Net holds its encoder inside the decoder as well."""
    encoder = {id(parameter) for parameter in residual_unet.encoder.parameters()}
    assert encoder < {id(parameter) for parameter in residual_unet.decoder.parameters()}, "no alias: the test is idle"
    groups = build_optimizer(residual_unet, 1.0, 0.5, name).param_groups
    held = {part: [id(p) for g in groups if g["part"] == part for p in g["params"]] for part in ("encoder", "decoder")}
    assert set(held["encoder"]) == encoder
    assert sorted(held["encoder"] + held["decoder"]) == sorted(id(p) for p in residual_unet.parameters())


def test_sgd_takes_nnunets_steps(residual_unet):
    """With one rate for all, as nnU-Net has it: the weights are equal after steps with momentum and decay."""
    theirs = copy.deepcopy(residual_unet)
    stock = types.SimpleNamespace(network=theirs, initial_lr=0.01, weight_decay=3e-5, num_epochs=5)
    stock_optimizer, stock_schedule = nnUNetTrainer.configure_optimizers(stock)
    optimizer = build_optimizer(residual_unet, 0.01, 0.01, "sgd")
    schedule = StepSchedule(
        optimizer, Schedule(steps=5, freeze_steps=0, warmup_steps=0, decay="poly", restarts=False), epoch_steps=1
    )
    before = copy.deepcopy(residual_unet.state_dict())
    for step in range(5):
        schedule.set_step(step)
        stock_schedule.step(step)
        x = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(step))
        for network, one in ((residual_unet, optimizer), (theirs, stock_optimizer)):
            one.zero_grad(set_to_none=True)
            network(x).square().mean().backward()
            one.step()
    for name, tensor in residual_unet.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert not all(torch.equal(tensor, before[name]) for name, tensor in residual_unet.state_dict().items())
