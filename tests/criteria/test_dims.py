"""Rankings of the dims of heads: of what statistics find, by every criterion, equally many in every head."""

from __future__ import annotations

import pytest
import torch
from tiny import images, tiny_vit
from torch.nn import functional as F

from vitprune import parts
from vitprune.criteria.base import Criterion, DimRanking, DimsView, LayerView, Ranking, query_key_view, value_view
from vitprune.criteria.magnitude import Magnitude
from vitprune.criteria.obs import Obs, made_up
from vitprune.criteria.random import Random
from vitprune.criteria.taylor import Taylor
from vitprune.statistics import gate_gradients, stream_blocks


def found(criterion: Criterion, **variant):
    """The rankings of the dims of the first block's queries and keys, and values."""
    model = tiny_vit(**variant)
    step = next(stream_blocks(model, images(12), moments=True, dims=True))
    gates = gate_gradients(model, images(12), dims=True)[0]
    block = model.blocks[0]
    views = query_key_view(block, step, gates, levels=(6, 2), number=4), value_view(block, step, gates, number=5)
    return [criterion.rank_dims(view) for view in views]


@pytest.mark.parametrize("variant", [{}, {"layer_scale": True}, {"qk_norm": True, "qkv_bias": False}], ids=str)
@pytest.mark.parametrize("name", parts.names("vitprune.criteria"))
def test_every_criterion_ranks_the_dims_of_each_head(name, variant):
    for ranking in found(parts.load("vitprune.criteria", name, Criterion)(), **variant):
        assert ranking.order.sort(dim=1).values.tolist() == [list(range(8))] * 4
        assert ranking.error.shape == (9,)
        assert float(ranking.error[0]) == 0
        assert (ranking.error.diff() >= 0).all()
        assert float(ranking.error[-1]) == pytest.approx(1, abs=1e-6)
        assert all(len(ranking.kept(head, 3)) == 3 for head in range(4))


def test_the_size_of_a_term_of_the_logits_is_what_magnitude_goes_by():
    # one head of two dims; |q|^2 |k|^2: 4 * 25 = 100 and 9 * 9 = 81; the key's bias does not count, the query's does
    model = tiny_vit(depth=1, heads=16, dim=32)
    attn = model.blocks[0].attn
    with torch.no_grad():
        attn.qkv.weight.zero_()
        attn.qkv.bias.zero_()
        attn.qkv.weight[0, 3], attn.qkv.weight[32, 1] = 2, 5
        attn.qkv.weight[1, 0], attn.qkv.weight[33, 2], attn.qkv.bias[33] = 3, 3, 9
    step = next(stream_blocks(model, images(2), moments=False))
    assert Magnitude().rank_dims(query_key_view(model.blocks[0], step, {})).order[0].tolist() == [1, 0]
    with torch.no_grad():
        attn.qkv.bias[1] = 2  # 13 * 9 = 117
    assert Magnitude().rank_dims(query_key_view(model.blocks[0], step, {})).order[0].tolist() == [0, 1]


def test_errors_of_heads_are_added_by_what_they_stand_for():
    view = DimsView(2, torch.tensor([[1.0, 2.0, 3.0, 1.0]]))  # squares 1, 4 and 9, 1 of 15
    ranking = Magnitude().rank_dims(view)
    assert ranking.order.tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(ranking.error, torch.tensor([0, 2 / 15, 1], dtype=torch.float64))


