"""ATS with fixed counts: its score, and that only queries are saved."""

from __future__ import annotations

import torch
from tiny import images, tiny_vit

from vitprune.model.state import AttentionView, TokenState
from vitprune.tokens.ats_fixed import ATSFixed


def test_the_score_is_attention_summed_over_heads_times_the_length_of_all_values():
    shares = torch.tensor([[1.0, 2, 4, 1], [1.0, 2, 2, 3]])  # eighths that the class token gives, by head
    k = shares.log()[None, :, :, None]  # q k^T with q = 1 gives their logarithms
    v = torch.tensor([[0.0, 3, 0, 1], [0.0, 4, 2, 2]])[None, :, :, None]
    # patches: (2+2)/8 * 5 = 2.5, (4+2)/8 * 2 = 1.5, (1+3)/8 * sqrt(5) = 1.118
    view = AttentionView(torch.ones(1, 2, 1, 1), k, v, 1.0, None)
    state = TokenState(torch.arange(4.0)[None, :, None], 1, 3)
    assert ATSFixed()(state, view, 2).x.flatten().tolist() == [0, 1, 2]
    assert ATSFixed()(state._replace(x=state.x.flip(1)), view, 1).x.flatten().tolist() == [3, 2]


@torch.no_grad()
def test_tokens_that_are_left_are_those_of_the_dense_block():
    dense = tiny_vit(depth=1)
    model = tiny_vit(depth=1, reducer="ats_fixed", keep={0: 20})
    model.load_state_dict(dense.state_dict())
    whole, some = (m.blocks[0](m.embed(images(2))).x for m in (dense, model))
    assert some.shape[1] == 21
    for image in range(2):
        nearest = torch.cdist(some[image], whole[image], compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert nearest.values.max() < 1e-4
        assert len(nearest.indices.unique()) == 21
