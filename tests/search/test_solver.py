from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vitprune.errors import BudgetUnreachable, InputError
from vitprune.search.choices import Choice, Either, Move, Stay
from vitprune.search.solver import solve

LEVELS = 3


def random_blocks(rng, depth, tick=None):
    """Blocks as the search of a ViT has them; with ``tick`` every time is a whole number of it."""

    def time(most):
        return float(rng.integers(1, 60) * tick) if tick else float(rng.uniform(0, most))

    def choices(names, part):
        return [Choice(float(rng.exponential()) * (i > 0), time(2), (part, name)) for i, name in enumerate(names)]

    blocks = []
    for _ in range(depth):
        steps = {
            (i, j): Choice(float(rng.exponential(0.5)), time(0.3), ("patches", j))
            for i in range(LEVELS)
            for j in range(i + 1, LEVELS)
            if rng.random() < 0.8
        }
        attention = Stay([choices((3, 2, 1), "heads") for _ in range(LEVELS)])
        gone = Stay([[Choice(float(rng.exponential()), 0.0, ("heads", 0))]] * LEVELS)
        branch = [attention, Move(steps)] if rng.random() < 0.5 else [Move(steps), attention]
        blocks.append([Either([branch, [gone]]), Stay([choices((9, 6), "mlp") for _ in range(LEVELS)])])
    return blocks


def paths(parts, level):
    """All (choices, level after) through a row of parts."""
    if not parts:
        yield (), level
        return
    part, rest = parts[0], parts[1:]
    if isinstance(part, Stay):
        starts = [((choice,), level) for choice in part.choices[level]]
    elif isinstance(part, Move):
        starts = [((), level), *(((choice,), j) for (i, j), choice in part.steps.items() if i == level)]
    else:
        starts = [found for branch in part.branches for found in paths(branch, level)]
    for taken, after in starts:
        for more, end in paths(rest, after):
            yield taken + more, end


def all_plans(blocks, constant):
    """(ms, loss) of every plan there is."""
    found = [((), 0)]
    for block in blocks:
        found = [(taken + more, end) for taken, level in found for more, end in paths(block, level)]
    ms = [constant[level] + math.fsum(c.ms for c in taken) for taken, level in found]
    return np.array(ms), np.array([math.fsum(c.loss for c in taken) for taken, _ in found])


@pytest.mark.parametrize("seed", range(30))
def test_it_finds_the_optimum_of_all_plans_when_the_bucket_divides_all_times(seed):
    rng = np.random.default_rng(seed)
    tick = 1 / 64  # a power of two: sums of ticks are exact
    blocks, constant = random_blocks(rng, 2, tick), [float(rng.integers(1, 40) * tick) for _ in range(LEVELS)]
    ms, loss = all_plans(blocks, constant)
    budgets = [float(b) for b in rng.uniform(ms.min(), ms.max(), 8)] + [float(ms.min()), float(ms.max())]
    frontier = solve(blocks, constant, budgets, bucket_ms=tick)
    for budget in budgets:
        found = frontier.best(budget)
        assert found.ms_exact <= budget
        assert found.ms_rounded == found.ms_exact
        # losses are whole multiples of 2^-44 of their sum inside the solver
        assert found.loss == pytest.approx(loss[ms <= budget].min(), rel=0, abs=1e-11)
        # nothing that this budget needs is cut off where it is the largest one
        assert solve(blocks, constant, [budget], bucket_ms=tick).best(budget).loss == found.loss


@pytest.mark.parametrize("seed", range(30))
def test_with_any_times_it_is_never_over_and_optimal_up_to_the_stated_rounding(seed):
    rng = np.random.default_rng(100 + seed)
    blocks, constant = random_blocks(rng, 2), [0.5, 0.45, 0.4]
    ms, loss = all_plans(blocks, constant)
    budgets = [float(b) for b in rng.uniform(ms.min(), ms.max(), 6)]
    frontier = solve(blocks, constant, budgets, slack=0.002)
    assert frontier.slack_ms <= 0.002 * min(budgets) * (1 + 1e-9)
    for budget in budgets:
        found = frontier.best(budget)
        assert found.ms_exact <= budget
        assert found.ms_exact <= found.ms_rounded <= found.ms_exact + frontier.slack_ms
        least = loss[ms <= budget].min()
        assert found.loss >= least - 1e-11
        within = ms <= budget - frontier.slack_ms
        assert found.loss <= (loss[within].min() if within.any() else np.inf) + 1e-11


