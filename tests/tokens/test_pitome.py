from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitprune.model.state import AttentionView, TokenState
from vitprune.model.vit import size_bias
from vitprune.tokens.base import Place
from vitprune.tokens.pitome import PiToMe

EARLY, LATE = Place(0, 4), Place(3, 4)


def view(k: Tensor) -> AttentionView:
    return AttentionView(torch.full_like(k, float("nan")), k, k, 1.0, None)  # queries may not be read


def one_head(*angles: float) -> AttentionView:
    """Keys of one head at the given angles, in degrees."""
    turned = [math.radians(angle) for angle in angles]
    return view(torch.tensor([[[[math.cos(t), math.sin(t)] for t in turned]]]))


def state(*values: float) -> TokenState:
    return TokenState(torch.tensor([[[float(value)] for value in values]]), 1, len(values) - 1)


def test_a_patch_that_stands_apart_is_left_alone_in_a_late_block():
    # 10, 20 and 30 are alike, 40 is opposite to them; 20 lies in the middle and has most energy, then 10, then 30
    after = PiToMe(LATE)(state(9, 10, 20, 30, 40), one_head(77, 0, 1, 3, 180), 3)
    assert after.x.flatten().tolist() == [9, 30, 40, 15]  # 20 merges into 10, the next in energy
    assert after.size.flatten().tolist() == [1, 1, 1, 2]


def test_in_an_early_block_all_may_merge_and_the_most_alike_do():
    # by energy: 20, 10, 30, 40; from 20 and 30 into 10 and 40; 20 is nearest to 10
    after = PiToMe(EARLY)(state(9, 10, 20, 30, 40), one_head(77, 0, 1, 3, 180), 3)
    assert after.x.flatten().tolist() == [9, 30, 15, 40]


def test_sizes_weigh_in_means_and_not_in_attention():
    once = PiToMe(LATE)(state(9, 10, 20, 30, 40), one_head(77, 0, 1, 3, 180), 3)  # 9, 30, 40, 15 of two
    twice = PiToMe(LATE)(once, one_head(0, 0, 90, 2), 2)
    assert size_bias(twice) is None
    torch.testing.assert_close(twice.x.flatten(), torch.tensor([9, 40, (30 + 2 * 15) / 3]), rtol=1e-6, atol=0)
    assert twice.size.flatten().tolist() == [1, 1, 3]


@pytest.mark.parametrize("place", [EARLY, Place(1, 4), LATE])
@pytest.mark.parametrize(("prefix", "patches", "keep"), [(1, 49, 40), (2, 16, 9), (3, 17, 16), (1, 12, 6)])
def test_agrees_with_a_reference_in_plain_loops(place, prefix, patches, keep):
    generator = torch.Generator().manual_seed(patches + keep)
    x, k = (torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((prefix + patches, 5), (3, prefix + patches, 4)))  # fmt: skip
    size = torch.randint(1, 4, (patches,), generator=generator).double()
    sizes = torch.cat([torch.ones(prefix, dtype=torch.float64), size])[None, :, None]
    after = PiToMe(place)(TokenState(x[None], prefix, patches, sizes), view(k[None]), keep)
    found = sorted(zip(after.size[0, prefix:, 0].tolist(), after.x[0, prefix:].tolist(), strict=True))
    wanted = sorted(reference(place, k[:, prefix:], x[prefix:], size, patches - keep))
    torch.testing.assert_close(torch.tensor([s for s, _ in found]), torch.tensor([s for s, _ in wanted]))
    torch.testing.assert_close(torch.tensor([v for _, v in found]), torch.tensor([v for _, v in wanted]))


def reference(place: Place, keys: Tensor, x: Tensor, size: Tensor, merges: int) -> list[tuple[float, list[float]]]:
    """(size, features) of the patches that are left, token by token."""
    mean = keys.mean(0)
    unit = [row / row.norm() for row in mean]
    margin = 0.75 * (1 - place.block / place.depth)

    def elu(value: float) -> float:
        return value if value > 0 else math.exp(value) - 1

    energy = [sum(elu(float(a @ b) - margin) for b in unit) / len(unit) for a in unit]
    order = sorted(range(len(unit)), key=lambda i: -energy[i])
    if place.block >= place.depth / 2:
        from_, into, apart = order[: 2 * merges : 2], order[1 : 2 * merges : 2], order[2 * merges :]
    else:
        from_, into, apart = order[::2], order[1::2], []
    best = {a: max(into, key=lambda b: float(unit[a] @ unit[b])) for a in from_}
    gone = sorted(from_, key=lambda a: -float(unit[a] @ unit[best[a]]))[:merges]
    left = [(float(size[i]), x[i].tolist()) for i in [*apart, *(a for a in from_ if a not in gone)]]
    for b in into:
        group = [b, *(a for a in gone if best[a] == b)]
        total = sum(float(size[i]) for i in group)
        left.append((total, (sum(x[i] * size[i] for i in group) / total).tolist()))
    return left
