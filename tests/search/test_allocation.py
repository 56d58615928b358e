"""Rules on rankings made by hand: two blocks of two heads and four hidden units; a head takes 4, a unit 1."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from synthetic import HEADS, MLP, problem
from tiny import images, tiny_vit

from vitprune import macs
from vitprune.criteria.base import Ranking
from vitprune.errors import BudgetUnreachable, InputError
from vitprune.search import Allocation, Counts, Sizes, counted
from vitprune.search.allocation import RULES, Rule
from vitprune.search.losses import rank_units
from vitprune.search.rankings import Rankings
from vitprune.surgery import dense_plan, prune

DENSE = Counts((2, 2), (4, 4), (9, 9))
SIZES = Sizes((1, 0), (2, 0))
SCORES = {
    (0, "attn"): [1.0, 5.0],
    (0, "mlp"): [0.1, 0.2, 0.3, 0.4],
    (1, "attn"): [2.0, 3.0],
    (1, "mlp"): [6.0, 0.0, 7.0, 0.2],
}


def rankings(scores=SCORES, cross_terms=None) -> Rankings:
    halves = {half: Ranking.from_scores(torch.tensor(values)) for half, values in scores.items()}
    return Rankings(halves, cross_terms=cross_terms or {})


def cost(counts: Counts) -> float:
    return 4.0 * sum(counts.heads) + sum(counts.mlp)


def path(rule: Rule, sizes: Sizes = SIZES, **given) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    offers = Allocation.of(rule, rankings(**given), sizes, DENSE).offers(cost)
    assert [offer.cost for offer in offers] == [cost(offer.counts) for offer in offers]
    assert {offer.counts.patches for offer in offers} == {(9, 9)}
    return [(offer.counts.heads, offer.counts.mlp) for offer in offers]


def test_global_takes_the_steps_of_least_mean_importance_whatever_they_are_of():
    # means: block 0 heads 1, 5, units 0.15, 0.35; block 1 heads 2, 3, units 0.1 (0 and 0.2), 6.5
    assert path("global") == [
        ((2, 2), (4, 4)),
        ((2, 2), (4, 2)),
        ((2, 2), (2, 2)),
        ((2, 2), (0, 2)),
        ((1, 2), (0, 2)),
        ((1, 1), (0, 2)),
        ((1, 0), (0, 2)),
        ((0, 0), (0, 2)),
        ((0, 0), (0, 0)),
    ]


def test_per_kind_takes_the_same_share_of_heads_and_of_units():
    # a quarter of each kind at a time, heads first where both are due: the lowest of all layers
    assert path("per_kind")[1:5] == [
        ((1, 2), (4, 4)),
        ((1, 2), (4, 2)),
        ((1, 1), (4, 2)),
        ((1, 1), (2, 2)),
    ]


def test_per_kind_takes_shares_of_all_units_those_included_that_may_not_leave():
    # units an eighth at a time, of which b1 has the lowest over its layer's mean; a head is a quarter
    assert path("per_kind", Sizes((1,), (3, 2, 1)))[1:5] == [
        ((2, 2), (4, 3)),
        ((1, 2), (4, 3)),
        ((1, 2), (4, 2)),
        ((1, 2), (3, 2)),
    ]


def test_per_kind_ranks_scores_over_their_layers_mean():
    small, large = [1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]
    scores = SCORES | {(0, "mlp"): small, (1, "mlp"): large}
    assert [mlp for _, mlp in path("per_kind", Sizes((), (3, 2, 1)), scores=scores)] == [
        (4, 4), (3, 4), (3, 3), (2, 3), (2, 2), (1, 2), (1, 1),
    ]  # fmt: skip


def test_uniform_takes_the_same_share_of_every_half():
    assert path("uniform") == [((2, 2), (4, 4)), ((1, 1), (2, 2)), ((0, 0), (0, 0))]


def test_uniform_takes_halves_as_near_as_their_sizes_come():
    assert path("uniform", Sizes((1,), (3, 2, 1))) == [
        ((2, 2), (4, 4)),
        ((2, 2), (3, 3)),
        ((1, 1), (2, 2)),
        ((1, 1), (1, 1)),
    ]


def test_greedy_divides_by_what_is_saved_of_what_is_left():
    # shares of their kind: a head 1/11 for 4; units 0.2/14.2, 0.3/14.2, then 0.7/14.2 for 2
    assert path("greedy")[1:5] == [((2, 2), (4, 2)), ((2, 2), (2, 2)), ((1, 2), (2, 2)), ((1, 2), (0, 2))]
    dear = Allocation.of("greedy", rankings(), SIZES, DENSE)

    def units_are_free(counts: Counts) -> float:
        return 4.0 * sum(counts.heads)

    assert dear.offers(units_are_free)[1].counts.heads == (1, 2)
    assert dear.offers(units_are_free)[-1].counts.mlp == (0, 0)  # in the end what saves nothing


def test_nvit_counts_what_is_saved_against_the_sum_of_a_steps_scores_and_keeps_some_of_each_half():
    def slow_heads(counts: Counts) -> float:
        return 1500.0 * sum(counts.heads) + sum(counts.mlp)  # a head is worth 0.75 at 5e-4 for each

    found = Allocation.of("nvit", rankings(), SIZES, DENSE).offers(slow_heads)
    # less what they save: heads 0.25 and 1.25, units 0.3 - 0.001 and 0.2 - 0.001
    order = [(offer.counts.heads, offer.counts.mlp) for offer in found]
    assert order == [((2, 2), (4, 4)), ((2, 2), (4, 2)), ((1, 2), (4, 2)), ((1, 2), (2, 2)), ((1, 1), (2, 2))]


TERMS = {"attn": {"attn": 0.0, "mlp": 0.0}, "mlp": {"attn": 0.0, "mlp": 0.0}}


def test_savit_finds_the_shares_of_least_estimate():
    # within 16 of 24: two heads (1 + 2), or a head and units of both blocks (1 + 0.2 + 0.3)
    def within(terms) -> tuple[tuple[int, ...], tuple[int, ...]]:
        found = Allocation.of("savit", rankings(cross_terms=terms), SIZES, DENSE).within(cost, 16)
        return found.heads, found.mlp

    assert within(TERMS) == ((1, 2), (2, 2))
    together = {"attn": {"attn": 0.0, "mlp": 10.0}, "mlp": {"attn": 10.0, "mlp": 0.0}}  # 2 * 10 / 4 / 2 more
    assert within(together) == ((1, 1), (4, 4))


def test_savit_keeps_the_best_of_each_half():
    found = Allocation.of("savit", rankings(cross_terms=TERMS), SIZES, DENSE).offers(cost)
    assert (found[-1].counts.heads, found[-1].counts.mlp) == ((1, 1), (2, 2))
    many = {(0, "mlp"): [float(unit) for unit in range(100)]}
    one = Counts((0,), (100,), (9,))
    rare = Allocation.of("savit", rankings(many, TERMS), Sizes((), (10, 5, 4, 0)), one).offers(cost)
    assert [offer.counts.mlp[0] for offer in rare] == [100, 10, 5]  # 5% of a hundred


def test_savit_needs_the_criterion_that_tells_how_kinds_go_together():
    with pytest.raises(InputError, match="what the criterion savit alone tells; use both or neither"):
        Allocation.of("savit", rankings(), SIZES, DENSE)


def test_an_unknown_rule_is_named():
    with pytest.raises(InputError, match=r"an allocation is exact or one of global, per_kind, .*, got 'best'"):
        Allocation.of("best", rankings(), SIZES, DENSE)
    assert get_args(Rule) == RULES


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_keeps_to_sizes_and_budget(rule):
    model, sizes = tiny_vit(), Sizes((3, 1), (48, 16))
    found = rank_units(model, images(4), "savit", sizes)
    whole = Counts((4, 4), (64, 64), (49, 49))
    allocation = Allocation.of(rule, found, sizes, whole)
    for what, count in (("macs", macs.macs), ("params", macs.params)):
        of = counted(model.config, what)
        assert of(whole) == count(model.config)
        counts = allocation.within(of, 0.8 * of(whole))
        assert set(counts.heads) <= {4, 3, 1}
        assert set(counts.mlp) <= {64, 48, 16}
        plan = found.plan(dense_plan(model).model_sha256, counts.heads, counts.mlp, [None] * 2, patches=49)
        assert of(counts) == count(prune(model, plan).config) <= 0.8 * of(whole)
    with pytest.raises(BudgetUnreachable, match="this allocation leads to no plan within 1: the least one takes "):
        allocation.within(of, 1)


def ranked(depth: int, seed: int = 0) -> Rankings:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"attn": HEADS[0], "mlp": MLP[0]}
    halves = {
        (block, kind): Ranking.from_scores(torch.rand(units, generator=generator))
        for block in range(depth)
        for kind, units in sizes.items()
    }
    return Rankings(halves, cross_terms=TERMS)


@pytest.mark.parametrize("rule", RULES)
def test_a_problem_is_solved_by_the_rule_and_never_loses_less_than_the_exact_search(rule):
    exact = problem(0, depth=4, method=None)
    allocated = exact.allocated(rule, ranked(4))
    dense_ms = exact.predict_ms(exact.dense())
    plans = allocated.solve([dense_ms / 2, dense_ms])
    assert plans.best(dense_ms).counts == exact.dense()
    for share in (0.9, 0.75, 0.6):
        found, best = (one.solve([share * dense_ms]).best(share * dense_ms) for one in (allocated, exact))
        assert found.predicted_ms == exact.predict_ms(found.counts) <= share * dense_ms
        assert found.loss >= best.loss - 1e-9
        assert found.loss == pytest.approx(sum(exact.losses_of(found.counts).values()))
    points = plans.points(20)
    assert points[0].counts == plans.fastest.counts
    assert [point.predicted_ms for point in points] == sorted(point.predicted_ms for point in points)
    with pytest.raises(BudgetUnreachable):
        plans.best(plans.fastest.predicted_ms * 0.99)


def test_sizes_without_a_loss_are_passed_over():
    whole = problem(0, depth=2, method=None)
    del whole.losses.heads[0][3]
    offers = whole.allocated("uniform", ranked(2)).allocation.offers(whole.predict_ms)
    assert {offer.counts.heads[0] for offer in offers} == {6, 5, 4, 2, 0}
    assert {offer.counts.heads[1] for offer in offers} == {6, 5, 4, 3, 2, 0}


def test_rules_know_of_no_tokens():
    with pytest.raises(InputError, match="the allocation global knows of no tokens, and evit removes some"):
        problem(0, depth=2).allocated("global", ranked(2))
