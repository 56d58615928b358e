"""ATS: its score, that only queries are saved, and the authors' sampling where images are counted by themselves."""

from __future__ import annotations

import torch
from tiny import images, tiny_vit

from vitprune.model.state import AttentionView, TokenState
from vitprune.surgery import reduce_tokens
from vitprune.tokens.ats_fixed import ATSFixed
from vitprune.tokens.base import count_per_image


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


def _published(score, before, samples: int):
    """The patches of one image that the authors' sampling keeps, as their code goes about it, in plain Python."""
    shown = [i for i, there in enumerate(before) if there]
    order = sorted(range(len(score)), key=lambda i: score[i] if i in shown else 0.0)
    total, sums = 0.0, []
    for i in order:
        total += score[i] if i in shown else 0.0
        sums.append(total)
    sums = [(s - sums[0]) / (sums[-1] - sums[0]) for s in sums]
    start = min(s for s in sums if s > 0)
    marks = [start + (1 - start) * i / (samples - 1) for i in range(samples)]
    return {order[min(range(len(sums)), key=lambda j: abs(sums[j] - mark))] for mark in marks}


@torch.no_grad()
def test_counted_per_image_patches_are_sampled_as_published():
    dense = tiny_vit(depth=3)
    model = count_per_image(reduce_tokens(dense, "ats_fixed", {1: 48, 2: 47}))
    state, policy = model.embed(images(4)), None
    for number, block in enumerate(model.blocks):
        if number:
            q, k, v = block.attn.project(block.norm1(state.x))
            logits = q[:, :, :1] @ k.transpose(-2, -1) * block.attn.scale
            if policy is not None:
                logits = logits.masked_fill(policy.transpose(1, 2)[:, None] == 0, -torch.inf)
            seen = logits.softmax(-1).squeeze(2)
            score = (seen.sum(1) * v.square().sum((1, 3)).sqrt())[:, 1:]
            shown = torch.ones_like(score) if policy is None else policy[:, 1:, 0]
            wanted = [_published(s.tolist(), b.tolist(), 49) for s, b in zip(score, shown, strict=True)]
        state = block(state)
        if number:
            policy = state.policy
            got = [set(one[1:, 0].nonzero().flatten().tolist()) for one in policy]
            assert got == wanted
    counts = policy[:, 1:].sum((1, 2))
    assert len(counts.unique()) > 1  # images differ
    assert counts.max() < 49
