"""Freeze and unfreeze the encoder of a network that nnU-Net may have compiled and wrapped."""

from __future__ import annotations

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_ssl.architectures.channels import Pooled
from nnunet_ssl.architectures.compiling import forget_compiled


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of DDP and torch.compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def encoder_of(network: nn.Module) -> nn.Module:
    """Return the encoder inside a network that may be wrapped, and that may use it on one channel at a time."""
    encoder = unwrapped(network).get_submodule("encoder")
    return encoder.module if isinstance(encoder, Pooled) else encoder


def with_trainable_encoder(network: nn.Module, trainable: bool) -> nn.Module:
    """Switch the encoder's gradients on or off and return the network to use from now on.

    Gradients of a frozen encoder are not computed at all: they would cost time and memory, and enter the norm by which
    the decoder's are clipped. A frozen encoder is in evaluation mode, so no statistics of batches change either.

    DDP decides when it wraps which gradients it synchronises, so a wrapped network is wrapped anew; all processes must
    call this at the same step. What was compiled for the other state is dropped: PyTorch does not always notice that
    parameters want gradients now, and would never train the encoder.
    """
    encoder = encoder_of(network)
    forget_compiled()
    encoder.requires_grad_(trainable)
    encoder.train(trainable and network.training)
    if isinstance(network, DistributedDataParallel):
        return with_own_buffers(DistributedDataParallel(network.module, device_ids=network.device_ids))
    return network


def with_own_buffers(network: nn.Module) -> nn.Module:
    """Stop DDP from sending the buffers of rank 0 to the others at each forward pass; return the network.

    They are constants. And nnU-Net validates through DDP with another number of forward passes on each rank: an
    exchange in each of them would wait for a partner that has none left.
    """
    if isinstance(network, DistributedDataParallel):
        network.broadcast_buffers = False
    return network
