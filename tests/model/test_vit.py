from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import images, randomise, tiny_config, tiny_vit
from torch import nn

from vitprune.errors import InputError
from vitprune.model.config import BlockConfig
from vitprune.model.vit import Vit, fingerprint


def with_blocks(*blocks: BlockConfig, **config) -> Vit:
    model = Vit(tiny_config(**config).with_blocks(list(blocks), None)).eval()
    randomise(model)
    return model


@torch.no_grad()
def test_one_block_is_what_the_formula_says():
    model = with_blocks(BlockConfig(heads=2, qk_dim=3, v_dim=5, scale=0.7, mlp=6))
    block, state = model.blocks[0], model.embed(images(1))
    x = state.x[0].double()
    linear, norm = (lambda layer, x: x @ layer.weight.double().T + layer.bias.double()), nn.functional.layer_norm
    y = norm(x, (32,), block.norm1.weight.double(), block.norm1.bias.double(), 1e-6)
    qkv = linear(block.attn.qkv, y)
    heads = []
    for head in range(2):
        q, k = (qkv[:, start + 3 * head : start + 3 * head + 3] for start in (0, 6))
        heads.append((q @ k.T * 0.7).softmax(-1) @ qkv[:, 12 + 5 * head : 17 + 5 * head])
    x = x + linear(block.attn.proj, torch.cat(heads, dim=1))
    y = norm(x, (32,), block.norm2.weight.double(), block.norm2.bias.double(), 1e-6)
    x = x + linear(block.mlp.fc2, nn.functional.gelu(linear(block.mlp.fc1, y)))
    torch.testing.assert_close(block(state).x[0].double(), x, rtol=0, atol=1e-5)  # fp32, values of about 1


@pytest.mark.parametrize("residual", ["pre", "post", "parallel"])
@torch.no_grad()
def test_blocks_may_differ_and_lack_either_half(residual):
    sizes = {"qk_dim": 8, "v_dim": 8, "scale": 8**-0.5}
    model = with_blocks(
        BlockConfig(heads=4, mlp=64, **sizes),
        BlockConfig(heads=1, mlp=0, **sizes),
        BlockConfig(heads=0, mlp=7, **sizes),
        BlockConfig(heads=0, mlp=0, **sizes),
        residual=residual,
        layer_scale=True,
    )
    state = model.embed(images(2))
    for block in model.blocks[:3]:
        entered, state = state, block(state)
        assert not torch.equal(state.x, entered.x)
    assert torch.equal(model.blocks[3](state).x, state.x)
    assert not any(name.startswith("blocks.3.") for name in model.state_dict())
    assert model(images(2)).shape == (2, 10)


@torch.no_grad()
def test_a_parallel_block_adds_both_halves_of_the_same_input():
    model = tiny_vit(residual="parallel", depth=1)
    block, state = model.blocks[0], model.embed(images(1))
    want = state.x + block.attn(*block.attn.project(block.read(state.x)), None) + block.feed(state.x)
    torch.testing.assert_close(block(state).x, want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_token_sizes_enter_attention_and_pooling():
    model = tiny_vit(depth=1, pool="avg", class_token=False)
    state = model.embed(images(1))
    twice = state._replace(x=torch.cat([state.x[:, :1], state.x], dim=1))
    sized = state._replace(size=torch.tensor([2.0] + [1.0] * 48)[None, :, None])
    for classify in (model.classify, lambda s: model.classify(model.blocks[0](s))):
        # a token of size two is a token that is there twice
        torch.testing.assert_close(classify(sized), classify(twice), rtol=0, atol=1e-5)


@torch.no_grad()
def test_token_sizes_enter_attention_pooling():
    model = tiny_vit(depth=1, pool="map", pool_heads=4, pool_mlp=64)
    state = model.embed(images(1))
    twice = state._replace(x=torch.cat([state.x, state.x[:, -1:]], dim=1))
    sized = state._replace(size=torch.tensor([1.0] * 49 + [2.0])[None, :, None])
    torch.testing.assert_close(model.classify(sized), model.classify(twice), rtol=0, atol=1e-5)


def test_refuses_images_of_another_size():
    with pytest.raises(InputError, match="images are 32x32 pixels, the model takes 28x28; other sizes need dynamic"):
        tiny_vit()(images(1, 32))


@torch.no_grad()
def test_half_precision_resampling_stays_close():
    model = tiny_vit(dynamic_image_size=True)
    want = model(images(1, 40))
    got = model.bfloat16()(images(1, 40).bfloat16()).float()
    torch.testing.assert_close(got, want, rtol=0, atol=0.25)  # bf16 has 8 bits, logits of about 1 after two blocks


def test_fingerprint_follows_every_weight_and_name():
    model = tiny_vit()
    first = fingerprint(model)
    assert first == fingerprint(tiny_vit())
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] += 1e-6
    assert fingerprint(model) != first
    assert fingerprint(tiny_vit().double()) != first


@torch.no_grad()
def test_exports_with_dynamic_batch_height_and_width(tmp_path):
    model = tiny_vit(dynamic_image_size=True, registers=2, depth=1)
    batch, rows, columns = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "rows", "columns"))
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (images(2, 28)[:, :, :20],),
        path,
        dynamo=True,
        opset_version=20,
        input_names=["images"],
        dynamic_shapes=({0: batch, 2: 4 * rows, 3: 4 * columns},),
        verbose=False,
    )
    nodes = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert not nodes.keys() & {"Resize", "If", "Loop", "NonZero", "ScatterND", "ScatterElements"}
    session = onnxruntime.InferenceSession(path)
    for count, height, width in ((1, 28, 28), (3, 16, 44)):
        x = images(count, 44)[:, :, :height, :width]
        got = session.run(None, {"images": x.numpy()})[0]
        np.testing.assert_allclose(got, model(x).numpy(), rtol=0, atol=1e-5)  # fp32, logits of about 1


@torch.no_grad()
def test_exported_attention_reads_three_tensors(tmp_path):
    model = tiny_vit(depth=1, pool="map", pool_heads=4, pool_mlp=32)
    torch.onnx.export(model, (images(1),), tmp_path / "model.onnx", dynamo=True, opset_version=23, verbose=False)
    nodes = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Attention"]
    # the same tensor three times over crashes TensorRT-RTX
    assert [len(set(node.input[:3])) for node in nodes] == [3, 3]


def test_config_of_a_model_is_enough_to_rebuild_it():
    model = tiny_vit(layer_scale=True, gated=True, qk_norm=True)
    again = Vit(replace(model.config))
    again.load_state_dict(model.state_dict())
    assert fingerprint(again) == fingerprint(model)
