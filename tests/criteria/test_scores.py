from __future__ import annotations

import pytest
import torch

from vitprune import parts
from vitprune.criteria.base import Criterion, LayerView, Ranking
from vitprune.criteria.fisher import Fisher
from vitprune.criteria.magnitude import Magnitude
from vitprune.criteria.random import Random
from vitprune.criteria.taylor import Taylor
from vitprune.errors import InputError


def layer(units: int = 6, unit_size: int = 2) -> LayerView:
    generator = torch.Generator().manual_seed(units)
    inputs = torch.randn(100, units * unit_size, generator=generator)
    return LayerView(
        weight=torch.randn(5, units * unit_size, generator=generator),
        unit_size=unit_size,
        levels=(units, units - 1, 2, 0),
        moments=inputs.T @ inputs / 100,
        gates=torch.randn(30, units, generator=generator),
        reads=torch.randn(units, 7, generator=generator),
        reading_gates=torch.randn(30, units, generator=generator),
        labels=torch.randint(3, (30,), generator=generator),
        activations=torch.rand(30, units * unit_size, generator=generator),
        influence=0.1,
        kind="mlp" if unit_size == 1 else "attn",
    )


@pytest.mark.parametrize("name", parts.names("vitprune.criteria"))
@pytest.mark.parametrize("unit_size", [1, 2])
def test_ranks_every_unit_once_with_an_error_that_starts_at_zero_and_never_falls(name, unit_size):
    ranking = parts.load("vitprune.criteria", name, Criterion)().rank(layer(6, unit_size))
    assert sorted(ranking.order.tolist()) == list(range(6))
    assert ranking.error.shape == (7,)
    assert float(ranking.error[0]) == 0
    assert (ranking.error.diff() >= 0).all()
    assert float(ranking.error[-1]) == pytest.approx(1, abs=1e-9)
    assert all(w.shape == (5, count * unit_size) for count, w in ranking.weights.items())


@pytest.mark.parametrize("name", parts.names("vitprune.criteria"))
def test_the_same_layer_gets_the_same_ranking(name):
    rankings = [parts.load("vitprune.criteria", name, Criterion)().rank(layer()) for _ in range(2)]
    assert torch.equal(rankings[0].order, rankings[1].order)
    assert torch.equal(rankings[0].error, rankings[1].error)


def test_magnitude_sums_the_squares_of_a_units_columns():
    weight = torch.tensor([[3.0, 0.0, 1.0, 1.0, 2.0, 2.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])  # 10, 2, 8 of 20
    ranking = Magnitude().rank(LayerView(weight, 2))
    assert ranking.order.tolist() == [1, 2, 0]
    torch.testing.assert_close(ranking.error, torch.tensor([0, 0.1, 0.5, 1.0], dtype=torch.float64))


GATES = torch.tensor([[1.0, -2.0, 0.0], [1.0, 2.0, 3.0]])  # of two images


def test_taylor_averages_absolute_gradients_of_images():
    ranking = Taylor().rank(LayerView(torch.ones(1, 3), 1, gates=GATES))  # 1, 2, 1.5 of 4.5
    assert ranking.order.tolist() == [0, 2, 1]
    torch.testing.assert_close(ranking.error, torch.tensor([0, 1, 2.5, 4.5], dtype=torch.float64) / 4.5)


def test_fisher_averages_squared_gradients_of_images():
    ranking = Fisher().rank(LayerView(torch.ones(1, 3), 1, gates=GATES))  # 1, 4, 4.5 of 9.5
    assert ranking.order.tolist() == [0, 1, 2]
    torch.testing.assert_close(ranking.error, torch.tensor([0, 1, 5, 9.5], dtype=torch.float64) / 9.5)


def test_random_orders_differ_between_halves_and_seeds():
    def order(seed: int, number: int) -> list[int]:
        return Random(seed).rank(LayerView(torch.ones(1, 50), 1, number=number)).order.tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, number)) for seed in (0, 1) for number in (0, 1, 2)}) == 6


def test_ties_keep_the_higher_units_and_zero_scores_do_not_divide_by_zero():
    ranking = Ranking.from_scores(torch.zeros(3))
    assert ranking.order.tolist() == [0, 1, 2]
    assert ranking.error.tolist() == [0, 0, 0, 0]
    assert ranking.kept(2) == (1, 2)
    assert ranking.kept(0) == ()


def test_more_units_than_there_are_cannot_be_kept():
    with pytest.raises(InputError, match="cannot keep 4 units of 3"):
        Ranking.from_scores(torch.zeros(3)).kept(4)


@pytest.mark.parametrize("name", sorted(set(parts.names("vitprune.criteria")) - {"magnitude", "random"}))
def test_criteria_say_what_they_lack(name):
    criterion = parts.load("vitprune.criteria", name, Criterion)()
    with pytest.raises(InputError, match=f"the criterion {name} needs the layer's [a-z ]+, got none"):
        criterion.rank(LayerView(torch.ones(1, 3), 1))


def test_random_scores_are_the_shares_of_a_half_that_have_gone():
    ranking = Random().rank(LayerView(torch.ones(1, 4), 1))
    assert ranking.importances() == [0.25, 0.5, 0.75, 1]


def test_importances_come_in_order_of_removal():
    ranking = Ranking.from_scores(torch.tensor([5.0, 1.0, 3.0]))
    assert ranking.importances() == [1, 3, 5]
    unscored = Ranking(torch.tensor([1, 2, 0]), torch.tensor([0.0, 0.125, 0.25, 1.0]))
    assert unscored.importances() == [0.125, 0.125, 0.75]
