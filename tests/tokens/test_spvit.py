"""SPViT: selector, packages, and the masks that it trains with."""

from __future__ import annotations

import pytest
import torch
from test_macs import deit_small
from tiny import images, randomise, tiny_vit
from torch.nn import functional as F

from vitprune.errors import InputError
from vitprune.macs import macs
from vitprune.model.state import TokenState
from vitprune.tokens.base import Place
from vitprune.tokens.spvit import SPViT


def selector(**place) -> SPViT:
    reducer = SPViT(Place(dim=16, heads=2, **place))
    randomise(reducer)
    return reducer.eval()


def state(patches: int = 15, prefix: int = 1, batch: int = 2) -> TokenState:
    x = torch.randn(batch, prefix + patches, 16, generator=torch.Generator().manual_seed(patches))
    return TokenState(x, prefix, patches)


def reference(reducer: SPViT, x: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-odds of one image's patches and their probability to be kept, head by head and patch by patch."""
    odds, chances = [], []
    means = torch.stack([x[:, :8].mean(1), x[:, 8:].mean(1)], dim=1)
    weights = reducer.heads(means)
    inner = [F.gelu(reducer.inner(reducer.norm(part))) for part in (x[:, :8], x[:, 8:])]
    pooled = [(z[:, 4:] * kept[:, None]).sum(0) / kept.sum() for z in inner]
    for patch in range(len(x)):
        by_head = [reducer.outer(torch.cat([z[patch, :4], mean])) for z, mean in zip(inner, pooled, strict=True)]
        share = weights[patch] / weights[patch].sum()
        logits = sum(w * scores.log_softmax(0) for w, scores in zip(share, by_head, strict=True))
        odds.append(logits[0] - logits[1])
        chances.append(sum(w * scores.softmax(0)[0] for w, scores in zip(share, by_head, strict=True)))
    return torch.stack(odds), torch.stack(chances)


@torch.no_grad()
def test_scores_and_chances_are_those_of_the_heads_weighed():
    reducer, x = selector(), state(5).x[:, 1:]
    kept = torch.tensor([[1.0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    logits, chance = reducer.judge(x, kept[..., None])
    for image in range(2):
        odds, chances = reference(reducer, x[image], kept[image])
        torch.testing.assert_close(logits[image, :, 0] - logits[image, :, 1], odds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(chance[image], chances, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_leaves_goes_into_a_package_and_packages_stay():
    reducer, before = selector(), state(prefix=2)
    after = reducer(before, None, 14)
    odds, chances = reference(reducer, before.x[0, 2:], torch.ones(15))
    order = odds.argsort(descending=True)
    package = (chances[order[13:], None] * before.x[0, 2 + order[13:]]).sum(0)
    want = torch.cat([before.x[0, :2], before.x[0, 2 + order[:13]], package[None]])
    torch.testing.assert_close(after.x[0], want, rtol=1e-5, atol=1e-5)
    again = reducer(after, None, 13)
    assert torch.equal(again.x[:, -2], after.x[:, -1])  # the first package is never dropped
    assert again.packages == 2


def test_packages_must_leave_room_for_a_patch():
    with pytest.raises(InputError, match="block 3: 3 tokens cannot hold 3 packages and a patch"):
        selector(block=3)(state()._replace(packages=2), None, 3)


@torch.no_grad()
def test_tokens_that_are_masked_are_as_good_as_gone():
    model = tiny_vit(depth=4, reducer="spvit", keep={1: 30, 2: 20})
    gathered, marked = model.embed(images(3)), model.embed(images(3))
    for block in model.blocks:
        gathered = block(gathered)
        if block.keep is not None:
            marked = mark(block.reducer, marked, block.keep)
        left = block.mix(marked, None)
        marked = left._replace(x=left.x + block.feed(left.x))
    torch.testing.assert_close(model.classify(marked), model.classify(gathered), rtol=0, atol=1e-5)


def mark(reducer: SPViT, marked: TokenState, keep: int) -> TokenState:
    """As in training, with the sample that evaluation would take."""
    before = torch.ones(3, marked.x.shape[1], 1) if marked.policy is None else marked.policy
    logits, chance = reducer.judge(marked.x[:, 1:], before[:, 1:])
    last = marked.x.shape[1] - marked.packages - 1  # patches
    score = (logits[..., 0] - logits[..., 1])[:, :last].masked_fill(before[:, 1 : 1 + last, 0] == 0, -torch.inf)
    kept = torch.zeros_like(score).scatter(1, score.topk(keep - marked.packages - 1).indices, 1.0)[..., None]
    leaving = before[:, 1 : 1 + last] - kept
    package = (marked.x[:, 1 : 1 + last] * leaving * chance[:, :last, None]).sum(1, keepdim=True)
    policy = torch.cat([before[:, :1], kept, torch.ones(3, marked.packages + 1, 1)], dim=1)
    return marked._replace(x=torch.cat([marked.x, package], dim=1), policy=policy, packages=marked.packages + 1)


def test_training_keeps_all_and_draws_the_batch_to_its_share():
    reducer = selector(stages=3).train()
    torch.manual_seed(0)
    after = reducer(state(), None, 14)
    kept = after.policy[:, 1:16]
    assert after.x.shape == (2, 17, 16)
    torch.testing.assert_close(after.penalty, 2.0 / 3 * (kept.mean() - 13 / 15) ** 2)
    again = reducer(after, None, 13)
    assert (again.policy[:, 1:16] <= kept).all()
    assert torch.equal(again.policy[:, 16:], torch.ones(2, 2, 1))
    again.x.square().sum().backward()
    assert reducer.inner.weight.grad.abs().sum() > 0


def test_deit_small_costs_what_the_brief_counts():
    assert macs(deit_small({3: 122, 6: 74, 9: 30}, "spvit")) == pytest.approx(2.459e9, rel=0.01)
