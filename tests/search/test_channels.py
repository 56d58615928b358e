from __future__ import annotations

import pytest
import torch
from tiny import images, tiny_vit

from vitprune.errors import InputError
from vitprune.search.channels import channel_scores, kept_channels
from vitprune.statistics import images_per_batch


@torch.no_grad()
def test_scores_are_those_of_the_norms_outputs_added_by_hand():
    model, pictures = tiny_vit(depth=1), images(3)
    state = model.embed(pictures)
    block = model.blocks[0]
    read = block.norm1(state.x)
    fed = block.norm2(state.x + block.attn(*block.attn.project(read), None))
    last = model.norm(block(state).x[:, 0])  # the class token alone is read, and normalised
    want = sum(x.abs().mean(1).double().square().sum(0).sqrt() for x in (read, fed, last[:, None]))
    torch.testing.assert_close(channel_scores(model, pictures), want, rtol=1e-5, atol=0)  # fp32


def test_a_channel_that_no_norm_passes_on_goes_first_whatever_the_batches(monkeypatch):
    model = tiny_vit(depth=2)
    with torch.no_grad():
        for norm in (model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))):
            norm.weight[5] = norm.bias[5] = 0
    kept = kept_channels(model, images(9), 31)
    assert kept == tuple(channel for channel in range(32) if channel != 5)
    whole = channel_scores(model, images(9))
    monkeypatch.setattr("vitprune.statistics.ELEMENTS_PER_BATCH", 10_000)
    assert images_per_batch(model.config) < 9
    torch.testing.assert_close(channel_scores(model, images(9)), whole, rtol=1e-5, atol=0)  # fp32, other batches


def test_not_fewer_channels_are_refused():
    with pytest.raises(InputError, match="32 channels are not fewer than the 32 of the model"):
        kept_channels(tiny_vit(depth=1), images(1), 32)
