"""Attention that recomputes its scores: PyTorch's numbers, without PyTorch's memory."""

import pytest
import torch
from torch.nn import functional as F

from nnunet_ssl.architectures import attention as module
from nnunet_ssl.architectures.attention import _attention_in_parts, attention


def draw(windows, heads, length, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(windows, heads, length, width)] * 3 + [(heads, length, length)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def reference(query, key, value, bias):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
    return scores.softmax(-1) @ value


def assert_equals_reference(out, inputs):
    """Compare values, and the gradients of a weighted sum."""
    expected = reference(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    for own, theirs in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 3, 100], ids=["one window", "an uneven number", "all"])
def test_values_and_gradients(monkeypatch, at_once):
    inputs = draw(7, 2, 11, 4)
    monkeypatch.setattr(module, "SCORES_PER_THREAD", at_once * inputs[3].numel() * 8 // torch.get_num_threads())
    assert_equals_reference(attention(*inputs), inputs)


def test_inputs_may_be_views_into_one_projection():
    projected = torch.randn(5, 11, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 11, 11, dtype=torch.float64, requires_grad=True)
    parts = projected.permute(2, 0, 3, 1, 4)
    own = torch.autograd.grad(attention(*parts, bias).square().sum(), (projected, bias))
    theirs = torch.autograd.grad(reference(*parts, bias).square().sum(), (projected, bias))
    for mine, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


def test_half_precision_under_autocast():
    inputs = draw(4, 2, 11, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*[tensor.bfloat16() for tensor in inputs[:3]], inputs[3])
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    expected = torch.autograd.grad(reference(*inputs).square().sum(), inputs)
    for tensor, gradient in zip(inputs, expected, strict=True):
        assert (tensor.grad - gradient).norm() < 0.05 * gradient.norm()


def test_nothing_as_large_as_the_scores_is_kept():
    """What autograd keeps grows with the length of a window, not with its square."""
    inputs = draw(6, 2, 64, 4, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        attention(*inputs)
    assert sum(kept) <= sum(tensor.numel() for tensor in inputs)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        F.scaled_dot_product_attention(*inputs[:3], attn_mask=inputs[3][None])
    assert sum(kept) > 6 * 2 * 64 * 64  # PyTorch's own does, on the CPU


@pytest.mark.parametrize("at_once", [1, 3, 100], ids=["one window", "an uneven number", "all"])
def test_windows_in_parts_attend_as_all_at_once(at_once):
    """What GPUs do to a bias that is trained."""
    inputs = draw(7, 2, 11, 4)
    assert_equals_reference(_attention_in_parts(*inputs, at_once), inputs)


@pytest.mark.compiled
def test_windows_in_parts_compile_into_one_graph():
    inputs = draw(7, 2, 11, 4)
    compiled = torch.compile(_attention_in_parts, fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(compiled(*inputs, 3), _attention_in_parts(*inputs, 3))
