from __future__ import annotations

import math

import torch
from tiny import images, tiny_config, tiny_vit

from vitprune.model.state import AttentionView, TokenState
from vitprune.surgery import build
from vitprune.tokens.base import track_sources
from vitprune.tokens.evit import EViT


def attending(*heads: list[float], prefix: int = 1) -> AttentionView:
    """An attention in which the class token's row of each head is as given; each sums to 1."""
    k = torch.tensor([[[[math.log(share)] for share in row] for row in heads]])
    q = torch.full_like(k, float("nan"))  # no other row may be read
    q[:, :, 0] = 2.0
    return AttentionView(q, k, k, 0.5, None)


def state(*values: float, prefix: int = 1) -> TokenState:
    return TokenState(torch.tensor([[[float(value)] for value in values]]), prefix, len(values) - prefix)


def test_keeps_the_most_attended_and_fuses_the_rest_by_raw_attention():
    attention = attending([0.2, 0.15, 0.05, 0.35, 0.25])
    after = EViT()(track_sources(state(9, 1, 2, 3, 6)), attention, 3)
    # 3 and 6 are attended to most, and leave in that order; the weights 0.15 and 0.05 are not made to sum to 1
    want = torch.tensor([9, 3, 6, 0.15 * 1 + 0.05 * 2])
    torch.testing.assert_close(after.x.flatten(), want, rtol=1e-6, atol=0)
    want = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0.15, 0.05, 0, 0]])
    torch.testing.assert_close(after.source[0], want, rtol=1e-6, atol=0)


def test_the_count_includes_the_fused_token():
    after = EViT()(state(9, 1, 2, 3, 6), attending([0.2, 0.15, 0.05, 0.35, 0.25]), 2)
    torch.testing.assert_close(after.x.flatten(), torch.tensor([9, 3, 0.15 + 0.1 + 1.5]), rtol=1e-6, atol=0)


def test_attention_is_averaged_over_the_heads():
    attention = attending([0.1, 0.6, 0.1, 0.2], [0.1, 0.1, 0.5, 0.3])  # mean of the patches: 0.35, 0.3, 0.25
    after = EViT()(state(9, 1, 2, 3), attention, 2)
    torch.testing.assert_close(after.x.flatten(), torch.tensor([9, 1, 0.6 + 0.75]), rtol=1e-6, atol=0)


def test_distillation_and_register_tokens_stay_though_nobody_attends_to_them():
    attention = attending([0.2, 0.01, 0.01, 0.18, 0.3, 0.3])
    after = EViT()(state(9, 8, 7, 1, 2, 4, prefix=3), attention, 2)
    assert after.x.flatten()[:3].tolist() == [9, 8, 7]
    assert after.x.shape[1] == 5


def test_the_fused_token_competes_at_the_next_application():
    first = EViT()(state(9, 1, 2, 3, 6), attending([0.2, 0.15, 0.05, 0.35, 0.25]), 3)  # [9, 3, 6, 0.25]
    second = EViT()(first, attending([0.1, 0.1, 0.1, 0.7]), 2)
    torch.testing.assert_close(second.x.flatten(), torch.tensor([9, 0.25, 0.3 + 0.6]), rtol=1e-6, atol=0)


def test_token_sizes_count_in_the_attention():
    k = torch.zeros(1, 1, 4, 1)
    attention = AttentionView(k, k, k, 1.0, torch.tensor([1.0, 1, 3, 1]).log()[None, None, None])
    after = EViT()(state(9, 1, 2, 3), attention, 2)  # attention: 1/6, 1/6, 3/6, 1/6
    torch.testing.assert_close(after.x.flatten(), torch.tensor([9, 2, 4 / 6]), rtol=1e-6, atol=0)


def test_gradients_reach_the_attention_through_the_fused_token():
    attention = attending([0.2, 0.15, 0.05, 0.35, 0.25])
    k = attention.k.requires_grad_()
    EViT()(state(9, 1, 2, 3, 6), attention._replace(k=k), 3).x.sum().backward()
    assert k.grad.abs().min() > 0


def test_deit_with_keep_rate_0_7_has_the_published_token_counts():
    rate, kept, left = 0.7, {}, 196
    for block in (3, 6, 9):
        kept[block] = left = math.ceil(rate * left) + 1
    model = build(tiny_config(depth=12, image=224, patch=16, reducer="evit", keep=kept))
    tokens, current = [], model.embed(images(1, size=224))
    for block in model.blocks:
        current = block(current)
        tokens.append(current.x.shape[1])
    assert tokens == [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3


def test_the_class_row_is_that_of_the_whole_map():
    model = tiny_vit()
    *_, seen = model.blocks[0].attend(model.embed(images(2)))
    whole = (seen.q @ seen.k.transpose(-2, -1) * seen.scale).softmax(-1)
    torch.testing.assert_close(seen.class_row(), whole[:, :, 0], rtol=1e-5, atol=1e-7)  # fp32, another order