def test_gate_gradients_of_dims_are_those_of_a_factor_on_each_product_and_value():
    model, pictures = tiny_vit().double(), images(3).double()
    shares = model(pictures).softmax(-1).detach()
    labels = torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    found = gate_gradients(model, pictures, dims=True)
    gates = {}
    for number, block in enumerate(model.blocks):
        for kind in ("qk", "v"):
            gates[number, kind] = torch.ones(3, 4, 8, dtype=torch.float64, requires_grad=True)
        block.attn.k_norm.register_forward_hook(lambda _, __, out, g=gates[number, "qk"]: out * g[:, :, None])
        block.attn.proj.register_forward_pre_hook(lambda _, x, g=gates[number, "v"]: x[0] * g.flatten(1)[:, None])
    F.cross_entropy(model(pictures), labels, reduction="sum").backward()
    for (number, kind), gate in gates.items():
        torch.testing.assert_close(found[number][kind], gate.grad.flatten(1), rtol=1e-9, atol=1e-12)  # fp64
    for with_dims, without in zip(found, gate_gradients(model, pictures), strict=True):
        assert without.keys() == {"attn", "mlp"}
        torch.testing.assert_close(with_dims["attn"], without["attn"], rtol=1e-9, atol=1e-12)


def test_products_are_the_squared_error_of_the_logits_up_to_what_the_softmax_does_not_see():
    model, pictures = tiny_vit(depth=1).double(), images(5).double()
    (step,) = stream_blocks(model, pictures, moments=True, dims=True)
    block, gone = model.blocks[0], [1, 4, 5]
    q, k, _ = block.attn.project(block.read(step.entering[0].x))
    lost = q[..., gone] @ k[..., gone].transpose(-2, -1)  # [B, H, N, N]
    lost = lost - lost.mean(-1, keepdim=True)
    error = lost.square().mean((0, 2, 3))
    torch.testing.assert_close(step.products[:, gone][:, :, gone].sum((1, 2)), error, rtol=1e-9, atol=1e-12)  # fp64

    view = query_key_view(block, step, {})
    for head in view.by_head():
        column = torch.zeros(8, dtype=torch.float64)
        column[gone] = 1
        removed = head.weight[0] * column
        torch.testing.assert_close(removed @ head.moments @ removed, error[head.number], rtol=1e-9, atol=1e-12)


def test_factors_of_queries_bring_the_logits_closest_to_what_they_were():
    model, pictures = tiny_vit(depth=1).double(), images(5).double()
    (step,) = stream_blocks(model, pictures, moments=True, dims=True)
    block = model.blocks[0]
    ranking = Obs(damping=0).rank_dims(query_key_view(block, step, {}, levels=(4,)))
    q, k, _ = block.attn.project(block.read(step.entering[0].x))
    k = k - k.mean(-2, keepdim=True)
    for head in range(4):
        terms = torch.einsum("bnd,bmd->bnmd", q[:, head], k[:, head]).flatten(0, 2)  # [pairs, D]
        best = torch.linalg.lstsq(terms[:, ranking.kept(head, 4)], terms.sum(1, keepdim=True)).solution[:, 0]
        torch.testing.assert_close(ranking.factors[4][head], best, rtol=1e-6, atol=1e-8)  # condition about 1e3


def test_columns_that_stay_make_up_for_any_that_go():
    inputs = torch.randn(200, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs[:, 3] += inputs[:, 4]
    weight = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer = LayerView(weight, 1, (), inputs.T @ inputs / 200)
    kept = [0, 2, 3, 7, 11]
    best = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
    torch.testing.assert_close(made_up(layer, kept, damping=0), best, rtol=0, atol=1e-8)  # fp64
    ranking = Obs().rank(LayerView(weight, 1, (5,), layer.moments))  # the sweep's own weights, ridge and all
    torch.testing.assert_close(made_up(layer, ranking.kept(5)), ranking.weights[5], rtol=0, atol=1e-8)


def test_random_orders_differ_between_heads():
    order = Random().rank_dims(DimsView(6, torch.ones(1, 6 * 32), number=3)).order
    assert len({tuple(row) for row in order.tolist()}) == 6


def test_a_head_that_does_nothing_adds_no_error():
    ranking = Taylor().rank_dims(DimsView(2, torch.ones(1, 4), gates=torch.tensor([[0.0, 0.0, 1.0, 3.0]])))
    torch.testing.assert_close(ranking.error, torch.tensor([0, 0.25, 1.0], dtype=torch.float64))
    assert DimRanking.of_heads([Ranking.from_scores(torch.zeros(2))] * 2).error.tolist() == [0, 0, 0]
