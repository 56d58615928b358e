from __future__ import annotations

import math

import numpy as np
import pytest
from synthetic import dense, problem

from vitprune.errors import BudgetUnreachable, InputError
from vitprune.search.correct import Effort, refine


def hidden_truth(made, seed):
    """A loss that the sum of single changes misjudges: by unit, by kind, and by what the kinds do to each other."""
    rng = np.random.default_rng(seed)
    kinds = dict(zip(("tokens", "heads", "mlp"), np.exp(0.7 * rng.standard_normal(3)), strict=True))
    factor = {unit: kinds[unit[1]] * math.exp(0.7 * rng.standard_normal()) for unit in made.units()}

    def evaluate(plans):
        losses = []
        for counts in plans:
            single = made.losses_of(counts)
            tokens = sum(loss for unit, loss in single.items() if unit[1] == "tokens")
            total = sum(factor[unit] * loss for unit, loss in single.items())
            losses.append(float(total + 0.5 * tokens * (sum(single.values()) - tokens)))
        return losses

    return evaluate


def test_refinement_loses_clearly_less_than_the_plain_sum_within_its_evaluations_and_budget():
    gains = []
    for seed in range(2):
        made = problem(seed, 6)
        budget = made.predict_ms(dense(6)) / 4
        truth, calls = hidden_truth(made, seed), []

        def evaluate(plans, truth=truth, calls=calls):
            calls.append(plans)
            return truth(plans)

        found = refine(made, budget, evaluate, Effort(evaluations=32))
        evaluated = [counts for plans in calls for counts in plans]
        assert len(evaluated) == len(set(evaluated)) == len(found.tried) <= 32
        assert max(map(len, calls)) <= 8
        assert all(one.point.predicted_ms <= budget for one in found.tried)
        assert found.winner.true_loss == truth([found.winner.point.counts])[0]
        assert found.winner.true_loss == min(one.true_loss for one in found.tried) <= found.unrefined.true_loss
        gains.append(found.winner.true_loss / found.unrefined.true_loss)
    assert np.mean(gains) < 0.9


def test_where_the_sum_is_the_truth_the_unrefined_plan_wins():
    made = problem(1, 6)
    budget = made.predict_ms(dense(6)) / 3
    found = refine(made, budget, lambda plans: [sum(made.losses_of(c).values()) for c in plans], Effort(evaluations=16))
    # candidates are solved with coarser rounding and cannot be better than the exact optimum
    assert found.winner.point.counts == found.unrefined.point.counts
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.unrefined.sum_loss == pytest.approx(found.unrefined.point.loss)


def test_held_out_images_decide_among_the_finalists_only():
    made = problem(2, 6)
    budget = made.predict_ms(dense(6)) / 4
    asked = []

    def held_out(plans):
        asked.extend(plans)
        return [1.0 if number != len(plans) - 1 else 0.5 for number in range(len(plans))]

    truth = hidden_truth(made, 2)
    found = refine(made, budget, truth, Effort(evaluations=24, finalists=3), held_out=held_out)
    assert asked == [one.point.counts for one in found.finalists]
    assert len(asked) == 3
    assert found.winner == found.finalists[-1]
    assert all(one.true_loss <= found.unrefined.true_loss for one in found.finalists)


def test_the_same_seed_gives_the_same_result():
    made = problem(3, 6)
    budget = made.predict_ms(dense(6)) / 4
    runs = [refine(made, budget, hidden_truth(made, 3), Effort(evaluations=16, seed=s)) for s in (7, 7, 8)]
    assert runs[0] == runs[1]
    assert [t.point.counts for t in runs[0].tried] != [t.point.counts for t in runs[2].tried]


def test_the_dense_model_needs_no_refinement():
    made = problem(1, 6)
    found = refine(made, made.predict_ms(dense(6)), lambda plans: [0.0] * len(plans))
    assert found.winner.point.counts == dense(6)
    assert len(found.tried) == 1
    assert math.isnan(found.rank_correlation)


def test_no_time_means_the_unrefined_plan():
    made = problem(1, 6)
    found = refine(made, made.predict_ms(dense(6)) / 2, hidden_truth(made, 1), Effort(seconds=0.0))
    assert len(found.tried) == 1
    assert found.winner == found.unrefined


def test_progress_tells_of_evaluations_and_the_best_so_far():
    made, told = problem(1, 6), []
    refine(
        made,
        made.predict_ms(dense(6)) / 3,
        hidden_truth(made, 1),
        Effort(evaluations=20),
        progress=lambda done, most, best: told.append((done, most, best)),
    )
    assert told[0][:2] == (1, 20)
    assert [best for *_, best in told] == sorted((best for *_, best in told), reverse=True)


def test_bad_evaluations_and_unreachable_budgets_are_errors():
    made = problem(1, 6)
    with pytest.raises(InputError, match="as many finite losses, got \\[nan\\]"):
        refine(made, made.predict_ms(dense(6)) / 2, lambda plans: [math.nan] * len(plans))
    with pytest.raises(InputError, match="as many finite losses"):
        refine(made, made.predict_ms(dense(6)) / 2, lambda plans: [])
    with pytest.raises(BudgetUnreachable, match="the fastest takes"):
        refine(made, 0.1, lambda plans: [0.0] * len(plans))
    with pytest.raises(InputError, match="at least 1 evaluation"):
        Effort(evaluations=0)
