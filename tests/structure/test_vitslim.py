"""ViT-Slim, by hand: where the masks multiply, the global threshold, patches over the blocks, equally many dims."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import images, tiny_vit

from vitprune.budgets import macs_budget
from vitprune.errors import InputError, NotSupported
from vitprune.learn import learn
from vitprune.recover import Batch, RecoverSettings
from vitprune.structure.base import Multiples, Target
from vitprune.structure.vitslim import DIMS, PATCHES, UNITS, VitSlim, monotone, threshold
from vitprune.surgery import prune

SMALL = Multiples(1, 8, 2)


def make(share: float = 0.6, **options):
    model = tiny_vit()
    return model, VitSlim(model, macs_budget(model.config, share), SMALL, **options)


@torch.no_grad()
def test_one_mask_multiplies_query_key_and_value_behind_their_bias():
    model, method = make()
    for number, mask in enumerate(method.heads):
        mask.copy_(torch.rand(mask.shape, generator=torch.Generator().manual_seed(number)))
    x, attn = torch.randn(2, 5, 32), model.blocks[1].attn
    plain = attn.project(x)
    for found, by_hand in zip(method.computed(model, lambda: attn.project(x)), plain, strict=True):
        torch.testing.assert_close(found, by_hand * method.heads[1][:, None])


@torch.no_grad()
def test_units_are_masked_behind_the_activation():
    model, method = make()
    method.units[0].copy_(torch.rand(64))
    mlp, x = model.blocks[0].mlp, torch.randn(2, 5, 32)
    by_hand = torch.nn.functional.linear(mlp.hidden(x) * method.units[0], mlp.fc2.weight, mlp.fc2.bias)
    torch.testing.assert_close(method.computed(model, lambda: mlp(x)), by_hand)


@pytest.mark.parametrize(("share", "limit"), [(1.0, 0), (0.7, 3), (0.55, 4), (0.1, 9)])
def test_the_threshold_stands_at_its_place_among_all_masks(share, limit):
    masks = [torch.tensor([3.0, 9, 1, 7]), torch.tensor([[0.0, 2], [8, 4], [6, 5]])]
    assert threshold(masks, share).item() == limit


def test_what_equals_the_threshold_stays():
    masks = [torch.tensor([1.0, 1, 1, 2])]
    assert (masks[0] >= threshold(masks, 0.5)).all()


def test_a_patch_that_a_later_block_keeps_is_there_in_all_earlier_ones():
    kept = [torch.tensor(row, dtype=torch.bool) for row in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0])]
    assert [one.int().tolist() for one in monotone(kept)] == [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]]


def test_the_penalty_is_the_absolute_sum_of_each_kind():
    model, method = make(patches=0.5)
    by_hand = DIMS * 2 * 32 + UNITS * 2 * 64 + PATCHES * 2 * 49 * math.tanh(3)
    assert method.penalty(model, Target(torch.zeros(1, 10))).item() == pytest.approx(by_hand)
    assert pytest.approx([2e-4, 5e-5, 1e-4]) == [4 * DIMS, 4 * UNITS, 4 * PATCHES]


@torch.no_grad()
def test_each_head_of_a_block_keeps_equally_many_of_its_own_best_dims():
    model, method = make(share=1.0)
    for mask in method.heads:
        mask.copy_(torch.rand(mask.shape, generator=torch.Generator().manual_seed(7)))
    method.heads[0][0, :4] = 2.0  # a head of large masks does not take from the others
    method.budget = method.budget._replace(share=0.75)
    kept = method.finish(model).blocks[0]
    assert kept.qk == kept.v
    assert len({len(dims) for dims in kept.v}) == 1
    for head, dims in enumerate(kept.v):
        best = method.heads[0][head].argsort(descending=True)[: len(dims)].sort().values
        assert dims == tuple(best.tolist())


def test_patches_leave_by_position_where_the_masks_say():
    model = tiny_vit(depth=3)

    def batches(epoch):
        return [Batch(images(8, seed=epoch))]

    settings = RecoverSettings(steps=6, checks=1, lr=1e-3)
    budget = macs_budget(model.config, 0.7)
    found = learn("vitslim", model, budget, batches, images(4), settings, multiples=SMALL, patches=0.5)
    slim = prune(found.model, found.plan, method_weights=found.method_weights)
    left = found.plan.patches_after()
    assert slim.config.reducer == "psvit"
    assert left == sorted(left, reverse=True)
    assert left[-1] < 49
    assert slim.tokens(images(1)).x.shape[1] == 1 + left[-1]
    last = max(n for n, block in enumerate(found.plan.blocks) if block.patches)
    weights = found.method_weights[f"blocks.{last}.reducer.significance"]
    assert slim.tokens(images(1)).ids.tolist() == weights.topk(left[-1]).indices.sort().values.tolist()


def test_patches_without_a_class_token_or_a_share_that_is_none_are_sentences():
    model = tiny_vit(class_token=False, pool="avg")
    with pytest.raises(NotSupported, match="takes a class token"):
        VitSlim(model, macs_budget(model.config, 0.6), patches=0.5)
    with pytest.raises(InputError, match="above 0"):
        make(patches=0.0)
