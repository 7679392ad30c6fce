"""The Triton kernels of window attention: in Triton's interpreter they equal PyTorch, and compilers of GPUs take them.

The interpreter is chosen when Triton is first imported, so these tests run in a process of their own, started by the
first one here.
"""

import contextlib
import copy
import os
import subprocess
import sys

import pytest
import torch
from attended_windows import assert_as_pytorch, draw, values_and_gradients
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nnunet_ssl.architectures import window_attention as module
from nnunet_ssl.architectures.swin import SwinBlock, SwinEncoder
from nnunet_ssl.architectures.window_attention import kernels_serve
from nnunet_ssl.architectures.window_operator import window_attention as operator
from nnunet_ssl.architectures.windows import plan_windows

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="test_in_the_interpreter runs it")

CPU = torch.device("cpu")
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(which):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, "-k", "not compile_once"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, __file__], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


@pytest.fixture(autouse=True, scope="module")
def mended_interpreter():
    """Mend Triton's interpreter, which multiplies matrices of bfloat16 as if their bits were whole numbers.

    And which up to 3.6 takes the bounds of loops from arrays of one number, as NumPy from 2.5 on does not let it.
    """
    if not INTERPRETING:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder

    def patch_tensor(tensor, *scope):
        plain_patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(one, tl.float32) if one.dtype.scalar == tl.bfloat16 else one for one in (a, b))
        return plain(self, a, b, *rest)

    plain, plain_patch = InterpreterBuilder.create_dot, interpreter._patch_lang_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


def by_kernels(plan):
    return lambda *inputs: operator(*inputs, *plan.compact)[0]


def windows(grid, window, shifted=True, batch=1):
    return plan_windows(grid, window, shifted=shifted, batch=batch, device=CPU)


def assert_kernels_as_pytorch(grid, window, shifted=True, batch=1, *, dtype=torch.float32, spread=1.0, **drawn):
    plan = windows(grid, window, shifted, batch)
    inputs = draw(grid, plan, batch=batch, dtype=dtype, spread=spread, **drawn)
    assert_as_pytorch(by_kernels(plan), inputs, plan, ROUNDING[dtype] * max(1, spread / 10))


# ---- values and gradients --------------------------------------------------------------------------------------------


@interpreted
def test_values_and_gradients_with_padding_cuts_and_several_tiles():
    """75 places, of which the second window has 45 real ones, cut by the roll: two tiles, and one."""
    assert_kernels_as_pytorch((8, 5, 3), 5)


@interpreted
def test_the_gradient_of_the_bias_is_summed_over_the_windows_of_a_group_and_over_groups():
    groups = windows((5, 2, 1), 3, batch=9).compact.groups
    assert (groups[:, 2] - groups[:, 1]).max() > 1 and len(groups) > len(groups[:, 0].unique())
    assert_kernels_as_pytorch((5, 2, 1), 3, batch=9, heads=1)


@interpreted
@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    grid=st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 3)),
    window=st.integers(2, 4),
    shifted=st.booleans(),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    size=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(list(ROUNDING)),
    spread=st.sampled_from([0.02, 1, 40]),
)
@example(grid=(5, 5, 2), window=3, shifted=True, batch=1, heads=1, size=16, dtype=torch.bfloat16, spread=1)
@example(grid=(4, 3, 2), window=3, shifted=True, batch=2, heads=3, size=16, dtype=torch.float16, spread=1)
@example(grid=(4, 2, 2), window=2, shifted=True, batch=1, heads=1, size=32, dtype=torch.float32, spread=200)
@example(grid=(1, 1, 1), window=7, shifted=True, batch=3, heads=1, size=64, dtype=torch.float32, spread=1)
def test_values_and_gradients_equal_pytorchs(grid, window, shifted, batch, heads, size, dtype, spread):
    if spread > 1:
        dtype = torch.float32  # 16 bits would leave nothing of such scores
    assert_kernels_as_pytorch(grid, window, shifted, batch, heads=heads, size=size, dtype=dtype, spread=spread)


