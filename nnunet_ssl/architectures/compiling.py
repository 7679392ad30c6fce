"""torch.compile as this package uses it: part by part, and never with what was compiled for another state.

Dynamo keeps what it compiled beside the code that it read, for every module of the class, and decides by guards whether
it serves again. Some releases leave out guards that matter here: in PyTorch 2.11 a parameter that begins to want
gradients goes on without them (https://github.com/pytorch/pytorch/issues/139476). So where a state changes that the
traced code depends on, what was compiled for the old one is dropped, by us.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

logger = logging.getLogger(__name__)

VERSIONS = 256
"""Graphs that may be kept. All parts count together, because they are called through one function of PyTorch's: about
thirteen shapes of the paper's Swin encoder, with and without gradients and autocast, for each size of batch of
training, validation and prediction. Past PyTorch's default of 8 a part would run uncompiled."""


@runtime_checkable
class Divisible(Protocol):
    """A network that tells of what it is made."""

    def parts(self) -> list[nn.Module]: ...


def compile_parts(network: Divisible, **options: Any) -> None:
    """Let torch.compile have each of ``network.parts()`` when it is first called, in place of the whole.

    Parts of one class and one shape share what is compiled, so that the work grows with the number of shapes and not
    with the depth; what lies between them, such as the choice of windows, runs as Python.

    Args:
        network: lists its `parts`.
        options: of :meth:`torch.nn.Module.compile`.
    """
    forget_compiled()  # another network of these classes may have been compiled under other settings
    torch._dynamo.config.cache_size_limit = VERSIONS  # since 2.7 an alias of recompile_limit
    for part in network.parts():
        # Batches come in few sizes. By default the second size would bring symbolic shapes, also for the windows.
        part.compile(dynamic=False, **options)


def compiler_serves(device: torch.device) -> bool:
    """Whether to compile for `device` where nobody says: on a GPU, if a compilation that is as small as can be works.

    It may not, for want of a C compiler or of Python's headers; a warning tells why. On a CPU compilation takes longer
    than most trainings there gain by it.
    """
    if device.type != "cuda":
        return False
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of a compiler or a driver: the training can do without
        first = str(error).strip().partition("\n")[0]
        logger.warning("torch.compile does not work here (%s: %s): going on without.", type(error).__name__, first)
        return False
    return True


@contextmanager
def real_tensors() -> Iterator[None]:
    """For what is kept: made first in inference, or while somebody traces with fake tensors, it must serve training."""
    with torch.inference_mode(False), _disable_current_modes(), torch.device("cpu"):
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, parts run as Python and nothing is compiled: for what comes seldom, in sizes or states of its own."""
    with torch.compiler.set_stance("force_eager"):
        yield


def forget_compiled() -> None:
    """Drop everything that was compiled in this process; what is called again is compiled anew."""
    torch.compiler.reset()
