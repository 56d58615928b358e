"""PS-ViT: the same positions in every image, exact rows of the dense block, and what makes a position significant."""

from __future__ import annotations

import pytest
import torch
from tiny import images, tiny_vit

from vitprune.errors import NotSupported
from vitprune.surgery import reduce_tokens
from vitprune.tokens.psvit import PSViT, significances


@torch.no_grad()
def test_a_reduced_block_gives_the_dense_blocks_rows():
    dense = tiny_vit(depth=3)
    weights = PSViT.calibrated(dense, images(8))
    model = reduce_tokens(dense, "psvit", {0: 30, 1: 11}, weights)
    state = wanted = dense.embed(images(2))
    for slim, block in zip(model.blocks, dense.blocks, strict=True):
        state = slim(state)
        wanted = block(wanted)
        if state.ids is not None:
            assert torch.equal(state.ids, state.ids.sort().values)
            # of the first block exactly; later ones read fewer tokens than the dense ones
            rows = torch.cat([torch.tensor([0]), 1 + state.ids])
            if len(state.ids) == 30:
                torch.testing.assert_close(state.x, wanted.x[:, rows], rtol=0, atol=1e-5)
            wanted = wanted._replace(x=wanted.x[:, rows] if wanted.x.shape[1] == 50 else state.x)
    assert len(state.ids) == 11


@torch.no_grad()
def test_the_most_significant_positions_stay_and_later_blocks_choose_among_them():
    dense = tiny_vit(depth=2)
    weights = {f"blocks.{b}.reducer.significance": torch.rand(49, generator=torch.Generator().manual_seed(b))
               for b in range(2)}  # fmt: skip
    model = reduce_tokens(dense, "psvit", {0: 20, 1: 5}, weights)
    state = model.blocks[0](model.embed(images(1)))
    first = weights["blocks.0.reducer.significance"].topk(20).indices
    assert set(state.ids.tolist()) == set(first.tolist())
    state = model.blocks[1](state)
    second = sorted(first.tolist(), key=lambda i: -weights["blocks.1.reducer.significance"][i])[:5]
    assert state.ids.tolist() == sorted(second)


@torch.no_grad()
def test_significance_by_the_sums_of_the_paper():
    model = tiny_vit(depth=3, heads=2)
    state, maps, entering = model.embed(images(1)), [], []
    for block in model.blocks:
        q, k, _ = block.attn.project(block.norm1(state.x))
        maps.append((q @ k.transpose(-2, -1) * block.attn.scale).softmax(-1)[0])
        entering.append(state.x[0].abs())
        state = block(state)
    found = significances(model, images(1))
    for block in range(3):
        # ways of the class token's attention through the blocks behind, one mean over heads for each of them
        reach = torch.zeros(50)
        if block == 2:
            reach[0] = 1
        elif block == 1:
            reach = (maps[2][:, 0] ** 2).mean(0)
        else:
            for a in range(2):
                for b in range(2):
                    reach += (maps[2][a, 0] @ maps[1][b]) ** 2 / 4
        length = sum(((maps[block][h] @ entering[block]) ** 2).sum(-1) for h in range(2)) / 2
        torch.testing.assert_close(found[block][0], reach * length, rtol=1e-4, atol=1e-6)


def test_images_of_several_sizes_are_refused():
    with pytest.raises(NotSupported, match="psvit keeps the same positions in every image"):
        tiny_vit(reducer="psvit", keep={0: 20}, dynamic_image_size=True)
