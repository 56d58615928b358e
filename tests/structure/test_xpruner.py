"""X-Pruner's reconstruction, by hand: gates of the classes score, thresholds prune, and nothing tells the class."""

from __future__ import annotations

import pytest
import torch
from tiny import images, tiny_vit

from vitprune.budgets import macs_budget
from vitprune.errors import NotSupported
from vitprune.learn import learn
from vitprune.recover import Batch, RecoverSettings
from vitprune.structure.base import Moment, Multiples, Target
from vitprune.structure.xpruner import XPruner


def make():
    model = tiny_vit()
    method = XPruner(model, macs_budget(model.config, 0.6), Multiples(1, 8))
    return model, method, method.attach(model)


@torch.no_grad()
def test_the_gates_of_an_images_class_multiply_what_heads_and_units_give():
    model, method, _ = make()
    generator = torch.Generator().manual_seed(0)
    for mask in method.masks.parameters():
        mask.copy_(torch.rand(mask.shape, generator=generator))
    mlp, x = model.blocks[0].mlp, torch.randn(2, 5, 32, generator=generator)
    for labels in (torch.tensor([3, 1]), torch.tensor([[0.0, 0.7, 0, 0.3, 0, 0, 0, 0, 0, 0], [1.0, *[0] * 9]])):
        method.begin(Moment(0, 0.2, 1e-3), Target(torch.zeros(2, 10), labels))
        rows = method.masks["mlp"][0]
        factors = rows[labels] if labels.ndim == 1 else torch.stack([0.7 * rows[1] + 0.3 * rows[3], rows[0]])
        by_hand = torch.nn.functional.linear(mlp.hidden(x) * factors[:, None], mlp.fc2.weight, mlp.fc2.bias)
        torch.testing.assert_close(mlp(x), by_hand)
    given, attn = torch.randn(2, 5, 32, generator=generator), model.blocks[1].attn
    heads = method.masks["heads"][1]
    factors = torch.stack([0.7 * heads[1] + 0.3 * heads[3], heads[0]]).repeat_interleave(8, 1)
    by_hand = torch.nn.functional.linear(given * factors[:, None], attn.proj.weight, attn.proj.bias)
    torch.testing.assert_close(attn.proj(given), by_hand)


@torch.no_grad()
def test_a_model_that_is_judged_is_told_no_class():
    model, method, hooks = make()
    plain = tiny_vit()(images(4))
    for mask in method.masks.parameters():
        mask.zero_()
    method.begin(Moment(0, 0.2, 1e-3), Target(torch.zeros(4, 10), torch.arange(4)))
    assert not torch.allclose(model(images(4)), plain)
    method.eval()
    assert torch.equal(model(images(4)), plain)
    method.train()
    method.begin(Moment(9, 0.6, 1e-3), Target(torch.zeros(4, 10), torch.arange(4)))  # the thresholds are searched
    assert torch.equal(model(images(4)), plain)
    assert len(hooks) == 4


def test_without_labels_the_teacher_says_the_class():
    target = Target(torch.tensor([[0.0, 2.0, 1.0]]))
    assert target.classes().tolist() == [[0, 1, 0]]


def test_the_penalty_is_on_size_and_on_unlikeness_of_the_classes():
    model, method, _ = make()
    assert method.penalty(model, Target(torch.zeros(1, 10))).item() == pytest.approx(1e-4 * 4)  # four layers of ones
    with torch.no_grad():
        method.masks["heads"][0][3, 1] = 2.0
    unlike = (2 - 1.1) ** 2 + 9 * (1 - 1.1) ** 2
    size = 3 + (40 + 1) / 40
    assert method.penalty(model, Target(torch.zeros(1, 10))).item() == pytest.approx(1e-4 * size + 1e-4 * unlike)


def test_units_above_the_threshold_stay_and_the_best_in_any_case():
    _, method, _ = make()
    with torch.no_grad():
        method.masks["heads"][0].copy_(torch.tensor([1.0, -3, 2, 0]).expand(10, -1))
    assert method.importances("heads")[0].tolist() == [10, 30, 20, 0]  # mean 15, deviation 11.18
    for threshold, kept in ((-3.0, [1, 1, 1, 1]), (0.0, [0, 1, 1, 0]), (1.0, [0, 1, 0, 0]), (5.0, [0, 1, 0, 0])):
        with torch.no_grad():
            method.thresholds["heads"][0].fill_(threshold)
        assert method.kept("heads")[0].round().tolist() == kept
    method.kept("heads")[0].sum().backward()
    assert method.thresholds["heads"][0].grad < 0  # a higher threshold keeps less


def test_what_comes_out_has_no_gates_of_classes():
    model = tiny_vit()

    def batches(epoch):
        return [Batch(images(8, seed=epoch))]

    settings = RecoverSettings(steps=4, checks=1, lr=1e-3)
    found = learn(
        "xpruner", model, macs_budget(model.config, 0.6), batches, images(4), settings, multiples=Multiples(1, 8)
    )
    assert found.model.state_dict().keys() == model.state_dict().keys()
    assert not any(module._forward_pre_hooks for module in found.model.modules())
    bare = tiny_vit(classes=0)
    with pytest.raises(NotSupported, match="no classifier"):
        XPruner(bare, macs_budget(bare.config, 0.6))
