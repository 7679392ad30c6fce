"""A frozen encoder: no gradients, no part in the clip, right in every wrapper."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_ssl.architectures.compiling import compile_parts
from nnunet_ssl.architectures.networks import SwinFPN
from nnunet_ssl.trainers.freezing import unwrapped, with_trainable_encoder
from nnunet_ssl.trainers.optimization import build_optimizer

PLANS = {"embed_dim": 6, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}


def new_network():
    torch.manual_seed(0)
    return SwinFPN(1, 2, **PLANS)


def batch(seed=0):
    return torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def step(network, optimizer, x, clip=2.0):
    optimizer.zero_grad(set_to_none=True)
    network(x).square().mean().mul(1e3).backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
    return norm


def parts(network):
    core = unwrapped(network)
    return (
        {name: tensor.clone() for name, tensor in part.state_dict().items()} for part in (core.encoder, core.decoder)
    )


def moved(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


def saved_bytes(network, x):
    """Bytes that autograd keeps for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        network(x)
    return sum(sizes)


def not_compiled(network):
    return network


def compiled_as_a_whole(network):
    """As nnU-Net does it."""
    return torch.compile(network, backend="aot_eager")


def compiled_in_parts(network):
    compile_parts(network, backend="aot_eager")
    return network


@pytest.mark.compiled
@pytest.mark.parametrize(
    "wrap", [not_compiled, compiled_in_parts, pytest.param(compiled_as_a_whole, marks=pytest.mark.slow)]
)
def test_the_encoder_rests_while_frozen_and_moves_afterwards(wrap):
    """And rests again: nothing that was compiled for the other state is used."""
    network = wrap(new_network())
    optimizer = build_optimizer(unwrapped(network), 1e-3, 1e-3)
    for round, trainable in enumerate((False, True, False)):
        network = with_trainable_encoder(network, trainable)
        encoder, decoder = parts(network)
        for seed in range(2):
            step(network, optimizer, batch(2 * round + seed))
        encoder_after, decoder_after = parts(network)
        assert len(moved(encoder, encoder_after)) == (len(encoder) if trainable else 0)
        assert moved(decoder, decoder_after)


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_nnunets_residual_network_compiled_as_a_whole_learns_after_the_unfreeze(backend):
    torch.manual_seed(0)
    stages = {"n_stages": 3, "features_per_stage": [4, 6, 8], "kernel_sizes": 3, "strides": [1, 2, 2]}
    blocks = {"n_blocks_per_stage": [1, 2, 1], "n_conv_per_stage_decoder": 1}
    layers = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    plain = ResidualEncoderUNet(1, num_classes=2, **stages, **blocks, **layers, deep_supervision=False)
    network = torch.compile(plain, backend=backend)
    for trainable in (False, True, False):
        network = with_trainable_encoder(network, trainable)
        network.zero_grad(set_to_none=True)
        network(batch()).square().mean().backward()
        assert {one.grad is not None for one in plain.encoder.parameters()} == {trainable}
        received = [one.grad for one in plain.encoder.parameters()]
        network.zero_grad(set_to_none=True)
        plain(batch()).square().mean().backward()
        for parameter, gradient in zip(plain.encoder.parameters(), received):
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-3)


def test_the_frozen_encoder_takes_no_part_in_the_clip():
    """The second frozen step counts: gradients that are never zeroed would have added up by then."""
    network = with_trainable_encoder(new_network(), False)
    optimizer = build_optimizer(network, 1e-3, 1e-3)
    step(network, optimizer, batch(0))
    features = network.encoder(batch(1))
    alone = torch.autograd.grad(
        network.decoder(features, (16, 16, 16)).square().mean() * 1e3, [*network.decoder.parameters()]
    )
    assert all(parameter.grad is None for parameter in network.encoder.parameters())
    norm = torch.stack([gradient.norm() for gradient in alone]).norm()
    assert norm > 2, "the clip must bite"
    torch.testing.assert_close(step(network, optimizer, batch(1)), norm)
    clipped = torch.stack([parameter.grad.norm() for parameter in network.decoder.parameters()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(2.0), atol=1e-4, rtol=0)


def test_a_frozen_encoder_keeps_nothing_for_the_backward_pass():
    network = new_network()
    everything = saved_bytes(network, batch())
    with torch.no_grad():
        features = network.encoder(batch())
    decoder = saved_bytes(lambda maps: network.decoder(maps, (16, 16, 16)), features)
    assert saved_bytes(with_trainable_encoder(network, False), batch()) == decoder < everything / 2


def test_a_frozen_encoder_is_in_evaluation_mode_and_validation_stays_so_after_the_unfreeze():
    network = with_trainable_encoder(new_network().train(), False)
    assert not network.encoder.training and network.decoder.training
    assert not with_trainable_encoder(network.eval(), True).encoder.training


def train_as_one_of_two(rank, folder, wrap):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch._dynamo.config.optimize_ddp = False  # as the trainer sets it
    network = DistributedDataParallel(wrap(new_network()))
    optimizer = build_optimizer(unwrapped(network), 1e-3, 1e-3)
    states = [dict(unwrapped(network).state_dict())]
    for trainable in (False, True):
        network = with_trainable_encoder(network, trainable)
        for seed in range(2):
            step(network, optimizer, batch(2 * seed + rank), clip=1e9)
        states.append(copy.deepcopy(unwrapped(network).state_dict()))
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("wrap", [not_compiled, compiled_as_a_whole, compiled_in_parts])
def test_two_processes_stay_equal_to_each_other_and_to_one_on_both_batches(tmp_path, wrap):
    mp.spawn(train_as_one_of_two, (str(tmp_path), wrap), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = new_network()
    optimizer = build_optimizer(alone, 1e-3, 1e-3)
    for phase, trainable in enumerate((False, True), start=1):
        alone = with_trainable_encoder(alone, trainable)
        for seed in range(2):
            step(alone, optimizer, torch.cat([batch(2 * seed), batch(2 * seed + 1)]), clip=1e9)
        for name, tensor in alone.state_dict().items():
            assert torch.equal(first[phase][name], second[phase][name]), name
            torch.testing.assert_close(first[phase][name], tensor, atol=2e-5, rtol=1e-3)
