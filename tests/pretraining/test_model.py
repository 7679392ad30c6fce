"""The networks of each recipe."""

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from nnunet_ssl import devices
from nnunet_ssl.pretraining import model
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.gradients import backward_by_branch
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.objectives.base import Examples
from nnunet_ssl.pretraining.optimization import build_optimizer, schedules
from nnunet_ssl.pretraining.step import training_step
from nnunet_ssl.pretraining.views.augmentation import Batch


def names_of(learner):
    return {name.split(".")[1] for name in learner.state_dict() if name.startswith("query.")}


@pytest.mark.parametrize(
    ("recipe", "parts", "has_key", "has_queue"),
    [
        ("cl", {"encoder", "projection"}, True, True),
        ("mim", {"encoder", "decoder"}, False, False),
        ("mcl_mim", {"encoder", "projection", "decoder"}, True, True),
        ("mcl_ibot", {"encoder", "projection", "token_head"}, True, True),
    ],
)
def test_a_recipe_has_the_parts_it_needs(tiny, recipe, parts, has_key, has_queue):
    learner = Learner(load_config(recipe, tiny))
    assert names_of(learner) == parts
    assert (learner.key is not None, hasattr(learner, "queue")) == (has_key, has_queue)


def test_the_key_network_starts_as_the_query_network_and_learns_nothing_by_gradient(tiny):
    learner = Learner(load_config("mcl_mim", tiny))
    query = learner.query.state_dict()
    for name, tensor in learner.key.state_dict().items():
        assert torch.equal(tensor, query[name])
        assert tensor.data_ptr() != query[name].data_ptr()
    assert not any(parameter.requires_grad for parameter in learner.key.parameters())
    assert not any(name.startswith("decoder") for name in learner.key.state_dict())


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone(tiny):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, same, other = (Learner(load_config("mim", [*tiny, f"seed={seed}"])).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_without_a_masked_branch_there_is_no_mask_token(tiny):
    assert "query.encoder.mask_token" not in Learner(load_config("mcl", tiny)).state_dict()
    assert load_config("mcl", tiny).architecture()["mask_token"] is False


def test_the_papers_sizes():
    query = Learner(load_config("mcl_mim")).query
    sizes = {name: sum(one.numel() for one in part.parameters()) for name, part in query.named_children()}
    assert sizes["encoder"] == 20_525_202
    assert sizes["decoder"] == 158_728
    assert sizes["projection"] == 768 * 512 + 512 + 512 * 128 + 128


def test_activation_checkpointing_changes_no_gradient(tiny):
    gradients = []
    for checkpointing in ("false", "true"):
        query = Learner(load_config("mim", [*tiny, f"checkpointing={checkpointing}"])).query
        generator = torch.Generator().manual_seed(0)
        views = torch.randn(1, 1, 64, 32, 32, generator=generator)
        query.encode(views, torch.tensor([True, False]).view(1, 2, 1, 1))[-1].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in query.encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_bf16_that_a_gpu_emulates_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    devices.gpu_has_bf16.cache_clear()
    assert devices.computes_in_bf16(torch.device("cuda")) is False
    devices.gpu_has_bf16.cache_clear()
    assert devices.computes_in_bf16(torch.device("cpu")) is False


@pytest.fixture
def compiling(monkeypatch):
    """A function that lets encoders compile with another backend than Inductor, which takes minutes."""
    torch._dynamo.reset()
    compile_module = nn.Module.compile

    def use(backend):
        monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(compile_module, backend=backend))

    with torch._functorch.config.patch(donated_buffer=True):  # PyTorch's default, whatever other tests left
        yield use
    torch._dynamo.reset()


COMPILED = ["compile=true", "backbone=resenc", "resenc.features=4,8", "resenc.blocks=1,1", "patch_size=8"]


