"""CAIT's channels, reconstructed, by hand: as many in each head, queries as keys, a ramp, gradients through."""

from __future__ import annotations

import pytest
import torch
from tiny import images, tiny_vit

from vitprune.budgets import macs_budget
from vitprune.structure._gates import gated_weights, with_weights
from vitprune.structure.base import Moment, Multiples, Target
from vitprune.structure.cait_cdcp import CaitCdcp, channel_scores, closed, ramped

TARGET = Target(torch.zeros(1, 10))


def make():
    model = tiny_vit()
    method = CaitCdcp(model, macs_budget(model.config, 0.5), Multiples(1, 8, 2))
    generator = torch.Generator().manual_seed(0)
    for name, buffer in method.named_buffers():
        if name.startswith("score"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator))
    return model, method


def test_the_ramp_takes_a_third_of_the_training():
    assert [ramped(64, 16, done) for done in (0, 1 / 6, 1 / 3, 0.9)] == [64, 40, 16, 16]


def test_the_least_scores_are_closed_in_each_head():
    scores = torch.tensor([[3.0, 1, 2, 4], [9, 8, 7, 6]])
    assert closed(scores, 2).tolist() == [[1, 0, 0, 1], [1, 1, 0, 0]]


def test_heads_keep_equally_many_and_queries_what_keys_keep():
    _, method = make()
    for done in (0.1, 0.2, 0.4):
        method.begin(Moment(1, done, 1e-3), TARGET)
        for gates in method.gates():
            assert gates["q"] is gates["k"]
            assert gates["v"] is gates["proj"]
            assert len(set(gates["q"].sum(1).tolist())) == len(set(gates["v"].sum(1).tolist())) == 1
    counts = [(int(g["q"][0].sum()), int(g["v"][0].sum()), int(g["fc1"].sum())) for g in method.gates()]
    assert counts == [*zip(method.counts.qk, method.counts.v, method.counts.mlp, strict=True)]
    assert counts[0] == counts[1]


def test_masks_change_with_the_scores_until_the_ramp_is_over():
    _, method = make()
    masks = []
    for step, done in enumerate((0.2, 0.2, 0.4, 0.5)):
        for name, buffer in method.named_buffers():
            if name.startswith("score"):
                buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(step)))
        method.begin(Moment(step, done, 1e-3), TARGET)
        masks.append(method.mask_mlp0.clone())
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])


def test_closed_weights_learn_as_if_the_gates_were_open():
    model, method = make()
    method.begin(Moment(9, 0.5, 1e-3), TARGET)
    layer = model.blocks[0].mlp.fc2
    closed_units = method.mask_mlp0 == 0
    assert closed_units.any()
    weights = gated_weights(model, method.gates(), straight=True)
    leaf = weights["blocks.0.mlp.fc2.weight"].detach().requires_grad_()
    assert (leaf[:, closed_units] == 0).all()
    # straight through: the gradient at the weights is the one at what they were multiplied to
    with_weights(model, weights, lambda: model(images(2))).square().sum().backward()
    detached = {name: value.detach() for name, value in weights.items()} | {"blocks.0.mlp.fc2.weight": leaf}
    with_weights(model, detached, lambda: model(images(2))).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, leaf.grad)
    assert layer.weight.grad.abs().sum() > 0


def test_channels_are_scored_by_weight_times_gradient_of_all_their_weights():
    model = tiny_vit(gated=True, activation="silu", mlp=4)
    model(images(2)).square().sum().backward()
    block = model.blocks[0]
    found = channel_scores(block)
    taylor = {name: (p * p.grad).abs() for name, p in block.named_parameters() if p.ndim == 2}
    qkv, proj = taylor["attn.qkv.weight"], taylor["attn.proj.weight"]
    row = 2 * 8 + 5  # dim 5 of head 2
    assert found["qk"][2, 5].item() == pytest.approx((qkv[row].sum() + qkv[32 + row].sum()).item())
    assert found["v"][2, 5].item() == pytest.approx((qkv[64 + row].sum() + proj[:, row].sum()).item())
    units = taylor["mlp.fc1.weight"][3].sum() + taylor["mlp.fc1.weight"][7].sum() + taylor["mlp.fc2.weight"][:, 3].sum()
    assert found["mlp"][3].item() == pytest.approx(units.item())


def test_the_score_is_a_moving_average():
    model, method = make()
    before = method.score_mlp0.clone()
    model(images(2)).square().sum().backward()
    method.after_backward(model)
    torch.testing.assert_close(method.score_mlp0, 0.9 * before + 0.1 * channel_scores(model.blocks[0])["mlp"])
