"""How many kernels a GPU would be asked for, counted without one.

The device "meta" stands for the GPU: its tensors have shapes and no numbers, so every operator on them can be seen and
none takes time. An operator counts once, though a GPU may need a few kernels for it (a Fourier transform does); views
and allocations count nothing. Copies from the CPU count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "lift_fresh"}


class Launches(TorchDispatchMode):
    """Counts, while it is entered, the operators that work on tensors of one device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), named: dict[str, Any] | None = None
    ) -> Any:
        results = function(*arguments, **(named or {}))
        name = function.overloadpacket.__name__
        tensors = [one for one in tree_leaves(results) if isinstance(one, Tensor)]
        on_device = any(tensor.device.type == self.device.type for tensor in tensors)
        if on_device and not function.is_view and name not in ALLOCATIONS:
            self.counts[name] += 1
        return results


def launches(work: Callable[[], object], device: torch.device) -> Counter[str]:
    """Do the work twice, so that caches are full, and count the operators on the device the second time.

    "meta" knows no autocast, which is left out.
    """
    with patch.object(torch, "autocast", lambda *_, **__: nullcontext()):
        work()
        with Launches(device) as seen:
            work()
    return seen.counts
