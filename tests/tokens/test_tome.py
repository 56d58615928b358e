from __future__ import annotations

import math

import pytest
import torch
from tiny import images, tiny_config, tiny_vit
from torch import Tensor
from torch.nn import functional as F

from vitprune.model.state import AttentionView, TokenState
from vitprune.model.vit import size_bias
from vitprune.surgery import build
from vitprune.tokens.base import track_sources
from vitprune.tokens.tome import ToMe


def view(k: Tensor) -> AttentionView:
    return AttentionView(torch.full_like(k, float("nan")), k, k, 1.0, None)  # queries may not be read


def one_head(*angles: float) -> AttentionView:
    """Keys at the given angles, in degrees; their lengths differ, and must not matter."""
    turned = [math.radians(angle) for angle in angles]
    return view(torch.tensor([[[[(i + 1) * math.cos(t), (i + 1) * math.sin(t)] for i, t in enumerate(turned)]]]))


def state(*values: float, prefix: int = 1) -> TokenState:
    return TokenState(torch.tensor([[[float(value)] for value in values]]), prefix, len(values) - prefix)


def test_merges_the_most_alike_pair_of_an_even_and_an_odd_position():
    # even positions are the class token, 20 and 40; 20 is 5 degrees from 10, 40 is 30 degrees from 30
    after = ToMe()(track_sources(state(9, 10, 20, 30, 40)), one_head(5, 0, 5, 90, 120), 3)
    assert after.x.flatten().tolist() == [9, 40, 15, 30]  # class token, unmerged even, odd
    assert after.size.flatten().tolist() == [1, 1, 2, 1]
    assert after.source[0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0.5, 0.5, 0, 0], [0, 0, 1, 0]]


def test_two_patches_may_merge_into_the_same_one():
    after = ToMe()(state(9, 10, 20, 30, 40), one_head(5, 0, 5, 90, 10), 2)
    assert after.size.flatten().tolist() == [1, 3, 1]
    torch.testing.assert_close(after.x.flatten(), torch.tensor([9, 70 / 3, 30]), rtol=1e-6, atol=0)


def test_means_are_weighted_by_what_was_merged_before():
    first = ToMe()(state(9, 10, 20, 30, 40), one_head(5, 0, 5, 90, 120), 3)  # 9, 40, 15 (of 2), 30
    second = ToMe()(first, one_head(0, 50, 60, 90), 2)  # 15 goes to 40
    torch.testing.assert_close(second.x.flatten(), torch.tensor([9, (40 + 2 * 15) / 3, 30]), rtol=1e-6, atol=0)
    assert second.size.flatten().tolist() == [1, 3, 1]


def test_unmerged_patches_stay_in_their_order():
    after = ToMe()(state(9, 1, 2, 3, 4, 5, 6, 7), one_head(0, 0, 40, 90, 89, 180, 160, 270), 6)  # 4 goes to 3
    assert after.x.flatten().tolist() == [9, 2, 6, 1, 3.5, 5, 7]


def test_the_distillation_token_is_no_destination():
    # positions count from the class token: 20 and 40 are even, 30 and 50 odd; 20 is most alike to the second token
    after = ToMe()(state(9, 8, 20, 30, 40, 50, prefix=2), one_head(0, 0, 0, 90, 90, 180), 3)
    assert after.x.flatten().tolist() == [9, 8, 20, 35, 50]


def test_register_tokens_neither_merge_nor_are_merged_into():
    after = ToMe()(state(9, 8, 7, 20, 30, 40, prefix=3), one_head(0, 0, 0, 45, 0, 10), 2)
    assert after.x.flatten().tolist() == [9, 8, 7, 20, 35]  # positions 3 and 5 are odd, 4 is even and goes to 5


def test_without_prefix_the_first_patch_is_even():
    after = ToMe()(state(10, 20, 30, 40, prefix=0), one_head(0, 10, 90, 180), 3)
    assert after.x.flatten().tolist() == [30, 15, 40]


def test_keys_are_averaged_over_the_heads_before_they_are_normalised():
    # head 0 says 2 is like 1 (weakly), head 1 says it is like 3, in keys ten times as long
    first = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    second = torch.tensor([[1.0, 0], [10, 0], [0, 10], [0, 10]])
    after = ToMe()(state(9, 1, 2, 3), view(torch.stack([first, second])[None]), 2)
    assert after.x.flatten().tolist() == [9, 1, 2.5]


def test_a_patch_that_nothing_merged_into_is_copied_bit_for_bit():
    x = torch.randn(1, 50, 8)
    after = ToMe()(TokenState(x, 1, 49), view(torch.randn(1, 2, 50, 4)), 40)
    alone = after.x[after.size.squeeze(-1) == 1]
    assert len(alone) > 30
    assert all((x[0] == token).all(-1).any() for token in alone)


