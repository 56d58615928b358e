"""The algebra of second-order pruning against dense inverses, published recursions and brute force."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from layer_problems import closed_form, correlated, layer_with, random

from vitprune.weights import _fisher
from vitprune.weights._fisher import inverted
from vitprune.weights._sweep import Trace, hull_slopes, joint, step_scores, sweep
from vitprune.weights.base import Pattern, masked
from vitprune.weights.cap import Cap
from vitprune.weights.magnitude import Magnitude
from vitprune.weights.mfac import MatrixFree, Mfac, Window
from vitprune.weights.obd_fisher import ObdFisher
from vitprune.weights.obs import Obs
from vitprune.weights.woodfisher import WoodFisher

PLAIN = Pattern()


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def gradients(m, width, scale=1e-2):
    return scale * random(m, width) @ random(width, width, seed=1) / width**0.5


def recursion(g, damping):
    """The published one: a rank-1 update of the inverse for each gradient."""
    inverse = torch.eye(g.shape[1], dtype=g.dtype) / damping
    for row in g:
        v = inverse @ row
        inverse -= torch.outer(v, v) / (len(g) + row @ v)
    return inverse


def inverse_of(g, damping, **options):
    method = WoodFisher(block=g.shape[1], damp=damping, **options)
    (blocks,) = method.blocks(layer_with(g[:, None]), PLAIN)
    return inverted(blocks.fisher(), "layer")[0]


@pytest.mark.parametrize("damping", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize(("width", "m"), [(64, 256), (64, 24), (192, 256), (192, 96)])
def test_woodfisher_inverts_the_damped_fisher_information(width, m, damping):
    g = gradients(m, width)
    found = inverse_of(g, damping)
    dense = torch.linalg.inv(damping * torch.eye(width, dtype=g.dtype) + g.T @ g / m)
    assert error(found, dense) < 1e-9
    assert error(found, recursion(g, damping)) < 1e-9
    assert error(found, inverse_of(g.flip(0), damping)) < 1e-9  # the order of gradients does not matter
    assert (found.diagonal() > 0).all()


def test_a_removed_weight_stays_out_of_every_update():
    g, w = gradients(40, 16), random(1, 16, seed=2)
    w[0, 5] = 0
    (blocks,) = WoodFisher(block=16, damp=1e-3).blocks(layer_with(g[:, None], w), PLAIN)
    row = inverted(blocks.fisher(), "layer")[0, 5]
    assert torch.allclose(row, 1e3 * torch.eye(16, dtype=w.dtype)[5])
    for method in (WoodFisher(block=16), Cap(block=16), Mfac(block=16)):
        (pruned,) = method.prune([layer_with(g[:, None], w)], PLAIN, 0.5)
        assert int(pruned.mask.sum()) == 8
        assert not pruned.mask[0, 5]
        assert pruned.weight[0, 5] == 0


def test_gradients_of_batches_are_means():
    g = gradients(12, 8)
    (blocks,) = WoodFisher(block=8, damp=1e-3, grad_batch=5).blocks(layer_with(g[:, None]), PLAIN)
    means = g[:10].unflatten(0, (2, 5)).mean(1)  # two images fill no batch
    torch.testing.assert_close(blocks.gradients[0], means)


def published_mfac(g, damping):
    """Rows h_i and divisors D_i of the published recursion."""
    rows, divisors = [], []
    for row in g:
        h = row / damping - sum((before @ row / d) * before for before, d in zip(rows, divisors, strict=True))
        rows.append(h)
        divisors.append(len(g) + row @ h)
    return torch.stack(rows), torch.stack(divisors)


@pytest.mark.parametrize("m", [40, 130])
def test_mfac_is_woodfisher_without_the_matrix(m):
    g, damping, x = gradients(m, 96, scale=0.1), 1e-3, random(1, 96, seed=3)
    found, dense = MatrixFree(g[None], damping, "layer"), inverse_of(g, damping)
    assert error(found.times(x)[0], dense @ x[0]) < 1e-10
    assert error(found.groups(1).flatten(), dense.diagonal()) < 1e-10
    fours = torch.stack([dense[i : i + 4, i : i + 4] for i in range(0, 96, 4)])
    assert error(found.groups(4)[0], fours) < 1e-10
    h, d = published_mfac(g, damping)
    assert error(found.times(x)[0], x[0] / damping - ((h @ x[0]) / d) @ h) < 1e-10


@pytest.mark.parametrize("pattern", ["unstructured", "block-4", "2:4"])
def test_mfac_prunes_as_woodfisher_does_paged_or_not(pattern, monkeypatch):
    layer, pattern = layer_with(correlated(6, 30, 16, 0.6)), Pattern.parse(pattern)
    (dense,) = WoodFisher(block=32).prune([layer], pattern, 0.5)
    (free,) = Mfac(block=32).prune([layer], pattern, 0.5)
    monkeypatch.setattr(_fisher, "CHUNK_BYTES", 1)
    (paged,) = Mfac(block=32).prune([layer], pattern, 0.5)
    for other in (free, paged):
        assert torch.equal(dense.mask, other.mask)
        torch.testing.assert_close(dense.weight, other.weight, rtol=1e-9, atol=1e-10)


def test_every_gradient_counts():
    g = gradients(10, 8, scale=1)
    without = torch.cat([g[:9], torch.zeros(1, 8, dtype=g.dtype)])
    whole, less = (MatrixFree(some[None], 1e-2, "layer").groups(1) for some in (g, without))
    assert error(whole, less) > 1e-2


def test_a_window_of_gradients_is_that_of_the_newest():
    g, window = gradients(11, 12, scale=0.1).float().double(), Window(6, (1, 12))
    window.push(g[None, :4])
    window.push(g[None, 4:])
    x, alive = random(1, 12, seed=3), torch.ones(1, 12, dtype=torch.bool)
    newest = MatrixFree(g[None, 5:], 1e-3, "layer")
    assert error(window.inverse(alive, 1e-3, "layer").times(x), newest.times(x)) < 1e-10
    alive[0, 3] = False
    newest = MatrixFree(g[None, 5:] * alive, 1e-3, "layer")
    assert error(window.inverse(alive, 1e-3, "layer").times(x), newest.times(x)) < 1e-10


def test_dynamic_mfac_begins_as_the_static_one_and_goes_on_with_what_is_new():
    method, first, second = Mfac(block=16, window=30), correlated(4, 30, 16, 0.6), correlated(4, 10, 16, 0.6, seed=7)
    weight = random(4, 16, seed=9)
    (static,) = Mfac(block=16).prune([layer_with(first, weight)], PLAIN, 0.5)
    (dynamic,) = method.prune([layer_with(first, weight)], PLAIN, 0.5)
    assert torch.equal(static.mask, dynamic.mask)
    mixed = torch.cat([first[10:], second])
    damping = method.damping(layer_with(second, static.weight))
    (wanted,) = Mfac(block=16, damp=damping).prune([layer_with(mixed, static.weight)], PLAIN, 0.75)
    (found,) = method.prune([layer_with(second, static.weight)], PLAIN, 0.75)
    assert torch.equal(found.mask, wanted.mask)
    torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-4, atol=1e-5)  # the window is in fp32


def test_a_window_keeps_its_blocks_whatever_number_of_gradients_comes(monkeypatch):
    """A part of the rows for each window, not for each number of gradients."""
    monkeypatch.setattr(_fisher, "CHUNK_BYTES", 8 * 16 * 40)  # one row at a time beside 40 gradients, two beside 20
    method = Mfac(block=16, window=20)
    for m in (40, 10):
        list(method.prune([layer_with(correlated(6, m, 16, 0.6), random(6, 16))], PLAIN, 0.5))
    assert sorted(method.windows) == [("layer", first) for first in (0, 2, 4)]
    assert {window.filled for window in method.windows.values()} == {20}


def test_the_first_pruning_and_one_without_a_window_look_at_all_images():
    method = Mfac(block=16, window=20)
    assert method.images_of(3, 100) == slice(0, 100)  # taken up again: nothing is in the window
    list(method.prune([layer_with(correlated(2, 20, 16, 0.6))], PLAIN, 0.5))
    assert method.images_of(3, 100) == slice(50, 75)
    assert method.images_of(0, 100) == slice(0, 100)
    assert not method.windows  # another model's gradients


def hessians(n, width, share, seed=0):
    x = correlated(n, 200, width, share, seed)
    return torch.einsum("snw,snv->nwv", x, x) / 200 + 1e-4 * torch.eye(width, dtype=x.dtype)


def loss(hessian, change):
    return torch.einsum("nw,nwv,nv->n", change, hessian, change) / 2


@pytest.mark.parametrize("size", [1, 4])
def test_sequential_removal_is_the_closed_form(size):
    h, w, pattern = hessians(20, 24, 0.6), random(20, 24, seed=5), Pattern(group=size)
    chosen = random(20, 24 // size, seed=6).argsort(1)[:, : 12 // size]  # any set of groups
    alive = torch.zeros(20, 24 // size, dtype=torch.bool).scatter(1, chosen, True).repeat_interleave(size, 1)
    trace = sweep(w, torch.linalg.inv(h), alive, pattern, 12 // size)
    assert torch.equal(trace.order.sort(1).values, chosen.sort(1).values)
    wanted, weights = closed_form(h, w, alive.nonzero()[:, 1].view(20, 12))
    torch.testing.assert_close(trace.costs.sum(1), wanted, rtol=1e-11, atol=0)
    found = joint(h, w, ~alive, "layer")
    torch.testing.assert_close(found, weights * ~alive, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss(h, found - w), wanted, rtol=1e-10, atol=0)
    assert (found[alive] == 0).all()


def test_the_order_of_removal_does_not_matter():
    h, w = hessians(1, 10, 0.6), random(1, 10, seed=5)
    gone = [7, 2, 9, 4]
    mask = torch.ones(1, 10, dtype=torch.bool)
    mask[0, gone] = False
    for order in (gone, gone[::-1]):
        v, weights, paid = torch.linalg.inv(h[0]), w[0].clone(), 0.0
        for q in order:
            paid += weights[q] ** 2 / (2 * v[q, q])
            weights = weights - v[:, q] * weights[q] / v[q, q]
            v = v - torch.outer(v[:, q], v[q]) / v[q, q]
        torch.testing.assert_close(joint(h, w, mask, "layer")[0], weights * mask[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(loss(h, joint(h, w, mask, "layer") - w)[0], paid, rtol=1e-10, atol=0)


def test_no_other_update_of_the_same_mask_is_better():
    h, w = hessians(30, 16, 0.6), random(30, 16, seed=5)
    mask = random(30, 16, seed=6) > 0
    best = joint(h, w, mask, "layer")
    for seed in range(20):
        other = best + 0.1 * random(30, 16, seed=seed) * mask
        assert (loss(h, best - w) < loss(h, other - w)).all()


SEEDS = 600
METHODS = {
    "cap": Cap(block=12, damp=1e-4),
    "woodfisher": WoodFisher(block=12, damp=1e-4),
    "obd": ObdFisher(),
    "magnitude": Magnitude(),
}


def pruned_problems(share):
    """Losses of 600 problems of which 6 of 12 weights go, by method, masks and losses of their joint updates."""
    x, w, half = correlated(SEEDS, 200, 12, share), random(SEEDS, 12, seed=4), Pattern(kept=6, of=12)
    h = torch.einsum("snw,snv->nwv", x, x) / 200 + 1e-4 * torch.eye(12, dtype=x.dtype)
    found = {}
    for name, method in METHODS.items():
        (pruned,) = method.prune([layer_with(x, w)], half, 0.5)
        best = joint(h, w, pruned.mask, name)
        found[name] = tuple(loss(h, some - w) for some in (pruned.weight, best, w * pruned.mask))
    inverse, every = torch.linalg.inv(h), []
    for one in map(list, combinations(range(12), 6)):  # the closed form of the loss, for all problems at once
        every.append((w[:, one] * torch.linalg.solve(inverse[:, one][:, :, one], w[:, one])).sum(1) / 2)
    return found, torch.stack(every).min(0).values


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_how_methods_compare_on_600_quadratics(share):
    found, best = pruned_problems(share)
    slack = 1 + 1e-9  # rounding
    for lost, together, alone in found.values():  # theorems
        assert (best <= lost * slack).all()
        assert (together <= lost * slack).all()
        assert (together <= alone * slack).all()
    torch.testing.assert_close(found["cap"][0], found["cap"][1], rtol=1e-9, atol=0)
    ratio = {name: float((lost / best).log().mean().exp()) for name, (lost, _, _) in found.items()}
    assert ratio["cap"] <= ratio["woodfisher"] <= ratio["obd"] <= ratio["magnitude"], ratio  # on the mean: measured
    assert ratio["cap"] < 1.03
    assert (found["cap"][0] > found["woodfisher"][0] * slack).double().mean() < 0.01
    assert (found["woodfisher"][0] > found["magnitude"][0] * slack).double().mean() < 0.08


def test_without_correlations_all_second_order_methods_are_the_optimum():
    scales = random(1, 12, seed=8).abs() + 0.1
    x = (torch.eye(12, dtype=torch.float64) * scales)[:, None]  # 12 gradients along the axes
    layer, half = layer_with(x, random(1, 12, seed=4)), Pattern(kept=6, of=12)
    costs = (scales[0] ** 2 / 12 + 1e-12) * layer.weight[0] ** 2
    wanted = torch.ones(12, dtype=torch.bool).scatter(0, costs.argsort()[:6], False)
    for method in (ObdFisher(), *(kind(block=12, damp=1e-12) for kind in (WoodFisher, Mfac, Cap))):
        (pruned,) = method.prune([layer], half, 0.5)
        assert torch.equal(pruned.mask[0], wanted)
        torch.testing.assert_close(pruned.weight, layer.weight * pruned.mask, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pattern", ["unstructured", "block-4", "2:4"])
def test_obs_is_cap_with_one_block(pattern):
    layers = [layer_with(correlated(4, 60, 16, 0.6, seed=s), random(4, 16, seed=s), f"layer {s}") for s in (0, 10)]
    both = torch.cat([layer.reads[0].inputs for layer in layers], 1)
    joined = layer_with(both, torch.cat([layer.weight for layer in layers]))
    found = list(Obs().prune(layers, Pattern.parse(pattern), 0.5))
    (wanted,) = Cap(block=128).prune([joined], Pattern.parse(pattern), 0.5)
    assert [one.name for one in found] == ["layer 0", "layer 10"]
    assert torch.equal(torch.cat([one.mask for one in found]), wanted.mask)
    torch.testing.assert_close(torch.cat([one.weight for one in found]), wanted.weight, rtol=1e-8, atol=1e-9)


def slow_hull(costs):
    points = [(0, 0.0)]
    for step, total in enumerate(costs.cumsum(0).tolist(), 1):
        while len(points) > 1 and (total - points[-1][1]) * (points[-1][0] - points[-2][0]) <= (
            points[-1][1] - points[-2][1]
        ) * (step - points[-1][0]):
            points.pop()
        points.append((step, total))
    slopes = []
    for (x0, y0), (x1, y1) in pairwise(points):
        slopes += [(y1 - y0) / (x1 - x0)] * (x1 - x0)
    return torch.tensor(slopes, dtype=costs.dtype)


def test_hull_slopes_are_those_of_the_lower_convex_hull():
    costs = random(40, 15).abs()
    wanted = torch.stack([slow_hull(row) for row in costs])
    torch.testing.assert_close(hull_slopes(costs), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("merge", ["hull", "cumulative"])
def test_any_threshold_takes_the_first_steps_of_each_block(merge):
    costs = random(40, 15).abs()
    trace = Trace(random(40, 15, seed=1).argsort(1), costs)
    scores = step_scores(trace, 15, merge, PLAIN)
    for share in (0.1, 0.37, 0.5, 0.9):
        gone = ~masked(scores, PLAIN, share).gather(1, trace.order)  # in order of the steps
        assert int(gone.sum()) == round(share * 600)
        assert (gone.int().diff(dim=1) <= 0).all()


@pytest.mark.parametrize("merge", ["hull", "cumulative"])
def test_steps_that_took_nothing_change_no_score(merge):
    costs, order = random(40, 15).abs(), random(40, 15, seed=1).argsort(1)
    whole = step_scores(Trace(order[:, :9], costs[:, :9]), 15, merge, PLAIN).gather(1, order[:, :9])
    order[:, 9:], costs[:, 9:] = -1, 0
    found = step_scores(Trace(order, costs), 15, merge, PLAIN).gather(1, order[:, :9])
    torch.testing.assert_close(found, whole, rtol=1e-13, atol=0)


def best_prefixes(sums, count):
    """Least sum over blocks of ``sums`` [blocks, steps + 1] with ``count`` steps in all, by dynamic programming."""
    best = torch.full((count + 1,), torch.inf, dtype=sums.dtype)
    best[0] = 0
    for row in sums:
        new = torch.full_like(best, torch.inf)
        for steps, paid in enumerate(row.tolist()):
            new[steps:] = torch.minimum(new[steps:], best[: count + 1 - steps] + paid)
        best = new
    return float(best[count])


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_merging_by_hull_slopes_is_nearly_the_best_choice_of_prefixes(share):
    ratios = {"hull": [], "cumulative": [], "incremental": []}
    for seed in range(60):
        h = hessians(12, 10, share, seed=10 * seed) * random(12, 1, 1, seed=seed).mul(2).exp()
        w = random(12, 10, seed=seed + 1)
        alive = random(12, 10, seed=seed + 2) > (-0.7 if seed % 2 else -torch.inf)  # some blocks have zeros
        trace, count = sweep(w, torch.linalg.inv(h), alive, PLAIN), int(alive.sum()) - 60
        costs = torch.where(trace.order < 0, torch.inf, trace.costs)
        sums = torch.cat([torch.zeros(12, 1, dtype=w.dtype), costs.cumsum(1)], 1)
        best = best_prefixes(sums, count)
        for merge in ("hull", "cumulative"):
            scores = torch.where(alive, step_scores(trace, 10, merge, PLAIN), -torch.inf)
            counts = (~masked(scores, PLAIN, 0.5) & alive).sum(1, keepdim=True)
            ratios[merge].append(float(sums.gather(1, counts).sum()) / best)
        blocks = costs.flatten().argsort()[:count] // 10
        counts = torch.bincount(blocks, minlength=12)[:, None]
        ratios["incremental"].append(float(sums.gather(1, counts).sum()) / best)
    mean = {name: sum(some) / len(some) for name, some in ratios.items()}
    assert mean["hull"] <= min(mean["incremental"], mean["cumulative"])
    assert mean["hull"] < 1.01
    assert min(ratios["hull"]) >= 1 - 1e-9
