from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from synthetic import EVIT, HEADS, MLP, TOKENS, TOME, dense, ending_early, losses, problem, table

from vitprune.errors import BudgetUnreachable, InputError
from vitprune.search.counts import Counts, Sizes
from vitprune.search.frontier import Point, from_rows, pick, to_rows
from vitprune.search.problem import Problem, ladder, multiples

CORRECTED = replace(table(), correction=(0.3, 0.98, 0.0375))


def loss_by_hand(table_of_losses, counts):
    total, n = 0.0, TOKENS[0]
    for block, (h, m, left) in enumerate(zip(counts.heads, counts.mlp, counts.patches, strict=True)):
        total += table_of_losses.heads[block][h] + table_of_losses.mlp[block][m]
        if left != n:
            curve = table_of_losses.tokens[block]
            total += max(0.0, curve[left] - curve[n])
        n = left
    return total


@pytest.mark.parametrize("method", [EVIT, TOME, EVIT._replace(where="before", name="tome", judged_as="tome"),
                                    EVIT._replace(where="q_rows"), None])  # fmt: skip
def test_every_plan_costs_what_the_table_predicts_and_loses_what_its_changes_add_up_to(method):
    made = problem(3, method=method, latency=CORRECTED)
    dense_ms = made.predict_ms(dense())
    plans = made.solve([dense_ms / 4, dense_ms])
    for point in plans.points(60):
        assert point.predicted_ms == pytest.approx(made.predict_ms(point.counts), rel=1e-12)
        assert point.loss == pytest.approx(loss_by_hand(made.losses, point.counts), rel=1e-12, abs=1e-12)
        assert point.predicted_ms <= point.budget_ms * (1 + 1e-12)
    assert plans.best(dense_ms).counts == dense()


def every_plan(made, depth):
    """All counts that surgery could make of ``depth`` blocks with the method of ``made``."""
    for heads in itertools.product((*HEADS[:2], 0), repeat=depth):
        for mlp in itertools.product((MLP[0], MLP[2], 0), repeat=depth):
            for patches in itertools.product(TOKENS, repeat=depth):
                entering = (TOKENS[0], *patches[:-1])
                moves = [(b, n, left) for b, (n, left) in enumerate(zip(entering, patches, strict=True)) if left != n]
                if all(
                    left < n and heads[b] and left in made.losses.tokens[b] and left >= made.method.fewest(n, 1)
                    for b, n, left in moves
                ):
                    yield Counts(heads, mlp, patches)


@pytest.mark.parametrize("method", [EVIT, TOME, TOME._replace(where="before")])
def test_the_search_agrees_with_trying_every_plan(method):
    made = problem(5, 2, method, CORRECTED)
    made = replace(made, sizes=Sizes((*HEADS[:2], 0), (MLP[0], MLP[2], 0), TOKENS))
    counts = list(every_plan(made, 2))
    ms = np.array([made.predict_ms(c) for c in counts])
    loss = np.array([loss_by_hand(made.losses, c) for c in counts])
    assert len(counts) > 100
    budgets = [float(b) for b in np.linspace(ms.min() * 1.01, ms.max(), 25)]
    plans = made.solve(budgets)
    for budget in budgets:
        found = plans.best(budget)
        assert found.counts in counts
        assert found.predicted_ms <= budget
        assert loss[ms <= budget].min() - 1e-9 <= found.loss
        assert found.loss <= loss[ms <= budget - plans.frontier.slack_ms].min() + 1e-9


