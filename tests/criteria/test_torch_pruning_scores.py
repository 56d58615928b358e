"""Torch-Pruning's scores of its low-level groups, as a second opinion on ours; its Hessian is wrong, and left out."""

from __future__ import annotations

from typing import ClassVar

import pytest
import timm
import torch
from tiny import images, randomise
from torch.nn import functional as F

from vitprune.criteria.base import Criterion, LayerView, Ranking
from vitprune.criteria.magnitude import Magnitude
from vitprune.model.timm import convert
from vitprune.search.losses import Sizes, rank_units
from vitprune.statistics import gate_gradients

tp = pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # the class token and the positions
SIZES = Sizes((4, 2), (128, 64))
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # fp32; a wrong row is off by O(1)


@pytest.fixture(scope="module")
def timm_vit():
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=28, patch_size=4, embed_dim=32, depth=2, num_heads=4,
        num_classes=10,
    ).eval()  # fmt: skip
    randomise(model)
    for block in model.blocks:  # a bias is a member of its own there
        block.mlp.fc1.bias.data.zero_()
    return model


def theirs(model, importance, half: str = "mlp", block: int = 0) -> torch.Tensor:
    """Torch-Pruning's score of every hidden unit, or of every channel that ``proj`` reads."""
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=images(1))
    mlp, attn = model.blocks[block].mlp, model.blocks[block].attn
    if half == "mlp":
        return importance(graph.get_pruning_group(mlp.fc1, tp.prune_linear_out_channels, idxs=list(range(128))))
    return importance(graph.get_pruning_group(attn.proj, tp.prune_linear_in_channels, idxs=list(range(32))))


class Spy(Criterion):
    """Keeps what criteria are shown."""

    seen: ClassVar[dict[int, LayerView]] = {}

    def rank(self, layer: LayerView) -> Ranking:
        self.seen[layer.number] = layer
        return Magnitude().rank(layer)


@pytest.mark.parametrize("power", [1, 2])
def test_what_a_unit_reads_and_writes_with_is_what_goes_together(timm_vit, power):
    rank_units(convert(timm_vit), images(1), Spy(), SIZES)
    summed = tp.importance.GroupMagnitudeImportance(power, group_reduction="sum", normalizer=None)
    for number, half in enumerate(("attn", "mlp")):
        view = Spy.seen[number]
        columns = view.weight.abs().pow(power).sum(0).unflatten(0, (-1, view.unit_size)).sum(1)
        wanted = theirs(timm_vit, summed, half).unflatten(0, (-1, view.unit_size)).sum(1)
        torch.testing.assert_close(view.reads.abs().pow(power).sum(1) + columns, wanted, **CLOSE)


def test_magnitude_is_theirs_of_the_layer_that_writes(timm_vit):
    ranking = rank_units(convert(timm_vit), images(1), "magnitude", SIZES).halves[0, "mlp"]
    members = theirs(timm_vit, tp.importance.GroupMagnitudeImportance(2, group_reduction=None, normalizer=None))
    torch.testing.assert_close(ranking.scores.float(), members[1], **CLOSE)


def test_the_weights_of_hidden_units_in_s2vite_are_theirs_with_the_l1_norm(timm_vit):
    ranking = rank_units(convert(timm_vit), images(2), "attn_taylor", SIZES).halves[0, "mlp"]
    summed = tp.importance.GroupMagnitudeImportance(1, group_reduction="sum", normalizer=None)
    torch.testing.assert_close(ranking.scores.float(), theirs(timm_vit, summed), **CLOSE)


def test_taylor_and_nvits_sums_are_theirs_for_one_image(timm_vit):
    dense, picture = convert(timm_vit), images(1)
    gates = gate_gradients(dense, picture)
    timm_vit.zero_grad()
    F.cross_entropy(timm_vit(picture), gates.labels).backward()
    of_group = tp.importance.GroupTaylorImportance(group_reduction=None, normalizer=None, multivariable=True)
    for number in range(2):
        reading, writing = theirs(timm_vit, of_group, block=number)
        torch.testing.assert_close(gates.blocks[number].writing["mlp"][0].abs(), writing, **CLOSE)
        torch.testing.assert_close(gates.blocks[number].reading["mlp"][0].abs(), reading, **CLOSE)
    taylor = rank_units(dense, picture, "taylor", SIZES).halves[0, "mlp"]
    torch.testing.assert_close(taylor.scores.float(), theirs(timm_vit, of_group)[1], **CLOSE)
