"""S2ViTE, by hand: what dies and grows, what scores read, and the bias that dead heads leave."""

from __future__ import annotations

import pytest
import torch
from tiny import images, tiny_vit

from vitprune.budgets import macs_budget
from vitprune.errors import NotSupported
from vitprune.model.vit import fingerprint
from vitprune.plan import BlockPlan, Plan
from vitprune.recover import Batch, RecoverSettings, recover
from vitprune.structure.base import Multiples
from vitprune.structure.s2vite import S2ViTE, death_rate, drop_and_grow, head_scores, unit_scores, weight_sums
from vitprune.surgery import build, prune

SMALL = Multiples(1, 8)


def test_the_death_rate_falls_as_a_cosine_until_nothing_dies():
    assert [death_rate(done) for done in (0, 0.4, 0.8)] == pytest.approx([0.5, 0.2525, 0.005])


def test_the_weakest_die_and_as_many_grow_by_their_promise():
    active = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    strength, promise = torch.tensor([5.0, 1, 3, 0, 0, 0]), torch.tensor([9.0, 1, 1, 2, 4, 3])
    assert drop_and_grow(active, strength, promise, 0.2).tolist() == [1, 0, 1, 0, 1, 0]  # ceil(0.6) dies
    assert drop_and_grow(active, strength, promise, 0.5).tolist() == [1, 0, 0, 0, 1, 1]
    back = drop_and_grow(active, strength, torch.tensor([0.0, 9, 0, 1, 2, 3]), 0.2)
    assert torch.equal(back, active)  # what died promised most


def test_heads_are_scored_by_the_sum_of_what_they_give_times_its_gradient():
    given = torch.tensor(
        [[[1.0, 2, 3, 4]], [[1, 1, 1, 1]]], requires_grad=True
    )  # two images, a token, two heads of two
    given.grad = torch.tensor([[[1.0, -1, 1, 1]], [[2, 0, -1, -3]]])
    strength, promise = head_scores(given, 2)
    assert strength.tolist() == [(1 + 2) / 2, (7 + 4) / 2]
    assert promise.tolist() == [(2 + 2) / 2, (2 + 4) / 2]


def test_units_are_scored_by_their_weights_and_their_gradients():
    mlp = tiny_vit(mlp=4, gated=True, activation="silu").blocks[0].mlp
    weights = [
        torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for w in (mlp.fc1.weight, mlp.fc2.weight)
    ]
    mlp.fc1.weight.grad, mlp.fc2.weight.grad = weights
    for found, (rows, columns) in zip(unit_scores(mlp), ((mlp.fc1.weight, mlp.fc2.weight), weights), strict=True):
        by_hand = [rows[u].abs().sum() + rows[u + 4].abs().sum() + columns[:, u].abs().sum() for u in range(4)]
        torch.testing.assert_close(found, torch.stack(by_hand))


def test_the_same_share_of_each_block_is_active_all_the_time_and_other_units_in_time():
    model = tiny_vit()
    student = build(model.config, model.state_dict())
    method = S2ViTE(student, macs_budget(model.config, 0.6), SMALL, steps=12)
    sizes = []

    def count(*_):
        sizes.append([int(active.sum()) for active in (*heads(), *units())])
        closed = [
            not a.any() or (b.mlp.fc2.weight[:, ~a] == 0).all() for b, a in zip(student.blocks, units(), strict=True)
        ]
        assert all(closed)

    def heads():
        return [getattr(method, f"heads{number}") for number in range(2)]

    def units():
        return [getattr(method, f"mlp{number}") for number in range(2)]

    def batches(epoch):
        return [Batch(images(8, seed=epoch))]

    first = [active.clone() for active in (*heads(), *units())]
    settings = RecoverSettings(steps=12, checks=1, lr=1e-3)
    recover(student, model, batches, images(4), settings, method=method, progress=count)
    assert sizes == [sizes[0]] * 12
    assert sizes[0][0] == sizes[0][1]  # heads of both blocks
    assert any(not torch.equal(*pair) for pair in zip(first, (*heads(), *units()), strict=True))


def test_a_tighter_plan_keeps_the_strongest_of_what_is_active():
    model = tiny_vit()
    method = S2ViTE(model, macs_budget(model.config, 0.6), SMALL)
    method.attach(model)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight *= torch.linspace(2, 1, 64)[:, None]
        method.strength0.copy_(torch.tensor([1.0, 4.0, 3.0, 2.0]))
    method.budget = method.budget._replace(share=0.3)
    kept = method.finish(model).blocks[0]
    for units, active, strength in (
        (kept.heads, method.heads0, method.strength0),
        (kept.mlp, method.mlp0, weight_sums(model.blocks[0].mlp)),
    ):
        assert 0 < len(units) < int(active.sum())
        best = strength.masked_fill(~active, -1).argsort(descending=True)[: len(units)]
        assert list(units) == sorted(best.tolist())


@torch.no_grad()
def test_the_bias_of_dead_heads_values_is_folded_so_that_cutting_them_changes_nothing():
    model = tiny_vit()
    method = S2ViTE(model, macs_budget(model.config, 0.6), SMALL)
    method.attach(model)
    method.eval()
    masked = model(images(3))
    before = build(model.config, model.state_dict())
    kept = method.finish(model)
    slim = prune(model, Plan(fingerprint(model), 49, None, kept.blocks))
    torch.testing.assert_close(slim(images(3)), masked, rtol=0, atol=1e-5)
    unfolded = prune(before, Plan(fingerprint(before), 49, None, kept.blocks))
    assert (unfolded(images(3)) - masked).abs().max() > 1e-3
    assert all(isinstance(block, BlockPlan) and len(block.heads) < 4 for block in kept.blocks)


def test_a_bias_that_cannot_be_folded_is_a_sentence():
    model = tiny_vit(proj_bias=False)
    with pytest.raises(NotSupported, match="has no bias"):
        S2ViTE(model, macs_budget(model.config, 0.6))
