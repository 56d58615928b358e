"""Dims of heads in the search: their times, their losses, their choice, and the plan that comes of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from synthetic import (
    CIRCUMSTANCES,
    EVIT,
    HEADS,
    MLP,
    TOKENS,
    TOME,
    ending_early,
    levels,
    losses,
    pieces,
    problem,
    table,
)
from tiny import images, tiny_vit

from vitprune.errors import InputError
from vitprune.model.vit import fingerprint
from vitprune.search.counts import Counts, Sizes
from vitprune.search.evaluate import evaluate_counts
from vitprune.search.frontier import Point, from_rows, to_rows
from vitprune.search.latency import LatencyTable
from vitprune.search.losses import LossTable, Rankings, measure_losses
from vitprune.search.problem import Problem
from vitprune.search.several import slowest
from vitprune.surgery import prune

QK, V = (64, 48, 32), (64, 32)


def saved(n: int, h: int, qk: int, v: int) -> float:
    """Milliseconds less than with all dims, by a form of known factors; 197 tokens and 6 heads may save a third."""
    return (197 - 196 + n) * h * ((64 - qk) * 6e-6 + (64 - v) * 2e-6 + (1 + n) * ((64 - qk) * 1e-8 + (64 - v) * 3e-8))


def with_dims(some: bool = True, **changes) -> LatencyTable:
    """The synthetic device, on which dims save as ``saved`` says; a few sizes measured, or all."""
    grid = replace(levels(), qk=QK, v=V)
    keys = [key for key in grid.dim_keys() if not some or (key[0] in (196, 67) and key[1] in (6, 2))]
    measured = {(n, h, qk, v): pieces().attn[n, h] - saved(n, h, qk, v) for n, h, qk, v in keys}
    return LatencyTable.fill(CIRCUMSTANCES, grid, pieces(attn_dims=measured, **changes))


def test_a_few_sizes_tell_what_all_save():
    filled = with_dims()
    assert len(filled.attn_dims) == len(TOKENS) * len(HEADS) * (len(QK) * len(V) - 1)
    assert sum(entry.measured for entry in filled.attn_dims.values()) == 2 * 2 * 5
    for (n, h, qk, v), entry in filled.attn_dims.items():
        assert entry.ms == pytest.approx(pieces().attn[n, h] - saved(n, h, qk, v), rel=1e-6)
    assert not filled.attn_dims[137, 4, 48, 32].measured
    assert filled.attn_ms(137, 4, dims=(48, 32)) == pytest.approx(filled.attn_dims[137, 4, 48, 32].ms)
    assert filled.attn_ms(137, 4, dims=(64, 64)) == filled.attn_ms(137, 4) == pieces().attn[137, 4]
    sized = filled.attn_ms(137, 4, sized=True) - filled.attn_ms(137, 4, sized=True, dims=(48, 32))
    assert sized == pytest.approx(saved(137, 4, 48, 32))


def test_a_prediction_never_leaves_nothing_and_fewer_dims_never_add():
    grid = replace(levels(), qk=QK, v=V)
    times = {key: 0.0 for key in grid.dim_keys() if key[1] == 6 and key[2:] == (32, 32)}
    times |= {key: 9.0 for key in grid.dim_keys() if key[1] == 6 and key[2:] == (64, 32)}
    filled = LatencyTable.fill(CIRCUMSTANCES, grid, pieces(attn_dims=times))
    assert filled.attn_ms(196, 6, dims=(64, 32)) == 9.0  # as it was measured
    predicted = {key: entry.ms for key, entry in filled.attn_dims.items() if not entry.measured}
    assert all(0.05 * pieces().attn[key[:2]] <= ms <= pieces().attn[key[:2]] for key, ms in predicted.items())


def test_a_sum_with_dims_is_the_one_added_by_hand():
    counts = Counts((6, 3, 0), (1536, 768, 384), (137, 137, 137), (48, 64, 0), (64, 32, 0))
    by_hand = 0.753 + (1.885 - saved(196, 6, 48, 64) + 0.21 + 1.754) + (0.729 - saved(137, 3, 64, 32) + 0.940)
    assert with_dims().sum_ms(counts, EVIT) == pytest.approx(by_hand + 0.527 + 0.071, rel=1e-6)
    heads = 6 * (48 + 64) / 128 + 3 * (64 + 32) / 128
    assert with_dims().megabytes(counts) == pytest.approx(4 * (heads * 4 * 64 * 384 + 2688 * 2 * 384) / 1e6)
    early = ending_early()
    more = {"mlp": pieces().mlp | {(0, m): 0.005 for m in MLP}, "head": pieces().head | {0: 0.02}}
    last = with_dims(attn_prefix={key: entry.ms for key, entry in early.attn_prefix.items()}, **more)
    share = 1 - saved(137, 3, 64, 32) / 0.729
    assert last.attn_prefix_ms(137, 3, (64, 32)) == pytest.approx(0.25 * 0.729 * share, rel=1e-6)


def test_a_table_with_dims_comes_back_and_an_old_one_has_none():
    plain = json.loads(json.dumps(with_dims().to_dict()))
    assert LatencyTable.from_dict(plain) == with_dims()
    old = table().to_dict()
    assert "attn_dims" not in old
    assert not {"qk", "v"} & old["levels"].keys()
    assert LatencyTable.from_dict(json.loads(json.dumps(old))) == table()
    with pytest.raises(InputError, match=r"no head dims entry for \(196, 6, 32, 64\)"):
        table().sum_ms(Counts((6,), (1536,), (196,), (32,), (64,)))


@pytest.mark.parametrize(
    ("times", "sentence"),
    [
        ({(196, 6, 32, 64): 1.0}, "1 measured head dims entries are too few, 4 are needed"),
        ({(196, 6, 64, 64): 1.0}, r"head dims entry \(196, 6, 64, 64\) lies outside the grid"),
        ({(196, 6, 32, 64): float("nan")}, "must be a time in milliseconds, got nan"),
    ],
)
def test_times_that_are_none_are_refused(times, sentence):
    with pytest.raises(InputError, match=sentence):
        LatencyTable.fill(CIRCUMSTANCES, replace(levels(), qk=QK, v=V), pieces(attn_dims=times))


def test_a_table_with_dims_is_shown_with_them():
    from vitprune_deploy.verbs.building import _table_text

    rows = [line.split() for line in _table_text(with_dims()).splitlines()]
    heads = [row[-5:] for row in rows]
    first = heads.index(["64/32", "48/64", "48/32", "32/64", "32/32"])
    shown = next(row for row in rows[first:] if row[0] == "137")
    assert all(cell.startswith("~") for cell in shown[1:])
    assert "dims" not in _table_text(table())


def test_of_several_devices_the_slowest_decides_for_dims_too():
    slower = replace(with_dims(), attn_dims={k: e._replace(ms=2 * e.ms) for k, e in with_dims().attn_dims.items()})
    both = slowest([with_dims(), slower], [1.0, 1.0])
    assert both.attn_ms(196, 6, dims=(32, 32)) == pytest.approx(2 * with_dims().attn_ms(196, 6, dims=(32, 32)))


# --- the choice -------------------------------------------------------------------------------------------------------


def dims_problem(seed: int = 0, latency: LatencyTable | None = None, cheap: float = 1e-3, depth: int = 3) -> Problem:
    """The synthetic search with dims whose loss is ``cheap`` for each step."""
    curves = [{64: 0.0, 48: cheap, 32: 2 * cheap}] * depth, [{64: 0.0, 32: cheap}] * depth
    known = replace(losses(seed, depth, "evit"), qk=curves[0], v=curves[1])
    sizes = Sizes((*HEADS, 0), (*MLP, 0), TOKENS, (64, 48, 32), (64, 32))
    return Problem(latency or with_dims(), known, EVIT, sizes)


def test_cheap_dims_go_before_heads_and_the_prediction_is_the_tables():
    asked = dims_problem(cheap=1e-6)
    dense_ms = asked.predict_ms(asked.dense())
    point = asked.solve([dense_ms * 0.9]).best(dense_ms * 0.9)
    assert point.counts.qk is not None
    assert min(point.counts.qk) < 64
    assert point.predicted_ms == pytest.approx(asked.predict_ms(point.counts), rel=1e-9)
    assert point.predicted_ms <= dense_ms * 0.9
    assert point.loss == pytest.approx(sum(asked.losses_of(point.counts).values()), rel=1e-9)
    without = problem(0, 3)
    assert point.loss < without.solve([dense_ms * 0.9]).best(dense_ms * 0.9).loss


def test_every_choice_of_a_small_problem_was_weighed():
    asked = dims_problem(seed=1, depth=1, cheap=0.01)
    best = {}
    for h in (*HEADS, 0):
        for m in (*MLP, 0):
            for qk in QK if h else (0,):
                for v in V if h else (0,):
                    dims = ((qk,), (v,)) if h and (qk, v) != (64, 64) else (None, None)
                    counts = Counts((h,), (m,), (196,), *dims)
                    best[counts] = (asked.predict_ms(counts), sum(asked.losses_of(counts).values()))
    for share in (0.9, 0.7, 0.5):
        budget_ms = share * asked.predict_ms(asked.dense())
        least = min(loss for ms, loss in best.values() if ms <= budget_ms)
        assert asked.solve([budget_ms], slack=1e-5).best(budget_ms).loss == pytest.approx(least, abs=1e-9)


def test_dims_have_weights_and_points_carry_them():
    asked = dims_problem(cheap=1e-6)
    assert {(0, "qk"), (2, "v")} <= set(asked.units())
    heavy = asked.reweighted({(block, kind): 1e9 for block in range(3) for kind in ("qk", "v")})
    budget_ms = 0.8 * asked.predict_ms(asked.dense())
    assert heavy.solve([budget_ms]).best(budget_ms).counts.qk is None
    point = asked.solve([budget_ms]).best(budget_ms)
    (again,) = from_rows(json.loads(json.dumps(to_rows([point]))))
    assert again == point
    assert "qk" not in to_rows([Point(1.0, 1.0, 0.0, asked.dense(), None)])[0]["counts"]


@pytest.mark.parametrize("lacking", ["times", "losses", "sizes"])
def test_without_times_losses_or_sizes_no_dim_is_offered_and_the_plans_are_the_same(lacking):
    asked, plain = dims_problem(), problem(0, 3)
    if lacking == "times":
        asked = asked.on(table())
    elif lacking == "losses":
        asked = replace(asked, losses=replace(asked.losses, qk=[], v=[]))
    else:
        asked = replace(asked, sizes=plain.sizes)
    budget_ms = 0.6 * plain.predict_ms(plain.dense())
    assert asked.solve([budget_ms]).points() == plain.solve([budget_ms]).points()
    assert asked.units() == plain.units()


def test_merged_tokens_carry_their_sizes_past_fewer_dims():
    counts = Counts((6, 6), (1536, 1536), (137, 137), (32, 32), (64, 64))
    plain, sized = (with_dims().sum_ms(counts, TOME._replace(proportional=p)) for p in (False, True))
    assert sized - plain == pytest.approx(0.1 * 1.265)


@pytest.mark.parametrize(
    ("dims", "sentence"),
    [
        (((8, 8), None), "counts need dims of queries and keys, and of values, for every block"),
        (((8,), (8,)), "counts need dims of queries and keys, and of values, for every block"),
        (((8, 0), (8, 8)), "block 1 of the counts keeps 0 dims of each of 2 heads"),
    ],
)
def test_counts_of_half_the_dims_are_refused(dims, sentence):
    with pytest.raises(InputError, match=sentence):
        Counts((2, 2), (4, 4), (9, 9), *dims)


# --- losses and plans of a real model ---------------------------------------------------------------------------------

SIZES = Sizes((4, 2, 0), (64, 32, 0), (), (8, 6, 4, 2), (8, 4))


@pytest.mark.parametrize("criterion", ["obs", "taylor", "magnitude"])
@torch.no_grad()
def test_dims_are_measured_ranked_stored_and_put_into_plans(criterion, tmp_path):
    model = tiny_vit(depth=2)
    before = fingerprint(model)
    steps = []
    found, rankings = measure_losses(
        model,
        images(24),
        SIZES,
        criterion=criterion,
        probes=8,
        store=tmp_path,
        progress=lambda *step: steps.append(step),
    )
    assert fingerprint(model) == before
    gates = criterion == "taylor"
    assert steps[-1][0] == steps[-1][1] == len(steps) - gates
    for curve in found.qk:
        assert list(curve) == [8, 6, 4, 2]
        assert curve[8] == 0 < curve[6] <= curve[4] <= curve[2]
    assert [list(curve) for curve in found.v] == [[8, 4]] * 2
    assert LossTable.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    loaded = Rankings.load(tmp_path)
    counts = Counts((2, 4), (64, 32), (49, 49), (6, 8), (8, 4))
    plans = [one.plan(before, counts.heads, counts.mlp, [None, None], patches=49, kept_qk=counts.qk, kept_v=counts.v)
             for one in (rankings, loaded)]  # fmt: skip
    assert plans[0] == plans[1]
    assert plans[0].blocks[0].v is None
    assert [len(dims) for dims in plans[0].blocks[0].qk] == [6, 6]
    slim = prune(model, plans[0], loaded.weights(counts.heads, counts.mlp, counts.qk, counts.v))
    assert [(b.heads, b.qk_dim, b.v_dim) for b in slim.config.blocks] == [(2, 6, 8), (4, 8, 4)]

    # a whole plan evaluated is the pruned model; a single change is what was measured
    pictures = images(24)[:8]
    dense, changed = (one(pictures).double().log_softmax(-1) for one in (model, slim))
    loss = (dense.exp() * (dense - changed)).sum(-1).mean().item()
    assert evaluate_counts(model, loaded, [counts], pictures)[0] == pytest.approx(loss, rel=1e-3, abs=1e-6)  # fp32
    for kind, dims in (("qk", ((2, 8), (8, 8))), ("v", ((8, 8), (4, 8)))):
        one = Counts((4, 4), (64, 64), (49, 49), *dims)
        measured = getattr(found, kind)[0][2 if kind == "qk" else 4]
        assert evaluate_counts(model, loaded, [one], pictures)[0] == pytest.approx(measured, rel=1e-3, abs=1e-6)


def test_values_that_make_up_for_removed_ones_lose_less():
    model, pictures = tiny_vit(depth=2, seed=3), images(64)
    sizes = Sizes((4,), (64,), (), (), (8, 4))
    _, rankings = measure_losses(model, pictures, sizes, criterion="obs", probes=8)
    plan = rankings.plan(fingerprint(model), (4, 4), (64, 64), (None, None), patches=49, kept_v=(4, 4))
    weights = rankings.weights((4, 4), (64, 64), None, (4, 4))
    assert set(weights) == {(0, "attn"), (1, "attn")}
    made_up, cut = ((prune(model, plan, some)(pictures) - model(pictures)).square().mean() for some in (weights, {}))
    assert made_up < cut


def test_norms_over_the_dims_hold_them_fast():
    found, rankings = measure_losses(tiny_vit(depth=1, qk_norm=True), images(4), SIZES, criterion="magnitude", probes=4)
    assert found.qk == [{8: 0.0}]
    assert list(found.v[0]) == [8, 4]
    assert set(rankings.dims) == {(0, "v")}
    with pytest.raises(InputError, match="the qk dims of block 0 were not ranked, and 4 of them are to be kept"):
        rankings.plan("abc", (4,), (64,), (None,), patches=49, kept_qk=(4,))


@torch.no_grad()
def test_without_dims_nothing_of_them_is_stored(tmp_path):
    model = tiny_vit(depth=1)
    found, rankings = measure_losses(model, images(4), Sizes((4, 2), (64,)), criterion="obs", probes=4, store=tmp_path)
    assert (found.qk, found.v, rankings.dims) == ([], [], {})
    assert {"qk", "v"}.isdisjoint(found.to_dict())
    assert json.loads((tmp_path / "rankings.json").read_text()) == {"halves": ["0.attn", "0.mlp"]}