def reference(x: Tensor, size: Tensor, k: Tensor, merges: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The paper's bipartite soft matching for one image, token by token: x [N, C], size [N], k [H, N, D]."""
    keys = k.mean(0)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    even = [i for i in range(len(x)) if i % 2 == 0 and i >= prefix]
    odd = [i for i in range(len(x)) if i % 2 == 1 and i >= prefix]
    best = {a: max(odd, key=lambda b: float(keys[a] @ keys[b])) for a in even}
    sources = sorted(even, key=lambda a: -float(keys[a] @ keys[best[a]]))[:merges]
    sums, sizes = {b: x[b] * size[b] for b in odd}, {b: size[b] for b in odd}
    for a in sources:
        sums[best[a]] = sums[best[a]] + x[a] * size[a]
        sizes[best[a]] = sizes[best[a]] + size[a]
    stay = [*range(prefix), *(a for a in even if a not in sources)]
    return (torch.stack([x[i] for i in stay] + [sums[b] / sizes[b] for b in odd]),
            torch.stack([size[i] for i in stay] + [sizes[b] for b in odd]))  # fmt: skip


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("patches", [16, 49])
def test_agrees_with_a_token_by_token_reference_over_three_applications(prefix, patches):
    generator = torch.Generator().manual_seed(prefix + patches)
    x = torch.randn(2, prefix + patches, 8, generator=generator)
    ours, theirs = TokenState(x, prefix, patches), [(image, torch.ones(len(image))) for image in x]
    for merges in (patches // 2, 3, 1):
        k = torch.randn(2, 3, ours.x.shape[1], 4, generator=generator)
        ours = ToMe()(ours, view(k), ours.x.shape[1] - prefix - merges)
        theirs = [reference(*image, keys, merges, prefix) for image, keys in zip(theirs, k, strict=True)]
    for number, (want, sizes) in enumerate(theirs):
        torch.testing.assert_close(ours.x[number], want, rtol=1e-5, atol=1e-6)  # fp32, sums in another order
        assert torch.equal(ours.size[number, :, 0], sizes)


def test_a_token_of_size_two_attends_like_two_equal_tokens():
    attn = tiny_vit().blocks[0].attn
    x = torch.randn(1, 5, 32)
    size = torch.tensor([1.0, 2, 1, 3, 1])[None, :, None]
    merged = attn(*attn.project(x), size_bias(TokenState(x, 1, 4, size)))
    apart = attn(*attn.project(x[:, [0, 1, 1, 2, 3, 3, 3, 4]]), None)
    torch.testing.assert_close(merged, apart[:, [0, 1, 3, 4, 7]], rtol=1e-5, atol=1e-6)  # fp32, log and exp


def test_matches_on_the_keys_that_attention_used():
    model = tiny_vit(qk_norm=True, layer_scale=True, reducer="tome", keep={0: 30})
    block, current = model.blocks[0], model.embed(images(1))
    after = block(current)
    qkv = block.attn.qkv(block.norm1(current.x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    normed = block.attn.k_norm(qkv[1])
    x = current.x + block.ls1(block.attn(*block.attn.project(block.norm1(current.x)), None))
    want, _ = reference(x[0].detach(), torch.ones(50), normed[0].detach(), 19, 1)
    want = want + block.ls2(block.mlp(block.norm2(want)))
    torch.testing.assert_close(after.x[0], want, rtol=1e-5, atol=1e-5)  # fp32, sums in another order


def tokens_per_block(kept: dict[int, int]) -> list[int]:
    model = build(tiny_config(depth=12, image=224, patch=16, reducer="tome", keep=kept))
    tokens, current = [], model.embed(images(1, size=224))
    for block in model.blocks:
        current = block(current)
        tokens.append(current.x.shape[1])
    assert current.size.sum() == 197
    return tokens


@pytest.mark.parametrize(
    ("merges", "published"),
    [
        (13, [184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41]),
        (16, [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),  # the last block may merge 10 of 20 only
    ],
)
def test_deit_has_the_published_token_counts(merges, published):
    kept, left = {}, 196
    for block in range(12):
        kept[block] = left = max(left - merges, ToMe.fewest(left, 1))
    assert tokens_per_block(kept) == published


def test_counts_that_can_be_reached_at_the_plans_size_can_be_at_every_other():
    # a block leaves ceil(P keep / 49) of an image with P patches
    for before in range(1, 50):
        for keep in range(ToMe.fewest(before, 1), before + 1):
            for patches in (1, 2, 3, 12, 48, 50, 97, 196):
                entering, leaving = (-(-patches * count // 49) for count in (before, keep))
                assert ToMe.fewest(entering, 1) <= leaving <= entering


def test_similarity_is_the_cosine():
    keys = torch.randn(1, 1, 9, 4)
    pairs = F.cosine_similarity(keys[0, 0, 2::2, None], keys[0, 0, None, 1::2], dim=-1)
    source, into = divmod(int(pairs.argmax()), 4)
    after = ToMe()(state(*range(9)), view(keys), 7)
    assert after.x.flatten()[4:].tolist()[into] == (2 + 2 * source + 1 + 2 * into) / 2
