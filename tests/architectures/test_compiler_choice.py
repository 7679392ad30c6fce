"""Whether torch.compile is tried where nobody says: on GPUs on which it works."""

import torch

from nnunet_ssl.architectures import compiling
from nnunet_ssl.architectures.compiling import compiler_serves

CUDA = torch.device("cuda")


def pretend(monkeypatch, compiled):
    """Let a GPU be there, on which compiled functions do this."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled)
    monkeypatch.setattr(compiling.torch, "ones", lambda size, device: torch.zeros(size))


def test_on_a_cpu_it_is_not():
    assert not compiler_serves(torch.device("cpu")) and not compiler_serves(torch.device("mps"))


def test_on_a_gpu_it_is(monkeypatch, caplog):
    pretend(monkeypatch, lambda x: x)
    assert compiler_serves(CUDA) and not caplog.records


def test_without_a_compiler_a_warning_tells_why(monkeypatch, caplog):
    def fail(x):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    pretend(monkeypatch, fail)
    assert not compiler_serves(CUDA)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "(RuntimeError: Failed to find C compiler.)" in record.message
