"""Methods that look at a layer's inputs: what they remove, and that the rest makes up for it as well as can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer_problems import correlated, layer_reading, random

from vitprune.weights import _columns
from vitprune.weights.base import Pattern
from vitprune.weights.obc import Obc
from vitprune.weights.sparsegpt import SparseGpt
from vitprune.weights.wanda import Wanda

PATTERNS = ["unstructured", "block-4", "2:4"]


@pytest.fixture
def layer():
    return layer_reading(correlated(1, 400, 24, 0.6)[:, 0], random(10, 24, seed=5))


def prune(method, layer, pattern="unstructured", sparsity=0.5):
    (pruned,) = method.prune([layer], Pattern.parse(pattern), sparsity)
    return pruned


def error(layer, weight):
    """Squared change of the layer's output."""
    change = (weight - layer.weight).double()
    return float(((change @ layer.moments) * change).sum())


def test_wanda_by_hand():
    layer = layer_reading(torch.tensor([[4.0, 1.0, 2.0, 1.0]]), torch.tensor([[1.0, 3, 1, -1], [0.1, 0.3, -0.1, 5]]))
    pruned = prune(Wanda(), layer)
    assert pruned.mask.tolist() == [[True, True, False, False], [True, False, False, True]]
    assert torch.equal(pruned.weight, layer.weight * pruned.mask)


def test_wanda_takes_the_same_share_of_each_row(layer):
    assert (prune(Wanda(), layer, sparsity=0.75).mask.sum(1) == 6).all()


def test_wanda_takes_the_same_share_of_wide_layers_and_narrow_ones():
    layers = [layer_reading(random(40, n, seed=n), random(8, n, seed=n + 1)) for n in (8, 32)]
    layers[1] = replace(layers[1], name="wide")
    narrow, wide = (pruned.mask for pruned in Wanda(scope="global").prune(layers, Pattern(), 0.5))
    assert (narrow.sum(1) == 4).all()
    assert (wide.sum(1) == 16).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_obc_is_the_least_squares_fit_of_its_mask(pattern, layer):
    pruned = prune(Obc(damping=0), layer, pattern)
    for row, mask, weight in zip(pruned.weight, pruned.mask, layer.weight, strict=True):
        wanted = torch.linalg.solve(layer.moments[mask][:, mask], layer.moments[mask] @ weight)
        torch.testing.assert_close(row[mask], wanted, rtol=1e-8, atol=1e-10)
        assert (row[~mask] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_methods_lose_of_a_layers_output_on_the_mean(pattern):
    lost = []
    for seed in range(0, 200, 10):
        layer = layer_reading(correlated(1, 400, 24, 0.6, seed)[:, 0], random(10, 24, seed=seed + 5))
        lost.append([error(layer, prune(method, layer, pattern).weight) for method in (Obc(), SparseGpt(), Wanda())])
    obc, sparsegpt, wanda = torch.tensor(lost).log().mean(0).exp().tolist()
    assert obc < 0.8 * sparsegpt
    assert sparsegpt < 0.8 * wanda


@pytest.mark.parametrize("columns", [4, 8, 128])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_makes_up_for_each_column_with_those_behind_it(pattern, columns, layer, monkeypatch):
    monkeypatch.setattr(_columns, "COLUMNS", columns)
    pruned = prune(SparseGpt(damping=0), layer, pattern)
    weight = layer.weight.clone()
    for column in range(24):  # with an inverse of its own for what is left
        inverse = torch.linalg.inv(layer.moments[column:, column:])
        lost = weight[:, column] * ~pruned.mask[:, column]
        weight[:, column:] -= torch.outer(lost, inverse[0] / inverse[0, 0])
    torch.testing.assert_close(pruned.weight, weight * pruned.mask, rtol=1e-8, atol=1e-10)
    assert int((~pruned.mask).sum()) == 120


def test_sparsegpt_chooses_by_what_a_weight_costs_in_its_turn(layer):
    weight = prune(SparseGpt(damping=0), layer, "2:4").weight
    pivots = [float(torch.linalg.inv(layer.moments[i:, i:])[0, 0]) for i in range(4)]
    costs = layer.weight[:, :4].square() / torch.tensor(pivots)
    assert torch.equal(weight[:, :4] == 0, costs.argsort(1).argsort(1) < 2)


def test_inputs_that_are_always_0_cost_nothing():
    inputs = correlated(1, 100, 8, 0.3)[:, 0]
    inputs[:, :4] = 0
    for method in (Obc(), SparseGpt(), Wanda()):
        mask = prune(method, layer_reading(inputs, random(6, 8, seed=1))).mask
        assert mask[:, 4:].all()
        assert not mask[:, :4].any()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", [Obc(), SparseGpt(), Wanda()], ids=lambda method: type(method).__name__)
def test_what_was_removed_before_counts_and_stays_away(method, pattern, layer):
    first = prune(method, layer, "block-4", 0.25)
    again = layer_reading(correlated(1, 400, 24, 0.6, seed=3)[:, 0], first.weight)
    second = prune(method, again, pattern)
    assert Pattern.parse(pattern).holds(second.mask)
    assert int((~second.mask).sum()) == 120 or pattern == "2:4"  # which can but add to the zeros of whole fours
    assert not (second.mask & ~first.mask).any()
