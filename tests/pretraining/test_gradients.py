"""Gradients by branch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nnunet_ssl.pretraining.gradients import (
    backward_by_branch,
    branch_names,
    clip_factors,
    depth_prefixes,
    measure,
    measure_by_depth,
    moving_norms,
    norm,
    norm_weights,
    ratio_factors,
    scale,
    sum_into,
)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.ModuleDict({"encoder": nn.Linear(3, 4), "first": nn.Linear(4, 1), "second": nn.Linear(4, 1)}).double()


@pytest.fixture
def inputs():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def losses(network, inputs, *, one_graph):
    features = network["encoder"](inputs)
    again = features if one_graph else network["encoder"](inputs)
    return {
        "contrastive": network["first"](features.relu()).square().mean(),
        "masked": network["second"](again).mean(),
    }


@pytest.mark.parametrize("one_graph", [True, False])
def test_gradients_taken_by_branch_add_up_to_the_gradient_of_the_sum(network, inputs, one_graph):
    shared = list(network["encoder"].parameters())
    sum(losses(network, inputs, one_graph=one_graph).values()).backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    by_branch = {}
    backward_by_branch(losses(network, inputs, one_graph=one_graph), shared, by_branch)
    assert all(parameter.grad is None for parameter in shared)
    sum_into(by_branch, shared)
    for parameter, gradient in zip(network.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_parts_of_a_step_accumulate_by_branch(network, inputs):
    shared = list(network["encoder"].parameters())
    once, twice = {}, {}
    backward_by_branch(losses(network, inputs, one_graph=True), shared, once)
    for _ in range(2):
        backward_by_branch(losses(network, inputs, one_graph=True), shared, twice)
    for branch in once:
        torch.testing.assert_close(twice[branch], [2 * gradient for gradient in once[branch]])


def test_norms_and_cosine_are_those_of_the_flattened_gradients(network, inputs):
    by_branch = {}
    backward_by_branch(losses(network, inputs, one_graph=True), list(network["encoder"].parameters()), by_branch)
    flat = {branch: torch.cat([one.flatten() for one in gradients]) for branch, gradients in by_branch.items()}
    figures = measure(by_branch)
    for branch, vector in flat.items():
        torch.testing.assert_close(figures[f"gradient/{branch}"], vector.norm())
    expected = torch.cosine_similarity(flat["contrastive"], flat["masked"], dim=0)
    torch.testing.assert_close(figures["gradient/cosine"], expected)


def test_a_parameter_of_one_branch_only_counts_as_zero_in_the_other():
    one, two = torch.tensor([3.0]), torch.tensor([4.0])
    figures = measure({"contrastive": [one, two], "masked": [one, None]})
    assert float(figures["gradient/contrastive"]) == pytest.approx(5)
    assert float(figures["gradient/masked"]) == pytest.approx(3)
    assert float(figures["gradient/cosine"]) == pytest.approx(0.6)


@pytest.mark.parametrize(("contrastive", "factor"), [(10.0, 0.4), (1.0, 1.0), (0.0, 1.0)])
def test_the_contrastive_gradient_is_only_ever_scaled_down_and_its_head_alike(contrastive, factor):
    by_branch = {
        "contrastive": [torch.tensor([contrastive]), None],
        "masked": [torch.tensor([2.0]), torch.tensor([0.0])],
    }
    head = nn.Linear(1, 1, bias=False)
    head.weight.grad = torch.tensor([[30.0]])
    figures = scale(by_branch, {"contrastive": head}, ratio_factors(by_branch, {"contrastive": 2.0}))
    assert {name: float(value) for name, value in figures.items()} == {"gradient/balance": pytest.approx(factor)}
    assert float(by_branch["contrastive"][0]) == pytest.approx(factor * contrastive)
    assert float(head.weight.grad) == pytest.approx(factor * 30)
    assert float(by_branch["masked"][0]) == 2


def test_any_number_of_branches_is_measured_and_balanced():
    """A limit is against all others together, as they came, whatever else is limited."""
    by_branch = {"a": [torch.tensor([6.0, 0.0])], "b": [torch.tensor([0.0, 4.0])], "c": [torch.tensor([0.0, -1.0])]}
    figures = measure(by_branch)
    cosines = {name: float(value) for name, value in figures.items() if "cosine" in name}
    assert cosines == {"gradient/cosine/a-b": 0, "gradient/cosine/a-c": 0, "gradient/cosine/b-c": -1}
    heads = {name: nn.Linear(1, 1) for name in by_branch}  # without gradients
    factors = scale(by_branch, heads, ratio_factors(by_branch, {"a": 1.0, "b": 0.5}))
    assert float(factors["gradient/balance/a"]) == pytest.approx(3 / 6)
    assert float(factors["gradient/balance/b"]) == pytest.approx(0.5 * 37**0.5 / 4)
    assert float(by_branch["a"][0].norm()) == pytest.approx(3)
    assert float(by_branch["c"][0].norm()) == 1
    assert branch_names(["step", *figures, *factors, "gradient/total"]) == ["a", "b", "c"]


def test_a_parameter_without_any_gradient_keeps_none():
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    sum_into({"contrastive": [torch.ones(1), None], "masked": [torch.ones(1), None]}, parameters)
    assert parameters[0].grad.tolist() == [2.0]
    assert parameters[1].grad is None


POSITIVE = st.floats(1e-30, 1e30, allow_subnormal=False)


def test_depths_add_up_to_the_whole_encoder():
    generator = torch.Generator().manual_seed(0)
    by_branch = {
        branch: [torch.randn(size, generator=generator) if size > used else None for size in range(1, 15)]
        for branch, used in {"contrastive": 0, "masked": 5}.items()
    }
    depths = {"stem": [0, 1]} | {f"stage{number}": [number + 1] for number in range(1, 12)} | {"other": [13]}
    whole, figures = measure(by_branch), measure_by_depth(by_branch, depths)
    prefixes = depth_prefixes(sorted(figures))
    assert list(prefixes) == list(depths), "places bring the depths of a sorted table into their order"
    for branch in by_branch:
        squares = [float(figures[f"{prefix}{branch}"]) ** 2 for prefix in prefixes.values()]
        assert sum(squares) == pytest.approx(float(whole[f"gradient/{branch}"]) ** 2)
    products = [
        float(figures[f"{prefix}cosine"] * figures[f"{prefix}contrastive"] * figures[f"{prefix}masked"])
        for prefix in prefixes.values()
        if f"{prefix}cosine" in figures
    ]
    expected = whole["gradient/cosine"] * whole["gradient/contrastive"] * whole["gradient/masked"]
    assert sum(products) == pytest.approx(float(expected), rel=1e-4)
    assert float(figures[f"{prefixes['stem']}masked"]) == 0
    assert f"{prefixes['stem']}cosine" not in figures, "a branch that does not reach a depth has no direction there"
    assert branch_names([*whole, *figures, "gradient/total"]) == ["contrastive", "masked"]


def test_cosines_by_depth_of_several_branches_bear_their_names():
    by_branch = {name: [torch.ones(1), torch.tensor([sign])] for name, sign in {"a": 1.0, "b": -1.0, "c": 1.0}.items()}
    figures = measure_by_depth(by_branch, {"fine": [0], "coarse": [1]})
    assert {name: float(value) for name, value in figures.items() if "1_coarse/cosine" in name} == {
        "gradient/depth/1_coarse/cosine/a-b": -1,
        "gradient/depth/1_coarse/cosine/a-c": 1,
        "gradient/depth/1_coarse/cosine/b-c": -1,
    }


NUMBERS = st.just(0.0) | st.floats(1e-12, 1e12)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.floats(1e-6, 1e6)), min_size=1, max_size=4))
def test_a_clipped_branch_is_within_its_limit_and_keeps_its_direction(branches):
    """On the encoder and its head together; what is within is left alone."""
    by_branch = {f"{place}": [torch.tensor([encoder]), None] for place, (encoder, _, _) in enumerate(branches)}
    heads = {name: nn.Linear(1, 1, bias=False) for name in by_branch}
    for head, (_, own, _) in zip(heads.values(), branches):
        head.weight.grad = torch.tensor([[own]])
    limits = {name: limit for name, (_, _, limit) in zip(by_branch, branches)}
    columns = scale(by_branch, heads, clip_factors(by_branch, heads, limits))
    assert list(columns) == [f"gradient/balance/{name}" for name in by_branch]
    for name, (encoder, own, limit) in zip(by_branch, branches):
        length = max(1.0, math.hypot(encoder, own) / limit)
        assert float(by_branch[name][0]) == pytest.approx(encoder / length, rel=1e-4, abs=1e-30)
        assert float(heads[name].weight.grad) == pytest.approx(own / length, rel=1e-4, abs=1e-30)


@given(st.lists(st.tuples(POSITIVE, st.floats(0.01, 100)), min_size=1, max_size=5))
def test_weights_bring_norms_into_the_proportion_of_their_shares_and_add_up_to_the_number_of_branches(branches):
    norms, shares = (torch.tensor(one) for one in zip(*branches))
    weights = norm_weights(norms, shares)
    assert float(weights.sum()) == pytest.approx(len(branches), rel=1e-4)
    sent = (weights.double() * norms.double() / shares.double())[weights > 1e-30]
    torch.testing.assert_close(sent, sent[:1].expand_as(sent), rtol=1e-3, atol=0)


def test_a_branch_without_gradient_leaves_the_others_their_weights():
    norms, shares = torch.tensor([4.0, 0.0, 1.0]), torch.ones(3)
    expected = norm_weights(norms[[0, 2]], shares[:2]).tolist()
    assert norm_weights(norms, shares).tolist() == pytest.approx([expected[0], 1.0, expected[1]])
    assert norm_weights(torch.zeros(2), torch.ones(2)).tolist() == [1, 1]


def test_averages_of_norms_begin_at_the_first_and_follow():
    average = moving_norms(torch.zeros(2), torch.tensor([4.0, 0.0]))
    assert average.tolist() == [4, 0]
    average = moving_norms(average, torch.tensor([2.0, 3.0]))
    assert average.tolist() == pytest.approx([0.9 * 4 + 0.1 * 2, 3])
    for _ in range(100):
        average = moving_norms(average, torch.tensor([2.0, 5.0]))
    assert average.tolist() == pytest.approx([2, 5], rel=1e-3)


def test_a_gradient_of_nothing_has_norm_zero():
    assert float(norm([None, None])) == float(norm([])) == 0