@interpreted
def test_views_and_gradients_that_are_not_contiguous():
    plan = windows((4, 3, 2), 3)
    qkv, padding, bias = draw((4, 3, 2), plan, heads=1)

    def transposed(qkv, padding, bias):
        return by_kernels(plan)(qkv.T.contiguous().T, padding.repeat_interleave(2)[::2], bias.mT).T.contiguous().T

    def plain(qkv, padding, bias):
        return by_kernels(plan)(qkv, padding, bias.mT.contiguous())

    own, expected = (values_and_gradients(way, [qkv, padding, bias]) for way in (transposed, plain))
    for one, other in zip(own, expected, strict=True):
        assert torch.equal(one, other)


@interpreted
def test_what_is_not_finite_stays_in_its_window():
    plan = windows((6, 3, 3), 3, shifted=False)
    qkv, padding, bias = draw((6, 3, 3), plan, heads=1)
    for wrong in (float("nan"), float("inf")):
        spoilt = qkv.clone()
        spoilt[0, :16] = wrong
        out, *_ = values_and_gradients(by_kernels(plan), [spoilt, padding, bias])
        expected, *_ = values_and_gradients(by_kernels(plan), [qkv, padding, bias])
        assert out[0].isnan().all() and torch.equal(out[1:], expected[1:])