@pytest.mark.parametrize("method", [EVIT, TOME, None])
def test_with_a_last_block_for_the_prefix_alone_it_agrees_with_trying_every_plan(method):
    made = problem(5, 2, method, replace(ending_early(), correction=(0.3, 0.98, 0.0375)))
    made = replace(made, sizes=Sizes((*HEADS[:2], 0), (MLP[0], MLP[2], 0), (*TOKENS, 0)))
    plain = {(c.heads, c.mlp, c.patches[0]) for c in every_plan(made, 2)} if method else set()
    plain = plain or {(h, m, 196) for h in itertools.product((*HEADS[:2], 0), repeat=2)
                      for m in itertools.product((MLP[0], MLP[2], 0), repeat=2)}  # fmt: skip
    counts = [Counts(heads, mlp, (patches, 0)) for heads, mlp, patches in plain]
    ms = np.array([made.predict_ms(c) for c in counts])
    loss = np.array([sum(made.losses_of(c).values()) for c in counts])
    plans = made.solve([ms.min() * 1.01, ms.max() * 1.01])
    for budget in np.linspace(ms.min() * 1.01, ms.max(), 25):
        found = plans.best(float(budget))
        assert found.counts in counts
        assert loss[ms <= budget].min() - 1e-9 <= found.loss
        assert found.loss <= loss[ms <= budget - plans.frontier.slack_ms].min() + 1e-9
    assert made.predict_ms(dense(2)) > ms.max()  # the dense model is the user's, with its last block whole
    assert plans.best(ms.max() * 1.01).loss == 0


def test_a_table_without_times_of_such_a_last_block_is_refused():
    with pytest.raises(InputError, match="no times of a last block for the prefix"):
        replace(problem(1), sizes=Sizes(HEADS, MLP, (*TOKENS, 0)))


def test_tokens_leave_only_where_there_is_attention_and_a_measured_loss():
    made = problem(1, method=TOME)
    dense_ms = made.predict_ms(dense())
    for point in made.solve([dense_ms / 5, dense_ms]).points():
        entering = (TOKENS[0], *point.counts.patches[:-1])
        for block, (n, left) in enumerate(zip(entering, point.counts.patches, strict=True)):
            assert left == n or (point.counts.heads[block] and block and left >= n - n // 2)


def test_what_is_not_allowed_stays():
    made = problem(2)
    dense_ms = made.predict_ms(dense())
    tokens_only = replace(made, sizes=Sizes((), (), TOKENS)).solve([dense_ms / 1.5, dense_ms]).best(dense_ms / 1.5)
    assert tokens_only.counts.heads == dense().heads
    assert tokens_only.counts.mlp == dense().mlp
    widths_only = replace(made, sizes=Sizes(HEADS, MLP, ())).solve([dense_ms / 1.5, dense_ms]).best(dense_ms / 1.5)
    assert widths_only.counts.patches == dense().patches
    assert 0 not in widths_only.counts.heads + widths_only.counts.mlp
    joint = made.solve([dense_ms / 1.5]).best(dense_ms / 1.5)
    assert joint.loss <= min(tokens_only.loss, widths_only.loss)


def test_weights_move_the_search_away_from_what_they_make_dear():
    made = problem(4)
    budget = made.predict_ms(dense()) / 2
    plain = made.solve([budget]).best(budget).counts
    dear = made.reweighted({(block, "tokens"): 100.0 for block in range(12)}).solve([budget]).best(budget).counts
    assert sum(plain.patches) < sum(dear.patches)
    assert made.reweighted(dict.fromkeys(made.units(), 1.0)).solve([budget]).best(budget).counts == plain


def test_a_block_without_attention_or_mlp_has_no_choice_there():
    made = problem(6, 3)
    table_of_losses = replace(
        made.losses, heads=[{0: 0.0}, *made.losses.heads[1:]], mlp=[*made.losses.mlp[:2], {0: 0.0}]
    )
    made = replace(made, losses=table_of_losses)
    assert made.dense() == Counts((0, 6, 6), (1536, 1536, 0), (196, 196, 196))
    plans = made.solve([made.predict_ms(made.dense())])
    assert plans.best(made.predict_ms(made.dense())).counts == made.dense()


def test_an_unreachable_budget_says_what_the_fastest_plan_keeps():
    made = replace(problem(1), sizes=Sizes((2,), (384,), TOKENS))
    with pytest.raises(
        BudgetUnreachable, match=r"24 of 72 heads, 4608 of 18432 MLP units and 67 of 196 patch"
    ) as error:
        made.solve([1.0]).best(1.0)
    fastest = made.solve([1.0]).fastest
    assert error.value.fastest_ms == pytest.approx(made.predict_ms(fastest.counts), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"method": TOME}, "measured with evit, not with tome"),
        ({"sizes": Sizes((), (), (100,))}, "no level of 100 patch tokens"),
        ({"weights": {(12, "mlp"): 1.0}}, "of units of this model"),
        ({"weights": {(1, "mlp"): -1.0}}, "must be >= 0"),
        ({"table": replace(table(), levels=replace(table().levels, prefix=0))}, "this model has none"),
    ],
)
def test_a_problem_that_does_not_fit_together_is_refused(change, why):
    with pytest.raises(InputError, match=why):
        replace(problem(1), **change)