def test_no_path_rounds_more_than_stated_however_many_tiny_times_it_has():
    tiny = 1e-9  # of a millisecond: rounding makes a whole bucket of each
    step = Move({(0, 1): Choice(0.0, tiny, "to 1"), (1, 2): Choice(0.0, tiny, "to 2")})
    stay = Stay([[Choice(0.0, tiny, "stay")]] * 3)
    only_last = Stay([[], [], [Choice(0.0, tiny, "stay")]])
    frontier = solve([[stay, step, stay], [stay, step, only_last]], [1.0] * 3, [1.01])
    found = frontier.best(1.01)
    assert found.labels == (("stay", "to 1", "stay"), ("stay", "to 2", "stay"))
    assert 5 * frontier.bucket_ms < found.ms_rounded - found.ms_exact <= frontier.slack_ms <= 0.002 * 1.01


def test_three_blocks_agree_with_all_their_plans():
    rng = np.random.default_rng(7)
    tick = 1 / 64
    blocks = random_blocks(rng, 3, tick)
    ms, loss = all_plans(blocks, [tick] * LEVELS)
    frontier = solve(blocks, [tick] * LEVELS, [float(ms.min()), float(ms.max())], bucket_ms=tick)
    for budget in np.linspace(ms.min(), ms.max(), 40):
        assert frontier.best(float(budget)).loss == pytest.approx(loss[ms <= budget].min(), rel=0, abs=1e-11)


def retrace(blocks, solution):
    """Loss and ms of the labels, walked through the parts by hand; fails where no choice bears the label."""
    loss, ms, level = [], [], 0

    def walk(parts, labels, level):
        if not parts:
            return [] if not labels else None
        part, rest = parts[0], parts[1:]
        if isinstance(part, Either):
            tries = [walk([*branch, *rest], labels, level) for branch in part.branches]
            return next((found for found in tries if found is not None), None)
        if isinstance(part, Move):
            if labels and labels[0][0] == "patches":
                step = part.steps.get((level, labels[0][1]))
                inner = None if step is None else walk(rest, labels[1:], labels[0][1])
                return None if inner is None else [step, *inner]
            return walk(rest, labels, level)
        fitting = [c for c in part.choices[level] if labels and c.label == labels[0]]
        inner = walk(rest, labels[1:], level) if fitting else None
        return None if inner is None else [fitting[0], *inner]

    for block, labels, after in zip(blocks, solution.labels, solution.levels, strict=True):
        taken = walk(list(block), list(labels), level)
        assert taken is not None
        loss += [c.loss for c in taken]
        ms += [c.ms for c in taken]
        level = after
    return math.fsum(loss), ms, level


@pytest.mark.parametrize("seed", range(10))
def test_labels_lead_back_to_the_very_losses_and_times(seed):
    rng = np.random.default_rng(200 + seed)
    blocks, constant = random_blocks(rng, 6), [0.5, 0.4, 0.3]
    frontier = solve(blocks, constant, [3.0, 12.0])
    for point in frontier.points():
        loss, ms, level = retrace(blocks, point)
        assert loss == point.loss
        assert math.fsum([constant[level], *ms]) == point.ms_exact
        assert list(point.levels) == sorted(point.levels)


def test_loss_never_rises_with_the_budget_and_points_are_what_budgets_give():
    rng = np.random.default_rng(5)
    blocks, constant = random_blocks(rng, 6), [0.5, 0.4, 0.3]
    frontier = solve(blocks, constant, [3.0, 14.0])
    budgets = np.linspace(max(3.0, frontier.fastest.ms_exact), 14.0, 60)
    losses = [frontier.best(float(b)).loss for b in budgets]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))
    points = frontier.points(10_000)
    assert all(a.ms_rounded < b.ms_rounded and a.loss > b.loss for a, b in itertools.pairwise(points))
    for point in points:
        assert frontier.best(point.ms_rounded).loss == pytest.approx(point.loss, rel=0, abs=1e-11)
    few = frontier.points(7)
    assert len(few) <= 7
    assert few[0] == points[0]
    assert few[-1] == points[-1]


def test_one_pass_gives_what_separate_passes_with_the_same_bucket_give():
    rng = np.random.default_rng(6)
    blocks, constant = random_blocks(rng, 5), [0.5, 0.4, 0.3]
    together = solve(blocks, constant, [4.0, 5.5, 7.0])
    for budget in (4.0, 5.5, 7.0):
        alone = solve(blocks, constant, [budget], bucket_ms=together.bucket_ms)
        assert alone.best(budget) == together.best(budget)


def test_doubling_all_times_and_the_budget_changes_nothing():
    rng = np.random.default_rng(8)
    blocks, constant = random_blocks(rng, 5), [0.5, 0.4, 0.3]

    def doubled(part):
        if isinstance(part, Stay):
            return Stay([[c._replace(ms=2 * c.ms) for c in level] for level in part.choices])
        if isinstance(part, Move):
            return Move({step: c._replace(ms=2 * c.ms) for step, c in part.steps.items()})
        return Either([[doubled(inner) for inner in branch] for branch in part.branches])

    once = solve(blocks, constant, [4.0, 9.0])
    twice = solve([[doubled(part) for part in block] for block in blocks], [2 * c for c in constant], [8.0, 18.0])
    for budget in (4.0, 5.0, 6.5, 9.0):
        assert twice.best(2 * budget).labels == once.best(budget).labels


