"""Torch-Pruning's dependency groups as a second opinion on what must be cut together, where its groups can say it.

Its low-level groups alone: they slice a timm model; whatever must be told by hand about attention is set here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from tiny import images, randomise

from vitprune.model.timm import convert
from vitprune.plan import BlockPlan
from vitprune.surgery import dense_plan, prune

tp = pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # the class token and the positions: as they are


@pytest.fixture
def timm_vit():
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=28, patch_size=4, embed_dim=32, depth=2, num_heads=4,
        num_classes=10,
    ).eval()  # fmt: skip
    randomise(model)
    for block in model.blocks:
        block.attn.fused_attn = False  # the fused path would take the scale of the new head size
    return model


def cut(model, layer, remove, gone: list[int]) -> None:
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=images(1))
    graph.get_pruning_group(layer, remove, idxs=gone).prune()


def others(count: int, kept) -> list[int]:
    return [i for i in range(count) if i not in kept]


def test_heads_units_and_dims_alike_in_all_heads(timm_vit):
    dense = convert(timm_vit)
    dims = (0, 2, 3, 6, 7)
    kept = BlockPlan((0, 2, 3), tuple(range(5, 45)), None, (dims,) * 3, (dims,) * 3)
    whole = dense_plan(dense)
    slim = prune(dense, replace(whole, blocks=(kept, whole.blocks[1])))

    block = timm_vit.blocks[0]
    columns = [8 * head + dim for head in kept.heads for dim in dims]
    cut(timm_vit, block.mlp.fc1, tp.prune_linear_out_channels, others(128, kept.mlp))
    cut(timm_vit, block.attn.proj, tp.prune_linear_in_channels, others(32, columns))
    block.attn.num_heads, block.attn.head_dim, block.attn.attn_dim = 3, 5, 15
    assert sum(p.numel() for p in slim.parameters()) == sum(p.numel() for p in timm_vit.parameters()) - 32
    torch.testing.assert_close(slim(images(3)), timm_vit(images(3)), rtol=0, atol=1e-5)  # fp32


def test_channels_of_the_residual_stream(timm_vit):
    dense, channels = convert(timm_vit), tuple(range(0, 32, 2))
    slim = prune(dense, replace(dense_plan(dense), embed=channels))
    cut(timm_vit, timm_vit.patch_embed.proj, tp.prune_conv_out_channels, others(32, channels))
    timm_vit.embed_dim = timm_vit.num_features = 16
    torch.testing.assert_close(slim(images(3)), timm_vit(images(3)), rtol=0, atol=1e-5)  # fp32
