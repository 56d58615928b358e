"""Islands of fp32 in fp16 models, made to overflow in each of the places where a ViT can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from tiny import images, tiny_vit

from vitprune.surgery import dense_plan, prune
from vitprune_deploy.export.islands import Island, find_islands, sentence
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.export.parity import check_parity
from vitprune_deploy.export.precision import in_precision


def stream(model):
    model.blocks[0].mlp.fc2.bias[3] = 1e5


def hidden(model):
    mlp = model.blocks[1].mlp
    for weight in (mlp.fc1.weight, mlp.fc1.bias):
        weight.mul_(2e5)
    mlp.fc2.weight.div_(2e5)


def stem(model):
    model.patch_embed.bias[5] = 9e4


def scores(model):
    model.blocks[1].attn.qkv.weight[:64].mul_(60)


OVERFLOWS = {
    stream: [("stream", "blocks.0"), ("layer", "blocks.0.mlp.fc2")],
    hidden: [("layer", "blocks.1.mlp.fc1"), ("layer", "blocks.1.mlp.fc2")],
    stem: [("stem", "patch_embed"), ("stream", "blocks.0")],
    scores: [("attention", "blocks.1.attn")],
}


@torch.no_grad()
def overflowing(where, **config):
    model = tiny_vit(**{"depth": 2} | config)
    where(model)
    return model


def test_a_model_within_range_has_no_islands():
    assert find_islands(tiny_vit(), images(4)) == []


@pytest.mark.parametrize("where", OVERFLOWS)
def test_what_overflows_is_an_island_and_nothing_else(where):
    found = find_islands(overflowing(where), images(4))
    assert [(island.kind, island.where) for island in found] == OVERFLOWS[where]
    assert all(island.reaches > 65504 / 4 for island in found)


@pytest.mark.parametrize("where", [stream, hidden, stem])
@torch.no_grad()
def test_without_islands_nothing_is_a_number_and_with_them_an_exported_graph_agrees_with_fp32(where, tmp_path):
    model, x = overflowing(where), images(4)
    assert not in_precision(model, "fp16")(x).isfinite().any()
    info = export_onnx(model, tmp_path / "m.onnx", precision="fp16", islands=find_islands(model, x))
    assert check_parity(model, tmp_path / "m.onnx", images(8, seed=1), precision="fp16").max_abs < 0.02
    assert 0 < info.weights["float32"] < info.weights["float16"]
    assert info.nodes["Cast"] > 2


def test_the_weights_of_an_island_are_those_of_the_model_to_the_last_bit():
    model = overflowing(hidden)
    mlp = in_precision(model, "fp16", find_islands(model, images(4))).model.blocks[1].mlp
    assert mlp.fc1.weight.dtype == torch.float32
    assert torch.equal(mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


def test_scores_of_an_attention_are_in_fp32_also_where_it_asks_for_the_class_token_alone(tmp_path):
    model = overflowing(scores, keep={1: 0})
    islands = find_islands(model, images(4))
    assert [island.kind for island in islands] == ["attention"]
    info = export_onnx(model, tmp_path / "m.onnx", precision="fp16", islands=islands)
    attention = sum(p.numel() for p in model.blocks[1].attn.qkv.parameters())
    norm = sum(p.numel() for p in model.blocks[1].norm1.parameters())
    assert info.weights["float32"] == attention + norm + 1  # and the scale of the scores
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, {"images": images(4).numpy()})[0]).all()


# they carry sizes, weights of their own, and parked tokens
@pytest.mark.parametrize(("method", "keep"), [("tome", {0: 30}), ("dynamicvit", {1: 30}), ("evovit", {1: 30})])
@torch.no_grad()
def test_token_methods_work_on_a_stream_that_widens(method, keep):
    model, x = overflowing(stream, depth=3, reducer=method, keep=keep), images(4)
    found = in_precision(model, "fp16", find_islands(model, x))(x)
    torch.testing.assert_close(found, model(x), rtol=0, atol=0.02)


def test_tokens_that_merge_on_a_wide_stream_export(tmp_path):
    model = overflowing(stream, reducer="tome", keep={0: 30})
    export_onnx(model, tmp_path / "m.onnx", precision="fp16", islands=find_islands(model, images(4)))
    assert check_parity(model, tmp_path / "m.onnx", images(6), precision="fp16").max_abs < 0.02


@pytest.mark.parametrize(
    "config",
    [
        {"residual": "post"},
        {"residual": "parallel"},
        {"gated": True, "layer_scale": True},
        {"pool": "map", "pool_heads": 4, "pool_mlp": 64, "class_token": False},
    ],
)
@pytest.mark.parametrize("where", [stream, hidden])
@torch.no_grad()
def test_every_kind_of_model_is_whole_with_its_islands(where, config):
    model, x = overflowing(where, **config), images(4)
    found = in_precision(model, "fp16", find_islands(model, x))(x)
    torch.testing.assert_close(found, model(x), rtol=0, atol=0.02)  # 11 bits


@pytest.mark.parametrize("units", [(), (1, 2, 3)])
@torch.no_grad()
def test_a_pruned_model_keeps_the_islands_of_what_is_left_of_it(units):
    model, x = overflowing(hidden), images(4)
    plan = dense_plan(model)
    blocks = (plan.blocks[0], replace(plan.blocks[1], mlp=units))
    slim = prune(model, replace(plan, blocks=blocks))
    found = in_precision(slim, "fp16", find_islands(model, x))(x)
    torch.testing.assert_close(found, slim(x), rtol=0, atol=0.02)


def test_the_sentence_names_places_figures_and_the_way_out():
    found = [Island("stream", "blocks.5", 120000.0, True), Island("layer", "blocks.5.mlp.fc2", 81000.4, True)]
    assert sentence(found) == (
        "fp16 ends at 65504, and some operations come near or go beyond it on calibration images: the residual stream "
        "from blocks.5 on (up to 120000), blocks.5.mlp.fc2 (up to 81000). They are kept in fp32; runtime.precision "
        "bf16 has fp32's range and needs no such islands, where the device has it."
    )
    assert "and 3 more. They" in sentence(found * 4)
