"""Gradients by branch."""

import pytest
import torch
from torch import nn

from nnunet_ssl.pretraining.gradients import (
    backward_by_branch,
    branch_names,
    measure,
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