def test_sizes_the_table_lacks_are_an_error_when_the_search_begins():
    made = problem(1, 2)
    wide = replace(made.losses, mlp=[{2048: 0.0, 1536: 0.1}] * 2)
    with pytest.raises(InputError, match=r"no MLP entry for \(196, 2048\)"):
        replace(made, losses=wide).solve([10.0])


def test_multiples_and_ladders_are_descending_and_begin_with_the_whole():
    assert multiples(1536, 512) == (1536, 1024, 512, 0)
    assert multiples(100, 32, fewest=32) == (100, 96, 64, 32)
    assert multiples(6, 1, fewest=5) == (6, 5)
    assert ladder(196, 4, 49) == (196, 123, 78, 49)
    assert ladder(7, 20, 1) == (7, 6, 5, 4, 3, 2, 1)
    assert ladder(49, 1, 49) == (49,)
    with pytest.raises(InputError, match="multiples of 1 or more, got 0"):
        multiples(6, 0)
    with pytest.raises(InputError, match="cannot lead from 4 down to 5"):
        ladder(4, 3, 5)


def test_a_frontier_is_written_read_and_picked_from():
    made = problem(2)
    dense_ms = made.predict_ms(dense())
    plans = made.solve([dense_ms / 3, dense_ms])
    points = plans.points(10**6)
    again = from_rows(to_rows(points))
    assert again == points
    for budget in np.linspace(dense_ms / 3, dense_ms, 20):
        picked = pick(again, float(budget))
        assert picked.predicted_ms <= budget
        assert picked.loss <= plans.best(float(budget)).loss  # it compares unrounded times, so may fit a little more
    with pytest.raises(BudgetUnreachable, match="the fastest takes"):
        pick(again, 0.1)


def test_rows_that_are_no_frontier_are_refused():
    row = to_rows([Point(2.0, 1.0, 0.1, Counts((1,), (8,), (4,)), None)])[0]
    for change in (
        {"loss": "x"},
        {"loss": float("nan")},
        {"counts": 3},
        {"token_method": 3},
        {"predicted_ms": 0},
        {"x": 1},
    ):
        with pytest.raises(InputError):
            from_rows([row | change])
    with pytest.raises(InputError, match="row 0 is no point"):
        from_rows([{}])
    with pytest.raises(InputError, match="no points"):
        pick([], 1.0)


def test_losses_of_the_synthetic_model_are_what_these_tests_assume():
    made = losses(0)
    assert made.tokens[0] == {}
    assert all(curve[max(curve)] == 0 for curve in made.heads + made.mlp)
    assert isinstance(problem(0), Problem)


@pytest.mark.parametrize("method", [EVIT, TOME, EVIT._replace(where="before")])
def test_with_a_schedule_tokens_are_no_choice(method):
    left = (TOKENS[0], TOKENS[0], TOKENS[1], TOKENS[1], TOKENS[2], TOKENS[2])
    made = replace(problem(7, 6, method), schedule=left)
    dense_ms = made.predict_ms(made.dense())
    points = made.solve([dense_ms / 3, dense_ms]).points(60)
    assert len(points) > 10
    assert {point.counts.patches for point in points} == {left}
    free = problem(7, 6, method).solve([dense_ms / 3, dense_ms])
    assert all(free.best(point.budget_ms).loss <= point.loss + 1e-9 for point in points)


def test_a_schedule_leaves_a_last_block_for_the_prefix_alone_as_it_is():
    left = (TOKENS[0], TOKENS[1], TOKENS[1])
    made = Problem(ending_early(), losses(1, 3), EVIT, Sizes((*HEADS, 0), MLP, (*TOKENS, 0)), schedule=left)
    dense_ms = made.predict_ms(made.dense())
    assert {p.counts.patches for p in made.solve([dense_ms / 2, dense_ms]).points(9)} == {(*left[:2], 0)}