def keep_or(loss, ms, less):
    return Stay([[Choice(0.0, ms, "all"), Choice(loss, less, "less")]])


def test_where_nothing_is_lost_everything_is_kept_as_soon_as_it_fits():
    blocks = [[keep_or(0.0, 1.0, 0.5)] for _ in range(4)]
    frontier = solve(blocks, [0.25], [2.5, 5.0])
    assert frontier.best(4.25).labels == (("all",),) * 4
    assert frontier.best(5.0).labels == (("all",),) * 4
    assert frontier.best(4.2).loss == 0
    assert frontier.points()[-1].labels == (("all",),) * 4


def test_an_unreachable_budget_names_the_fastest_plan_and_what_is_fixed():
    frontier = solve([[keep_or(1.0, 1.0, 0.5)]] * 4, [0.25], [1.0, 4.25])
    with pytest.raises(BudgetUnreachable, match=r"no plan takes 2 ms or less: the fastest takes 2.25 ms, 0.25 ms") as e:
        frontier.best(2.0)
    assert e.value.fastest_ms == 2.25
    assert frontier.best(2.25).labels == (("less",),) * 4  # exactly reachable, whatever the rounding
    assert solve([[keep_or(1.0, 1.0, 0.5)]], [0.0], [0.1]).points()[0].labels == (("less",),)


def test_a_budget_beyond_those_solved_for_is_refused_unless_unlimited_was_asked():
    blocks = [[keep_or(1.0, 1.0, 0.5)]] * 4
    with pytest.raises(InputError, match=r"up to 3\.0 ms"):
        solve(blocks, [0.25], [3.0]).best(3.5)
    assert solve(blocks, [0.25], [3.0, math.inf]).best(1e9).loss == 0


def test_attention_removed_means_no_token_leaves_in_that_block():
    free_step = Move({(0, 1): Choice(0.0, 0.0, ("patches", 1))})
    heads = Stay([[Choice(0.0, 9.0, "heads")], [Choice(0.0, 9.0, "heads")]])
    gone = Stay([[Choice(0.0, 0.0, "gone")]] * 2)
    mlp = Stay([[Choice(0.0, 5.0, "mlp")], [Choice(0.0, 1.0, "mlp")]])
    only = solve([[Either([[heads, free_step], [gone]]), mlp]], [0.0, 0.0], [5.0, 20.0])
    assert only.best(9.9).labels == (("gone", "mlp"),)  # 5 ms: the step that would make it 1 needs the heads' 9
    assert only.best(9.9).ms_exact == 5.0
    assert only.fastest.ms_exact == 5.0


def test_the_last_level_decides_the_constant_part():
    step = Move({(0, 1): Choice(0.1, 0.0, "step")})
    frontier = solve([[step]], [2.0, 1.0], [1.0, 2.0])
    assert frontier.best(1.5).labels == (("step",),)
    assert frontier.best(2.0).labels == ((),)
    assert frontier.best(2.0).levels == (0,)


@pytest.mark.parametrize(
    ("blocks", "constant", "budgets", "why"),
    [
        ([], [0.0], [1.0], "needs blocks"),
        ([[keep_or(1, 1, 1)]], [0.0], [], "needs blocks"),
        ([[keep_or(1, 1, 1)]], [0.0], [-1.0], "budgets above 0"),
        ([[keep_or(1, 1, 1)]], [math.nan], [1.0], "must be finite"),
        ([[keep_or(1, 1, 1)]], [0.0, 0.0], [1.0], "block 0 has choices for 1 token levels, there are 2"),
        ([[keep_or(-1, 1, 1)]], [0.0], [1.0], "block 0, less: loss -1"),
        ([[keep_or(1, math.nan, 1)]], [0.0], [1.0], "block 0, all: loss 0.0 and nan ms"),
        ([[Move({(1, 0): Choice(0, 0, 0)})]], [0.0, 0.0], [1.0], "a step from level 1 to 0"),
        ([[Stay([[]])]], [0.0], [1.0], "no path leads through"),
    ],
)
def test_what_is_no_search_is_refused(blocks, constant, budgets, why):
    with pytest.raises(InputError, match=why):
        solve(blocks, constant, budgets)


def test_more_choices_than_a_byte_can_number_are_told_apart():
    many = Stay([[Choice(1.0 / (i + 1), float(i), i) for i in range(600)]])
    frontier = solve([[many]], [1.0], [1.0, 700.0], bucket_ms=1.0)
    assert [frontier.best(float(i + 1)).labels for i in (0, 255, 256, 599)] == [
        ((0,),),
        ((255,),),
        ((256,),),
        ((599,),),
    ]
