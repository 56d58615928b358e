from __future__ import annotations

import pytest
import torch
from tiny import images, tiny_vit
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitprune.criteria.attn_taylor import AttnTaylor
from vitprune.criteria.base import LayerView, batch_means
from vitprune.criteria.bi import Bi
from vitprune.criteria.minitron import Minitron
from vitprune.criteria.nvit import Nvit, moving_average
from vitprune.criteria.savit import Savit
from vitprune.criteria.xpruner import XPruner
from vitprune.errors import InputError
from vitprune.search.losses import Sizes, rank_units
from vitprune.statistics import gate_gradients

GATES = torch.tensor([[1.0, -2.0, 0.0], [3.0, 2.0, 2.0], [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])  # of four images
SIZES = Sizes((4, 2), (64, 32))


def view(**known) -> LayerView:
    return LayerView(torch.ones(1, 3), 1, **known)


def scores(criterion, **known) -> list[float]:
    return criterion.rank(view(**known)).scores.tolist()


def test_savit_squares_the_mean_gradient_of_a_batch():
    # batches of two: means (2, 0, 1) and (1, 1, 1)
    assert scores(Savit(batch=2), gates=GATES) == [2.5, 0.5, 1.0]
    assert scores(Savit(batch=1), gates=GATES) == [3.5, 2.5, 2.0]


def test_a_last_batch_that_is_smaller_is_left_out_unless_it_is_the_only_one():
    assert batch_means(GATES, 3).tolist() == [pytest.approx([4 / 3, 1 / 3, 4 / 3])]
    assert batch_means(GATES, 32).tolist() == [[1.5, 0.5, 1.0]]


def test_savits_cross_terms_are_the_products_of_different_units():
    heads, units = GATES[:, :1], GATES[:, 1:]
    terms = Savit(batch=2).cross_terms([{"attn": heads, "mlp": units}])
    # heads 2 and 1; units (0, 1) and (1, 1): two of one head = 2 * 1 and 1 * 2; the two units: twice 0 * 1 and 1 * 1
    assert terms == {"attn": {"attn": 0, "mlp": 2.0}, "mlp": {"attn": 2.0, "mlp": 1.0}}


def test_for_labels_of_the_models_own_the_expected_hessian_is_the_product_of_the_gradients():
    """The identity that stands in for SAViT's Hessian-vector products, over all labels of one image."""
    model, picture = tiny_vit(mlp=8, classes=3).double(), images(1).double()

    def log_shares(gates: torch.Tensor) -> torch.Tensor:
        handles = [
            block.mlp.fc2.register_forward_pre_hook(lambda _, x, n=n: x[0] * gates[n])
            for n, block in enumerate(model.blocks)
        ]
        found = model(picture).log_softmax(-1)[0]
        for handle in handles:
            handle.remove()
        return found

    ones = torch.ones(2, 8, dtype=torch.float64)
    shares = log_shares(ones).detach().exp()
    with sdpa_kernel([SDPBackend.MATH]):  # the one with a second derivative
        hessian = torch.autograd.functional.hessian(lambda gates: -(shares * log_shares(gates)).sum(), ones)
    slopes = torch.autograd.functional.jacobian(log_shares, ones).flatten(1)
    torch.testing.assert_close(hessian.reshape(16, 16), slopes.T @ (shares[:, None] * slopes), rtol=1e-7, atol=1e-9)


def test_nvit_squares_once_for_a_batch_and_averages():
    # batch means (2, 0, 1) and (1, 1, 1)
    assert scores(Nvit(batch=2), reading_gates=GATES) == [2.5, 0.5, 1.0]
    assert scores(Nvit(batch=2), reading_gates=12 * GATES, kind="attn") == [2.5, 0.5, 1.0]


def test_nvit_joins_intervals_by_a_moving_average():
    assert scores(Nvit(batch=2, interval=1), reading_gates=GATES) == pytest.approx([3.7, 0.1, 1.0])
    assert float(moving_average([torch.tensor(1.0), torch.tensor(0.0), torch.tensor(2.0)], 0.5)) == 1.25


def test_nvit_is_the_squared_sum_of_weight_times_gradient_of_a_models_own_weights():
    model, pictures = tiny_vit().double(), images(6).double()
    rankings = rank_units(model, pictures, Nvit(batch=6), SIZES)
    F.cross_entropy(model(pictures), gate_gradients(model, pictures).labels).backward()
    for number, block in enumerate(model.blocks):
        products = [layer.weight * layer.weight.grad for layer in (block.attn.qkv, block.mlp.fc1)]
        biases = [layer.bias * layer.bias.grad for layer in (block.attn.qkv, block.mlp.fc1)]
        rows = products[0].sum(1) + biases[0]  # q, k and v, of four heads of 8 each
        heads = rows.reshape(3, 4, 8).sum((0, 2)) / 12
        torch.testing.assert_close(rankings.halves[number, "attn"].scores, heads**2, rtol=1e-8, atol=1e-14)
        units = products[1].sum(1) + biases[1]
        torch.testing.assert_close(rankings.halves[number, "mlp"].scores, units**2, rtol=1e-8, atol=1e-14)


def test_nvit_removes_the_same_dims_of_all_heads():
    model, pictures = tiny_vit().double(), images(6).double()
    rankings = rank_units(model, pictures, Nvit(batch=6), Sizes((4,), (64,), qk=(8, 4), v=(8, 4)))
    F.cross_entropy(model(pictures), gate_gradients(model, pictures).labels).backward()
    qkv = model.blocks[0].attn.qkv
    rows = ((qkv.weight * qkv.weight.grad).sum(1) + qkv.bias * qkv.bias.grad).reshape(3, 4, 8).sum(1)  # q, k, v
    for kind, sums in (("qk", rows[0]), ("v", rows[2])):
        order = rankings.dims[0, kind].order
        assert order.tolist() == [(sums / 2).square().argsort().tolist()] * 4
    with pytest.raises(InputError, match="this criterion does not rank the dims of heads"):
        rank_units(model, pictures, "minitron", Sizes((4,), (64,), qk=(4,)))


def test_minitron_takes_the_norm_over_images_and_over_a_heads_columns():
    activations = torch.tensor([[1.0, 2.0, 0.0, 3.0], [2.0, 0.0, 4.0, 0.0]])
    units = Minitron().rank(LayerView(torch.ones(1, 4), 1, activations=activations))
    assert units.scores.tolist() == pytest.approx([5**0.5, 2, 4, 3])
    heads = Minitron().rank(LayerView(torch.ones(1, 4), 2, activations=activations))
    assert heads.scores.tolist() == pytest.approx([3, 5])


def test_s2vite_scores_heads_by_activation_times_gradient_and_units_by_their_weights():
    model, pictures = tiny_vit(), images(3)
    rankings = rank_units(model, pictures, "attn_taylor", SIZES)
    labels, read = gate_gradients(model, pictures).labels, []
    model.blocks[1].attn.proj.register_forward_pre_hook(lambda _, x: (x[0].retain_grad(), read.append(x[0]))[1])
    F.cross_entropy(model(pictures), labels, reduction="sum").backward()
    product = (read[0] * read[0].grad).unflatten(-1, (4, 8)).sum((1, 3)).abs().mean(0)
    torch.testing.assert_close(rankings.halves[1, "attn"].scores.float(), product, rtol=1e-4, atol=1e-6)
    mlp = model.blocks[1].mlp
    sizes = mlp.fc1.weight.abs().sum(1) + mlp.fc2.weight.abs().sum(0)
    torch.testing.assert_close(rankings.halves[1, "mlp"].scores.float(), sizes.detach())


def test_s2vite_by_hand():
    assert scores(AttnTaylor(), gates=GATES, kind="attn") == [1.5, 1.5, 1.0]
    reads = torch.tensor([[1.0, -2.0], [0.0, 0.5], [3.0, 0.0]])
    assert scores(AttnTaylor(), reads=reads) == [4, 1.5, 4]  # with columns of one 1 each


def test_xpruner_adds_up_classes_and_not_images():
    # class 5: images 0 and 2, sums (1, -1, 2); class 9: (5, 3, 2); of four images
    found = scores(XPruner(), gates=GATES, labels=torch.tensor([5, 9, 5, 9]))
    assert found == [6 / 4, 4 / 4, 4 / 4]


def test_block_influence_is_one_for_both_halves_and_wants_no_sizes_between():
    model, pictures = tiny_vit(depth=3), images(4)
    rankings = rank_units(model, pictures, "bi", Sizes((4, 0), (64, 0)))
    scores = [float(rankings.halves[block, half].scores[0]) for block in range(3) for half in ("attn", "mlp")]
    assert scores[0::2] == scores[1::2]
    assert len(set(scores)) == 3
    with pytest.raises(InputError, match="ranks whole blocks, it cannot say which 2 of 4 attn units to keep"):
        rank_units(model, pictures, "bi", Sizes((4, 2, 0), (64, 0)))
    assert Bi().rank(view(influence=0.5)).scores.tolist() == [0.5, 0.5, 0.5]


def test_a_criterion_that_asks_for_no_images_is_not_slowed_by_them(monkeypatch):
    seen = []
    model = tiny_vit()
    model.blocks[0].register_forward_pre_hook(lambda _, x: seen.append(len(x[0].x)))
    rank_units(model, images(9), "magnitude", SIZES)
    assert seen == [1]
