from __future__ import annotations

import torch

from vitprune.model.state import AttentionView, TokenState
from vitprune.tokens.evit_drop import EViTDrop


def test_keeps_what_the_class_token_attends_to_most_in_that_order():
    # one head, one dimension: the class token's logits are the keys themselves
    keys = torch.tensor([[[[0.0], [1.0], [3.0], [2.0], [-1.0]]]])
    view = AttentionView(torch.ones_like(keys), keys, keys, 1.0, None)
    state = TokenState(torch.tensor([[[9.0], [10.0], [20.0], [30.0], [40.0]]]), 1, 4)
    assert EViTDrop()(state, view, 2).x.flatten().tolist() == [9, 20, 30]


def test_the_mean_over_heads_decides():
    # head 0 prefers 10 a little, head 1 prefers 20 by far; attention is averaged, not its logits
    keys = torch.tensor([[[[0.0], [0.2], [0.0]], [[0.0], [0.0], [5.0]]]])
    view = AttentionView(torch.ones_like(keys), keys, keys, 1.0, None)
    state = TokenState(torch.tensor([[[9.0], [10.0], [20.0]]]), 1, 2)
    assert EViTDrop()(state, view, 1).x.flatten().tolist() == [9, 20]


def test_prefix_tokens_are_never_candidates():
    keys = torch.tensor([[[[0.0], [9.0], [1.0], [2.0]]]])  # the distillation token is attended to most
    view = AttentionView(torch.ones_like(keys), keys, keys, 1.0, None)
    state = TokenState(torch.tensor([[[9.0], [8.0], [10.0], [20.0]]]), 2, 2)
    assert EViTDrop()(state, view, 1).x.flatten().tolist() == [9, 8, 20]
