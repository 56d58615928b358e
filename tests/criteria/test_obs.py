from __future__ import annotations

import pytest
import torch

from vitprune.criteria.base import LayerView
from vitprune.criteria.obs import Obs
from vitprune.errors import InputError

EXACT = {"rtol": 0, "atol": 1e-8}  # fp64, inputs with a condition number of some 1e3; a wrong column is off by O(1)


def data(units: int, unit_size: int, tokens: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs [tokens, n] and a weight [6, n]."""
    generator = torch.Generator().manual_seed(seed)
    n = units * unit_size
    mixed = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5 + 0.5 * torch.eye(n)
    inputs = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mixed
    return inputs, torch.randn(6, n, generator=generator, dtype=torch.float64)


def moments(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def columns(units: tuple[int, ...], unit_size: int) -> list[int]:
    return [unit * unit_size + i for unit in units for i in range(unit_size)]


def relative_error(inputs, weight, kept, compensated) -> float:
    wanted = inputs @ weight.T
    return float((inputs[:, kept] @ compensated.T - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(("units", "unit_size"), [(12, 1), (5, 4), (150, 1)])  # 150: more than one lazy update
def test_compensated_weights_are_the_least_squares_optimum_of_the_kept_columns(units, unit_size):
    inputs, weight = data(units, unit_size)
    levels = tuple(range(1, units, 7 if units > 20 else 1))
    ranking = Obs(damping=0).rank(LayerView(weight, unit_size, levels, moments(inputs)))
    assert set(ranking.weights) == set(levels)
    for count, found in ranking.weights.items():
        kept = columns(ranking.kept(count), unit_size)
        best = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
        torch.testing.assert_close(found, best, **EXACT)


@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize(("units", "unit_size"), [(90, 1), (6, 3)])
def test_the_error_is_that_of_the_layers_output_on_the_calibration_inputs(units, unit_size, damping):
    inputs, weight = data(units, unit_size)
    ranking = Obs(damping).rank(LayerView(weight, unit_size, tuple(range(1, units)), moments(inputs)))
    for count, found in ranking.weights.items():
        real = relative_error(inputs, weight, columns(ranking.kept(count), unit_size), found)
        assert float(ranking.error[units - count]) == pytest.approx(real, abs=1e-9)  # fp64, errors up to 1
    assert float(ranking.error[0]) == 0
    assert float(ranking.error[-1]) == pytest.approx(1, abs=1e-9)
    assert (ranking.error.diff() >= 0).all()


def test_damping_adds_a_ridge_relative_to_the_mean_diagonal():
    inputs, weight = data(8, 1)
    H = moments(inputs)
    ranking = Obs(damping=0.1).rank(LayerView(weight, 1, (5,), H))
    kept = list(ranking.kept(5))
    gone = [i for i in range(8) if i not in kept]
    ridge = 0.1 * H.diagonal().mean() * torch.eye(5)
    best = weight[:, kept] + weight[:, gone] @ H[gone][:, kept] @ torch.linalg.inv(H[kept][:, kept] + ridge)
    torch.testing.assert_close(ranking.weights[5], best, **EXACT)


def test_each_step_takes_the_unit_that_the_others_make_up_for_best():
    inputs, weight = data(7, 1, seed=3)
    ranking = Obs(damping=0).rank(LayerView(weight, 1, (), moments(inputs)))
    left = list(range(7))
    for step, unit in enumerate(ranking.order.tolist()):
        errors = {}
        for candidate in left:
            rest = [i for i in left if i != candidate]
            best = torch.linalg.lstsq(inputs[:, rest], inputs @ weight.T).solution.T if rest else weight[:, :0]
            errors[candidate] = relative_error(inputs, weight, rest, best)
        assert unit == min(errors, key=errors.get)
        assert float(ranking.error[step + 1]) == pytest.approx(errors[unit], abs=1e-9)
        left.remove(unit)


def test_uncorrelated_columns_go_by_squared_weight_times_power():
    # independent inputs of power 1, 4, 9: dropping a column costs w^2 times its power: 16, 4, 9 of 29 in all
    ranking = Obs(damping=0).rank(
        LayerView(torch.tensor([[4.0, 1.0, 1.0]]), 1, (2, 1), torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    )
    assert ranking.order.tolist() == [1, 2, 0]
    torch.testing.assert_close(ranking.error, torch.tensor([0, 4, 13, 29], dtype=torch.float64) / 29)
    torch.testing.assert_close(ranking.weights[2], torch.tensor([[4.0, 1.0]]))
    torch.testing.assert_close(ranking.weights[1], torch.tensor([[4.0]]))


def test_a_copy_of_another_unit_goes_first_and_hands_its_weight_over():
    # inputs 0 and 2 are the same: one of them is free, and the other then does the work of both
    inputs = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs[:, 2] = inputs[:, 0]
    weight = torch.tensor([[3.0, 0.5, 5.0]], dtype=torch.float64)
    ranking = Obs(damping=1e-9).rank(LayerView(weight, 1, (2,), moments(inputs)))
    assert int(ranking.order[0]) in (0, 2)
    assert float(ranking.error[1]) == pytest.approx(0, abs=1e-6)
    kept = ranking.kept(2)
    found = dict(zip(kept, ranking.weights[2][0].tolist(), strict=True))
    assert found[1] == pytest.approx(0.5, abs=1e-5)
    assert found[0 if 0 in kept else 2] == pytest.approx(8, abs=1e-5)  # the ridge of 1e-9 leaves some 1e-8


def test_inputs_that_are_always_zero_go_first_at_no_cost():
    inputs, weight = data(6, 1)
    inputs[:, [1, 4]] = 0
    ranking = Obs().rank(LayerView(weight, 1, (4,), moments(inputs)))
    assert sorted(ranking.order[:2].tolist()) == [1, 4]
    assert ranking.error[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(ranking.weights[4], weight[:, [0, 2, 3, 5]], rtol=0, atol=1e-12)


def test_fewer_tokens_than_columns_still_have_a_ranking():
    inputs, weight = data(40, 1, tokens=10)
    for damping in (0.0, 1e-4):
        ranking = Obs(damping).rank(LayerView(weight, 1, (20,), moments(inputs)))
        assert sorted(ranking.order.tolist()) == list(range(40))
        assert ranking.weights[20].isfinite().all()
        assert float(ranking.error[20]) < 1e-3  # ten tokens lie in the span of the twenty columns that are left


def test_weights_come_in_the_type_of_the_layer_and_in_ascending_order_of_units():
    inputs, weight = data(9, 2)
    ranking = Obs().rank(LayerView(weight.float(), 2, (9, 4, 0), moments(inputs)))
    assert list(ranking.weights) == [4]
    assert ranking.weights[4].dtype == torch.float32
    assert ranking.weights[4].shape == (6, 8)
    assert ranking.kept(4) == tuple(sorted(ranking.order[5:].tolist()))


def test_without_moments_it_says_what_it_needs():
    with pytest.raises(InputError, match="the criterion obs needs the layer's moments, got none"):
        Obs().rank(LayerView(torch.ones(2, 4), 1))


def test_moments_that_are_no_numbers_are_refused_in_a_sentence():
    inputs, weight = data(6, 1)
    inputs[0, 0] = torch.nan
    with pytest.raises(InputError, match="activations that are no numbers"):
        Obs().rank(LayerView(weight, 1, (3,), moments(inputs)))