@interpreted
def test_results_repeat_bit_by_bit_where_determinism_is_asked_for():
    plan = windows((4, 3, 2), 3)
    inputs = draw((4, 3, 2), plan, heads=1)
    torch.use_deterministic_algorithms(True)  # also fills what is newly allocated with NaN: nothing unwritten is read
    try:
        first, second = (values_and_gradients(by_kernels(plan), inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_finds_nothing_wrong_with_the_operator(dtype):
    """Its schema, its shapes on fake tensors, its gradient's registration, and what torch.compile makes of it."""
    plan = windows((3, 2, 2), 2)
    inputs = [one.requires_grad_() for one in draw((3, 2, 2), plan, heads=1, dtype=dtype)]
    torch.library.opcheck(operator, (*inputs, *plan.compact))


# ---- networks --------------------------------------------------------------------------------------------------------

SMALL = {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 3}


def small_encoder(**changes) -> SwinEncoder:
    torch.manual_seed(0)
    encoder = SwinEncoder(**{**SMALL, **changes})
    for one in encoder.modules():
        if isinstance(one, torch.nn.Linear) and one.bias is not None:
            torch.nn.init.normal_(one.bias, std=0.1)  # what padding is projected to
    return encoder


def maps_and_gradients(encoder, x, mask=None, dtype=None):
    encoder.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
        maps = encoder(x, mask)
    generator = torch.Generator().manual_seed(2)
    sum((level * torch.randn(level.shape, generator=generator)).sum() for level in maps).backward()
    return [*maps, x.grad, *(one.grad for one in encoder.parameters() if one.grad is not None)]


def assert_close(own, expected, tolerance):
    own, expected = ([one.detach() for one in tensors] for tensors in (own, expected))
    floor = 0.01 * max(float(one.norm()) for one in expected)
    for one, other in zip(own, expected, strict=True):
        assert (one - other).norm() <= tolerance * max(float(other.norm()), floor)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_an_encoder_equals_itself_with_pytorchs_attention(monkeypatch, masked):
    encoder, x = small_encoder(), torch.randn(1, 1, 9, 6, 5)
    mask = torch.rand(1, *(-(-length // encoder.strides[-1]) for length in x.shape[2:])) < 0.5 if masked else None
    assert kernels_serve(CPU, torch.float32, 16)
    own = maps_and_gradients(encoder, x, mask)
    monkeypatch.setattr(module, "_decide", lambda *_: False)
    assert_close(own, maps_and_gradients(encoder, x, mask), 1e-4)


@interpreted
@pytest.mark.slow
def test_autocast_and_checkpointing(monkeypatch):
    x = torch.randn(1, 1, 8, 6, 4)
    # Without conv blocks, whose weights' gradients a CPU gets wrong in bfloat16 on grids of few places.
    plain, saving = (small_encoder(depths=(1, 1), conv_norm=None, checkpointing=value) for value in (False, True))
    assert kernels_serve(CPU, torch.bfloat16, 16)
    own, recomputed = (maps_and_gradients(encoder, x, dtype=torch.bfloat16) for encoder in (plain, saving))
    for one, other in zip(own, recomputed, strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(module, "_decide", lambda *_: False)
    assert_close(own, maps_and_gradients(plain, x, dtype=torch.bfloat16), 0.1)


@interpreted
@pytest.mark.slow
def test_inference_serves_without_gradients_and_training_after_it(monkeypatch):
    encoder, x = small_encoder(depths=(1, 1)), torch.randn(1, 1, 8, 6, 4)
    with torch.inference_mode():
        maps = encoder(x)
    own = maps_and_gradients(encoder, x)
    for one, other in zip(maps, own, strict=False):
        assert torch.equal(one, other)


@interpreted
@pytest.mark.slow
@pytest.mark.compiled
def test_a_compiled_block_is_one_graph_with_one_attention():
    """Also where the kernels have to prove themselves while it is traced."""
    module._decide.cache_clear()
    torch.manual_seed(0)
    block, plan = SwinBlock(16, 1, 3, 2.0), windows((4, 3, 2), 3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = copy.deepcopy(block)
    compiled.compile(fullgraph=True, dynamic=False, backend=counter)
    tokens = torch.randn(24, 16)
    results = []
    for one in (compiled, block):
        inputs = tokens.clone().requires_grad_()
        out = one(inputs, plan)
        out.square().sum().backward()
        results.append([out, inputs.grad, *(parameter.grad for parameter in one.parameters())])
    assert_close(*results, 1e-5)
    (graph,) = counter.graphs
    assert sum("window_attention" in str(node.target) for node in graph.graph.nodes) == 1


@interpreted
def test_kernels_prove_themselves_also_while_fake_tensors_are_traced():
    """Which have no numbers to compare; the answer is kept, and must serve the training after it."""
    module._decide.cache_clear()
    exported = torch.export.export(small_encoder(depths=(1, 1)), (torch.randn(1, 1, 8, 6, 4),), strict=False)
    assert sum("window_attention" in str(node.target) for node in exported.graph.nodes) == 2
    assert kernels_serve(CPU, torch.float32, 16)


@interpreted
@pytest.mark.parametrize("of", ["group", "kind"])
def test_the_self_check_sees_that_a_sum_ends_too_early(monkeypatch, of):
    """After the first window of a group, or the first group of a kind: all windows but a few, in a training."""

    def careless(qkv, padding, bias, tokens, kind_of, kinds, layouts, groups):
        table = (groups if of == "group" else kinds).clone()
        table[:, 2] = table[:, 1] + 1
        kinds, groups = (kinds, table) if of == "group" else (table, groups)
        return operator(qkv, padding, bias, tokens, kind_of, kinds, layouts, groups)

    monkeypatch.setattr(module, "operator", careless)
    assert module.self_check(CPU, torch.float32, 16) > max(module.TOLERANCES.values())


# ---- compilers of GPUs -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="needs the compiler")
@pytest.mark.parametrize(
    ("generation", "dtype", "size"),
    [
        pytest.param(80, torch.bfloat16, 16, id="Ampere"),
        pytest.param(89, torch.float16, 32, id="Ada"),
        pytest.param(90, torch.bfloat16, 16, id="Hopper"),
        pytest.param(90, torch.float32, 64, id="Hopper, float32"),
        pytest.param(100, torch.bfloat16, 16, id="Blackwell"),
        pytest.param(120, torch.float16, 32, id="Blackwell, RTX"),
    ],
)
def test_kernels_compile_once_for(generation, dtype, size, tmp_path, monkeypatch):
    """What the operator launches is compiled as it is launched, which takes no GPU; once for all shapes of a network.

    The shared memory fits the smallest that any of these GPUs has.
    """
    pytest.importorskip("triton", minversion="3.3" if generation >= 100 else None, reason="older than Blackwell")
    from compiled_kernels import compiling_for

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with compiling_for(generation) as compiled:
        for grid, window, heads in (((8, 5, 3), 5, 3), ((2, 2, 2), 3, 16), ((9, 9, 9), 4, 1)):
            plan = windows(grid, window)
            values_and_gradients(by_kernels(plan), draw(grid, plan, heads=heads, size=size, dtype=dtype))
    assert len(compiled) == 5
    for name, kernels in compiled.items():
        assert len(kernels) == 1, name
        assert "cubin" in kernels[0].asm and kernels[0].metadata.shared <= 48 * 1024
