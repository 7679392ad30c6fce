"""Which way window attention is computed, and that the plan of the kernels describes the same windows."""

import logging
import math
import sys
import types

import pytest
import torch
from attended_windows import assert_as_pytorch, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nnunet_ssl.architectures import window_attention as module
from nnunet_ssl.architectures.swin import SwinEncoder
from nnunet_ssl.architectures.window_attention import kernels_serve, unsuitable, window_attention
from nnunet_ssl.architectures.window_operator import TILES, TILES_IN_FLOAT32, TILES_OF_64
from nnunet_ssl.architectures.window_operator import window_attention as operator
from nnunet_ssl.architectures.windows import SEPARATION, plan_windows

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 3}


def windows(grid, window, *, shifted=True, batch=1):
    return plan_windows(grid, window, shifted=shifted, batch=batch, device=CPU)


# ---- the plan --------------------------------------------------------------------------------------------------------

GRIDS = st.tuples(*[st.integers(1, 9)] * 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(grid=GRIDS, window=st.integers(1, 5), shifted=st.booleans(), batch=st.integers(1, 3))
def test_the_compact_plan_has_the_same_windows(grid, window, shifted, batch):
    """Their tokens, in the order of their places, with the real ones first and the padding left out."""
    plan = windows(grid, window, shifted=shifted, batch=batch)
    places = plan.token_of_row.clone()
    places[plan.padding_rows] = -1
    expected = sorted(places.reshape(-1, plan.length).tolist())

    tokens, kind_of, kinds, layouts, groups = plan.compact
    found = []
    for row, kind in zip(tokens.tolist(), kind_of.tolist(), strict=True):
        length = int(kinds[kind, 0])
        assert min(row[:length]) >= 0 and set(row[length:]) <= {-1}
        found.append([row[layouts[kind, 1, place]] for place in range(plan.length)])
    assert sorted(found) == expected
    assert torch.equal(layouts[:, 0].gather(1, layouts[:, 1].long()), torch.arange(plan.length).expand(len(kinds), -1))

    covered = [window for kind, start, end in groups.tolist() for window in range(start, end)]
    assert covered == list(range(len(tokens)))
    for kind, (_, first, end) in enumerate(kinds.tolist()):
        own = [window for _, start, stop in groups[first:end].tolist() for window in range(start, stop)]
        assert own == (kind_of == kind).nonzero().flatten().tolist()


def attend_compactly(qkv, padding, bias, plan):
    """What the kernels compute, window by window: real tokens, and one key that stands for all padding."""
    tokens, kind_of, kinds, layouts, _ = plan.compact
    heads, size = len(bias), qkv.shape[1] // 3 // len(bias)
    out = torch.zeros(len(qkv), heads * size, dtype=qkv.dtype)
    key, value = padding.reshape(3, heads, 1, size)[1:]
    for rows, kind in zip(tokens.long(), kind_of.tolist(), strict=True):
        length = int(kinds[kind, 0])
        rows = rows[:length]
        place, _, region = layouts[kind].long()
        scores = bias + (region[:, None] != region) * SEPARATION
        scores = scores[:, place[:length]][:, :, place]
        gathered = scores[:, :, length:].logsumexp(-1, keepdim=True)
        q, k, v = qkv[rows].reshape(length, 3, heads, size).permute(1, 2, 0, 3)
        k, v = torch.cat([k, key], 1), torch.cat([v, value], 1)
        scores = q @ k.mT / size**0.5 + torch.cat([scores[:, :, :length], gathered], -1)
        out = out.index_copy(0, rows, (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return out


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    grid=st.tuples(*[st.integers(1, 6)] * 3),
    window=st.integers(2, 4),
    shifted=st.booleans(),
    spread=st.sampled_from([1, 40]),
)
def test_all_padding_of_a_window_is_one_key(grid, window, shifted, spread):
    """In float64 values and gradients are equal, whatever the biases, also where the roll's penalty is outweighed."""
    plan = windows(grid, window, shifted=shifted, batch=2)
    inputs = [one.double() for one in draw(grid, plan, batch=2, size=3, spread=spread)]
    assert_as_pytorch(lambda *own: attend_compactly(*own, plan), inputs, plan, 1e-12)


def test_a_plan_first_made_while_tracing_serves_afterwards():
    encoder, x = SwinEncoder(**SMALL), torch.randn(1, 1, 10, 22, 6)  # of a size that no other test has
    torch.export.export(encoder, (x,), strict=False)
    sum(level.sum() for level in encoder(x)).backward()


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_decided():
    module._decide.cache_clear()
    yield
    module._decide.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A function that lets a GPU of some generation be asked."""

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_gpus_since_ampere_can_be_tried(gpu, dtype, capability):
    pytest.importorskip("triton")
    gpu(*capability)
    assert unsuitable(CUDA, dtype, 16) is None


@pytest.mark.parametrize(
    ("device", "dtype", "size", "capability", "reason"),
    [
        (CPU, torch.float32, 16, (9, 0), "NVIDIA"),
        (torch.device("mps"), torch.float32, 16, (9, 0), "NVIDIA"),
        (torch.device("meta"), torch.float32, 16, (9, 0), "NVIDIA"),
        (CUDA, torch.float32, 16, (7, 5), "Ampere"),
        (CUDA, torch.float64, 16, (9, 0), "type"),
        (CUDA, torch.float32, 12, (9, 0), "heads of 16, 32, 64"),
        (CUDA, torch.float32, 128, (9, 0), "heads of"),
    ],
)
def test_elsewhere_pytorchs_attention_serves(gpu, device, dtype, size, capability, reason):
    pytest.importorskip("triton")
    gpu(*capability)
    assert reason in unsuitable(device, dtype, size)


def test_without_triton_pytorchs_attention_serves(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.delitem(sys.modules, "nnunet_ssl.architectures.window_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert unsuitable(CUDA, torch.float32, 16) == "Triton is not installed"


def test_amds_gpus_are_left_to_pytorch(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in unsuitable(CUDA, torch.float32, 16)


def test_a_triton_that_cannot_be_used_is_named_in_a_warning(monkeypatch, caplog):
    """Such as the folder that is left of a removed one, which can be imported and is empty."""
    monkeypatch.delitem(sys.modules, "nnunet_ssl.architectures.window_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.language", types.ModuleType("triton.language"))
    assert not kernels_serve(CPU, torch.float32, 16)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "AttributeError" in record.message


def test_a_variable_switches_the_kernels_off(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setenv("nnssl_kernels", "false")
    assert "nnssl_kernels=false" in unsuitable(CUDA, torch.float32, 16)


def failing(*_):
    raise RuntimeError("ptxas fatal: no such architecture\nand a long listing")


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (failing, "RuntimeError: ptxas fatal: no such architecture)"),
        (lambda *_: 0.3, "3e-01 away"),
        (lambda *_: float("nan"), "nan away"),
    ],
)
def test_kernels_that_fail_or_deviate_are_left_out_with_one_warning(monkeypatch, caplog, check, says):
    """And never tried again: a silent wrong result would be the worst."""
    monkeypatch.setattr(module, "unsuitable", lambda *_: None)
    monkeypatch.setattr(module, "self_check", check)
    plan = windows((3, 4, 5), 3)
    inputs = draw((3, 4, 5), plan)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert torch.equal(window_attention(*inputs, plan), module.attend_by_pytorch(*inputs, plan))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and says in record.message and "\n" not in record.message


def test_kernels_that_pass_are_used_and_named_once(monkeypatch, caplog):
    used = []
    monkeypatch.setattr(module, "unsuitable", lambda *_: None)
    monkeypatch.setattr(module, "self_check", lambda *_: 1e-6)
    monkeypatch.setattr(module, "operator", lambda qkv, *_: used.append(qkv.dtype) or (qkv, None))
    plan = windows((3, 4, 5), 3)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            window_attention(*draw((3, 4, 5), plan), plan)
    assert used == [torch.float32] * 2
    assert [record.message for record in caplog.records if "Triton kernels" in record.message] == [
        "Window attention of float32 heads of 16 on cpu: Triton kernels, 1e-06 away from float64 in their self-check."
    ]


def test_a_self_check_draws_no_random_numbers(monkeypatch):
    monkeypatch.setattr(module, "operator", lambda qkv, padding, bias, *plan: (qkv[:, :32] * bias.sum(), None))
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):  # the stand-in leaves out an input
        module.self_check(CPU, torch.float32, 16)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_self_check_sees_what_is_wrong(monkeypatch):
    """A stand-in for kernels that are right, and others that forget the padding, the penalty, or part of the bias."""
    plans = [windows(grid, window, batch=batch) for grid, window, batch in module.CHECKED]

    def stand_in(qkv, padding, bias, tokens, *compact, wrong=lambda *inputs: inputs):
        (plan,) = (plan for plan in plans if plan.compact.tokens is tokens)
        return attend_compactly(*wrong(qkv, padding, bias), plan), None

    def deviation(wrong):
        monkeypatch.setattr(module, "operator", lambda *inputs: stand_in(*inputs, wrong=wrong))
        return module.self_check(CPU, torch.float32, 16)

    assert deviation(lambda *inputs: inputs) < 1e-6
    assert deviation(lambda qkv, padding, bias: (qkv, padding * 0.9, bias)) > 1e-3
    assert deviation(lambda qkv, padding, bias: (qkv, padding, bias * 0.9)) > 1e-3
    assert deviation(lambda qkv, padding, bias: (qkv * 1.01, padding, bias)) > 1e-3
    assert math.isnan(deviation(lambda qkv, padding, bias: (qkv if len(qkv) > 100 else qkv / 0, padding, bias)))


def test_a_self_check_runs_through_every_loop_of_the_kernels_more_than_once():
    """Tiles of a window, windows of a group, groups of a kind; with padding in a window and without."""
    most = dict.fromkeys(["rows", "windows of a group", "groups of a kind", "padding"], 0)
    for grid, window, batch in module.CHECKED:
        plan = windows(grid, window, batch=batch)
        _, _, kinds, _, groups = plan.compact
        found = (kinds[:, 0], groups[:, 2] - groups[:, 1], kinds[:, 2] - kinds[:, 1], plan.length - kinds[:, 0])
        most = {name: max(before, int(one.max())) for (name, before), one in zip(most.items(), found, strict=True)}
        assert plan.length == int(kinds[:, 0].max())
    largest = max(
        side
        for by_size in (TILES, TILES_OF_64, TILES_IN_FLOAT32)
        for each in by_size.values()
        for side in sum(each, ())
    )
    assert most["rows"] > largest and most["padding"] > 0
    assert most["windows of a group"] > 1 and most["groups of a kind"] > 1


# ---- the operator, without running it --------------------------------------------------------------------------------


def test_flops_are_those_of_pytorchs_attention(monkeypatch):
    counts = []
    for serve in (False, True):
        monkeypatch.setattr(module, "_decide", lambda *_, serve=serve: serve)
        with torch.device("meta"):
            encoder = SwinEncoder(**SMALL)
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(2, 1, 10, 8, 6, device="meta"))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.compiled
def test_an_exported_encoder_has_one_node_for_each_attention(monkeypatch):
    monkeypatch.setattr(module, "_decide", lambda *_: True)
    exported = torch.export.export(SwinEncoder(**SMALL), (torch.randn(1, 1, 10, 8, 6),), strict=False)
    assert sum("window_attention" in str(node.target) for node in exported.graph.nodes) == 3


def test_inputs_that_do_not_fit_are_refused():
    plan = windows((3, 4, 5), 3)
    qkv, padding, bias = draw((3, 4, 5), plan)
    for wrong in (
        (qkv.double(), padding.double(), bias),
        (qkv, padding.half(), bias),
        (qkv, padding, bias.half()),
        (qkv[:, :90], padding[:90], bias),
        (qkv, padding[:90], bias),
        (qkv, padding, bias[:, :26, :26]),
    ):
        with pytest.raises(ValueError, match=r"no kernel|do not fit|places"):
            operator(*wrong, *plan.compact)
    with pytest.raises(ValueError, match="60 tokens"):
        window_attention(qkv[:50], padding, bias, plan)
