"""SwinEncoder, compiled as a whole by somebody, or under DistributedDataParallel: the same numbers as without."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from nnunet_ssl.architectures.swin import SwinEncoder

SIZES = {"embed_dim": 12, "depths": (2,), "num_heads": (2,), "window_size": 4}


def small_encoder(**changes) -> SwinEncoder:
    torch.manual_seed(0)
    return SwinEncoder(**{**SIZES, **changes})


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_compiled_equals_eager(backend: str, sizes, *, masked: bool, tolerance: float, **changes):
    eager = small_encoder(**changes)
    compiled = torch.compile(small_encoder(**changes), backend=backend)
    for size in sizes:
        x = torch.randn(2, 1, *size)
        inputs = (x, torch.rand(2, *(-(-length // 4) for length in size)) < 0.5) if masked else (x,)
        for own, reference in zip(compiled(*inputs), eager(*inputs), strict=True):
            torch.testing.assert_close(own, reference, rtol=0, atol=tolerance)
        for encoder in (compiled, eager):
            encoder.zero_grad()
            sum(level.square().mean() for level in encoder(*inputs)).backward()
        gradients = {name.removeprefix("_orig_mod."): p.grad for name, p in compiled.named_parameters()}
        for name, parameter in eager.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=tolerance)


@pytest.mark.compiled
def test_compiled_with_a_mask():
    assert_compiled_equals_eager("aot_eager", [(24, 20, 19)], masked=True, tolerance=1e-4)


@pytest.mark.compiled
@pytest.mark.slow
def test_compiled_with_checkpointing():
    assert_compiled_equals_eager("aot_eager", [(24, 20, 19)], masked=False, tolerance=1e-4, checkpointing=True)


@pytest.mark.compiled
@pytest.mark.slow
def test_compiled_for_another_size():
    assert_compiled_equals_eager("eager", [(24, 20, 19), (16, 24, 32)], masked=False, tolerance=1e-5)


@pytest.mark.compiled
@pytest.mark.slow
def test_inductor_computes_the_same():
    assert_compiled_equals_eager("inductor", [(24, 20, 19)], masked=True, tolerance=1e-3)


def train_two_steps(encoder, x) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(level.square().sum(dim=(1, 2, 3, 4)).mean() for level in encoder(x)).div(1000).backward()
        optimizer.step()
    return [parameter.detach() for parameter in encoder.parameters()]


def train_as_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x = torch.load(f"{folder}/x.pt")[rank : rank + 1]
    encoder = DistributedDataParallel(small_encoder(mask_token=False))
    torch.save(train_two_steps(encoder, x), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one_does(tmp_path):
    """No parameter is left out, which DDP would refuse in the second step, and gradients are averaged."""
    x = torch.randn(2, 1, 24, 20, 19)
    torch.save(x, tmp_path / "x.pt")
    mp.spawn(train_as_one_of_two, (str(tmp_path),), nprocs=2)
    expected = train_two_steps(small_encoder(mask_token=False), x)
    for rank in range(2):
        for own, reference in zip(torch.load(tmp_path / f"rank{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)
