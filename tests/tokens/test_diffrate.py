"""DiffRate: ranking, dropping and merging, against sums that scatter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitprune.errors import InputError
from vitprune.model.state import AttentionView, TokenState
from vitprune.schedules import counts
from vitprune.tokens.base import Place
from vitprune.tokens.diffrate import FOUND, DiffRate


def case(patches: int = 10, prefix: int = 1):
    generator = torch.Generator().manual_seed(patches)
    x = torch.randn(2, prefix + patches, 6, generator=generator).abs()  # likenesses above 0
    k = torch.randn(2, 3, prefix + patches, 4, generator=generator)
    size = 1 + torch.rand(2, prefix + patches, 1, generator=generator)
    return TokenState(x, prefix, patches, size), AttentionView(k, k, k, 0.5, None)


@pytest.mark.parametrize("prefix", [1, 2])
def test_agrees_with_a_scattering_mean(prefix):
    state, view = case(prefix=prefix)
    after = DiffRate()(state, view, 4)  # of ten, six go: two are dropped, four merged
    row = (view.q[:, :, 0, None] @ view.k.transpose(-2, -1) * 0.5).softmax(-1)[:, :, 0].mean(1)[:, prefix:]
    for image in range(2):
        order = prefix + row[image].argsort(descending=True)[:8]
        ranked, sizes = state.x[image, order], state.size[image, order]
        unit = F.normalize(ranked, dim=-1)
        alike, into = (unit[4:] @ unit[:4].T).max(1)
        x = ranked[:4].scatter_reduce(0, into[:, None].expand(4, 6), ranked[4:], "mean")
        grown = sizes[:4].scatter_reduce(0, into[:, None], sizes[4:] * alike[:, None], "sum")
        torch.testing.assert_close(after.x[image], torch.cat([state.x[image, :prefix], x]))
        torch.testing.assert_close(after.size[image], torch.cat([state.size[image, :prefix], grown]))


def test_the_published_counts_of_dropping_are_taken_where_the_published_ones_are_asked_for():
    small = DiffRate(Place(3, 12, dim=384))
    assert small._merged(155, 140) == 9  # s-2.9 drops to 150 tokens in block 3, and merges to 141
    assert small._merged(155, 100) == 33
    assert DiffRate(Place(3, 12, dim=768))._merged(155, 140) == 9


def test_a_patch_unlike_all_others_adds_nothing_to_a_size():
    x = torch.tensor([[[1.0, 1], [1, 0], [-1, 0]]])
    k = torch.tensor([0.0, 2, 1])[None, None, :, None]
    after = DiffRate()(TokenState(x, 1, 2), AttentionView(torch.ones_like(k), k, k, 1.0, None), 1)
    assert after.size[0, :, 0].tolist() == [1, 1]
    assert after.x[0, 1].tolist() == [0, 0]


def test_schedules_are_for_the_models_they_were_found_for():
    with pytest.raises(InputError, match="diffrate's schedules are for 12 blocks and 196 patches, not 12 and 576"):
        counts("diffrate", "published-s-2.9", 12, 576, 1)


@pytest.mark.parametrize("name", FOUND)
def test_counts_never_rise_and_end_at_the_authors_own(name):
    left = counts("diffrate", f"published-{name}", 12, 196, 1)
    assert list(left) == sorted(left, reverse=True)
    assert left[-1] + 1 == FOUND[name][1][-1]