@pytest.mark.parametrize(
    ("setting", "serves", "compiles"),
    [("auto", True, True), ("auto", False, False), ("true", False, True), ("false", True, False)],
)
def test_one_setting_says_whether_encoders_are_compiled(tiny, monkeypatch, setting, serves, compiles):
    """Left to itself it is on where a compiler serves the device, in every recipe and for both networks."""
    parts, asked = [], []
    monkeypatch.setattr(model, "compile_parts", parts.append)
    monkeypatch.setattr(model, "compiler_serves", lambda device: asked.append(device) or serves)
    learner = Learner(load_config("mcl_mim", [*tiny, f"compile={setting}"]))
    assert learner.compiles == compiles and bool(asked) == (setting == "auto")
    assert parts == ([learner.query.encoder, learner.key.encoder] if compiles else [])


def test_by_default_nothing_is_compiled_on_a_cpu(tiny):
    config = load_config("mcl_mim", tiny)
    assert config.compile == "auto" and not Learner(config).compiles


@pytest.mark.compiled
def test_a_compiled_shared_pass_can_be_measured(tiny, compiling):
    """The first step, not measured, compiles; measuring goes backward twice through one graph."""
    compiling("aot_eager")
    network = Learner(load_config("mcl_mim", [*tiny, *COMPILED, "shared_pass=true"])).query
    views, mask = torch.randn(2, 1, 8, 8, 8), torch.rand(2, 4, 4, 4) < 0.5
    for measured in (False, True):
        maps = network.encode(views, mask)
        losses = {
            "contrastive": network.head("projection", maps[-1])[:, 0].sum(),
            "masked": network.head("decoder", maps, views.shape[2:]).square().mean(),
        }
        gradients = {}
        if measured:
            backward_by_branch(losses, list(network.encoder.parameters()), gradients)
        else:
            sum(losses.values()).backward()
    assert set(gradients) == {"contrastive", "masked"}


@pytest.mark.compiled
@pytest.mark.parametrize(("recipe", "branch"), [("mcl_path", "lesions"), ("mcl_dense", "dense")])
def test_compiled_branches_of_whole_views_can_be_measured(tiny, compiling, recipe, branch):
    """They share a graph as branches of a shared pass do."""
    compiling("aot_eager")
    learner = Learner(load_config(recipe, [*tiny, *COMPILED, f"{branch}.stride=2"]))
    optimizer, views = build_optimizer(learner.query, learner.config), torch.randn(2, 2, 1, 8, 8, 8)
    two = torch.arange(2)
    batch = Batch(views=views, targets=views, subject=two, session=two, scan_ids=[["scan"] * 2] * 2, step=0)
    examples, schedule = Examples(batch=batch, unpaired=None, mask=None), schedules(0, learner.config)
    for measured in (False, True):
        update = training_step(learner, optimizer, iter([examples]), schedule, measured=measured)
    assert {"gradient/contrastive", f"gradient/{branch}"} <= update.figures[0].keys()


@pytest.mark.compiled
def test_batches_of_several_sizes_compile_without_symbolic_shapes(tiny, compiling):
    counter = CompileCounterWithBackend("eager")
    compiling(counter)
    network = Learner(load_config("mim", [*tiny, *COMPILED])).query
    for size in (2, 3, 4):
        network.encode(torch.randn(size, 1, 8, 8, 8))
    assert len(counter.graphs) == 3 * len(network.encoder.parts())
    inputs = [node for graph in counter.graphs for node in graph.graph.find_nodes(op="placeholder")]
    assert not any(isinstance(node.meta["example_value"], torch.SymInt) for node in inputs)


def test_a_checkpoint_of_0_1_0_is_read(tiny):
    """It kept the mean of the teacher's scores as a buffer of the learner itself."""
    learner, other = (Learner(load_config("mcl_ibot", tiny)) for _ in range(2))
    learner.centre.mean.normal_()
    state = learner.state_dict()
    state["centre"] = state.pop("centre.mean")
    other.load_state_dict(state)
    assert torch.equal(other.centre.mean, learner.centre.mean)
    assert "centre" in state, "the caller's dictionary stays"
