"""Networks whose parts are compiled compute what they compute otherwise, before and after every change of state.

The changes are those that the traced code depends on and that guards may not see: whether gradients are wanted, by the
parameters or at all, training or evaluation, masks, checkpointing, autocast, sizes, weights that move, another network.
"""

import contextlib
import copy

import pytest
import torch

from nnunet_ssl.architectures.compiling import compile_parts, forget_compiled
from nnunet_ssl.architectures.networks import SwinFPN, build_encoder

pytestmark = [pytest.mark.compiled, pytest.mark.slow]

ENCODERS = {
    "swin": {"embed_dim": 6, "depths": [2, 1], "num_heads": [1, 2], "window_size": 3},
    "resenc": {"features": [4, 6, 8], "blocks": [1, 2, 2]},
}
SIZE = (16, 20, 12)


@pytest.fixture(autouse=True)
def nothing_compiled():
    forget_compiled()
    yield
    forget_compiled()


def twin_encoders(backbone, backend="aot_eager", **changes):
    """An encoder as it is, and its copy with compiled parts."""
    torch.manual_seed(0)
    eager = build_encoder({"backbone": backbone, **ENCODERS[backbone], **changes})
    compiled = copy.deepcopy(eager)
    compile_parts(compiled, backend=backend)
    return eager, compiled


def volumes(batch=2, size=SIZE):
    return torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(batch))


def some_hidden(x, encoder):
    cells = [-(-length // encoder.strides[-1]) for length in x.shape[2:]]
    return torch.rand(len(x), *cells, generator=torch.Generator().manual_seed(3)) < 0.5


def assert_same(eager, compiled, *inputs, tolerance=1e-4):
    """Equal maps and, where gradients are wanted, equal gradients of every parameter, which are returned."""
    results = []
    for network in (eager, compiled):
        network.zero_grad(set_to_none=True)
        maps = network(*inputs)
        if any(level.requires_grad for level in maps):
            sum(level.float().square().mean() for level in maps).backward()
        results.append((maps, {name: one.grad for name, one in network.named_parameters()}))
    (maps, gradients), (own_maps, own_gradients) = results
    torch.testing.assert_close(own_maps, maps, atol=tolerance, rtol=tolerance)
    for name, gradient in gradients.items():
        assert (own_gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(own_gradients[name], gradient, atol=tolerance, rtol=1e-2)
    return gradients


@pytest.mark.parametrize("backbone", ENCODERS)
def test_gradients_follow_the_parameters_that_want_them(backbone):
    eager, compiled = twin_encoders(backbone)
    for trainable in (False, True, False):
        forget_compiled()  # as whoever freezes has to
        for network in (eager, compiled):
            network.requires_grad_(trainable)
        x = volumes().requires_grad_()  # so that there is something to go backward to
        gradients = assert_same(eager, compiled, x)
        assert any(gradient is not None for gradient in gradients.values()) == trainable


@pytest.mark.parametrize("backbone", ENCODERS)
def test_training_evaluation_and_inference_alternate(backbone):
    eager, compiled = twin_encoders(backbone)
    for mode in ("train", "eval", "train"):
        for network in (eager, compiled):
            network.train(mode == "train")
        assert assert_same(eager, compiled, volumes())
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                assert_same(eager, compiled, volumes())


@pytest.mark.parametrize("backbone", ENCODERS)
def test_masks_come_and_go(backbone):
    eager, compiled = twin_encoders(backbone)
    x = volumes()
    for mask in (None, some_hidden(x, eager), None, ~some_hidden(x, eager)):
        assert_same(eager, compiled, x, mask)


@pytest.mark.parametrize("backbone", ENCODERS)
def test_batches_and_volumes_of_several_sizes(backbone):
    eager, compiled = twin_encoders(backbone)
    for batch, size in ((2, SIZE), (1, SIZE), (3, (12, 12, 24)), (2, SIZE)):
        assert_same(eager, compiled, volumes(batch, size))


@pytest.mark.parametrize("backbone", ENCODERS)
def test_autocast_comes_and_goes(backbone):
    eager, compiled = twin_encoders(backbone)
    assert_same(eager, compiled, volumes())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(eager, compiled, volumes(), tolerance=0.1)
    assert_same(eager, compiled, volumes())


@pytest.mark.parametrize("backbone", ENCODERS)
def test_checkpointing_is_switched(backbone):
    eager, compiled = twin_encoders(backbone)
    for checkpointing in (False, True, False):
        for network in (eager, compiled):
            network.checkpointing = checkpointing
        assert_same(eager, compiled, volumes())


@pytest.mark.parametrize("backbone", ENCODERS)
def test_a_key_network_follows_in_place_without_gradients(backbone):
    """Query and key network share what is compiled; one wants gradients, the other moves under the compiler's feet."""
    query, compiled_query = twin_encoders(backbone)
    key, compiled_key = (copy.deepcopy(one).requires_grad_(False) for one in (query, compiled_query))
    compile_parts(compiled_key, backend="aot_eager")
    for _ in range(2):
        assert all(gradient is not None for gradient in assert_same_without_mask(query, compiled_query).values())
        with torch.no_grad():
            assert_same(key, compiled_key, volumes())
            for network in (key, compiled_key):
                for parameter in network.parameters():
                    parameter.mul_(1.1)


def assert_same_without_mask(eager, compiled):
    gradients = assert_same(eager, compiled, volumes())
    return {name: gradient for name, gradient in gradients.items() if name != "mask_token"}


@pytest.mark.parametrize("backbone", ENCODERS)
def test_another_network_of_the_class_in_one_process(backbone):
    first = twin_encoders(backbone)
    assert_same(*first, volumes())
    other = {"swin": {"conv_norm": "instance", "window_size": 2}, "resenc": {"blocks": [2, 1, 1]}}[backbone]
    second = twin_encoders(backbone, **other)
    assert_same(*second, volumes())
    assert_same(*first, volumes())


def test_a_segmentation_network_and_its_decoder():
    torch.manual_seed(0)
    eager = SwinFPN(2, 3, **ENCODERS["swin"])
    compiled = copy.deepcopy(eager)
    compile_parts(compiled, backend="aot_eager")
    x = torch.randn(1, 2, *SIZE)
    for context in (contextlib.nullcontext, torch.no_grad):
        with context():
            torch.testing.assert_close(compiled(x), eager(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backbone", ENCODERS)
def test_inductor_computes_the_same(backbone):
    eager, compiled = twin_encoders(backbone, backend="inductor")
    for trainable in (False, True):
        forget_compiled()
        for network in (eager, compiled):
            network.requires_grad_(trainable)
        gradients = assert_same(eager, compiled, volumes().requires_grad_(), tolerance=1e-3)
        assert any(gradient is not None for gradient in gradients.values()) == trainable


def test_blocks_of_one_shape_are_compiled_once():
    """Depth costs nothing: two encoders that differ in depth alone compile as many graphs."""
    graphs = []
    for depth in (2, 6):
        count = torch._dynamo.testing.CompileCounterWithBackend("eager")
        torch.manual_seed(0)
        encoder = build_encoder({"backbone": "swin", **ENCODERS["swin"], "depths": [depth, 1]})
        compile_parts(encoder, backend=count)
        encoder(volumes())
        graphs.append(count.frame_count)
    assert graphs[0] == graphs[1] > 0
