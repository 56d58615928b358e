"""Exported graphs: what the file promises, what is refused, and the traps that the exporter walks into in silence."""

from __future__ import annotations

import json
import logging
import math

import onnx
import onnxruntime
import pytest
import torch
from tiny import images, randomise, tiny_config, tiny_vit
from torch import nn

from vitprune.errors import InputError, NotSupported
from vitprune.surgery import build
from vitprune_deploy.export import onnx as export
from vitprune_deploy.export.onnx import Axis, export_module, export_onnx, metadata_json
from vitprune_deploy.export.precision import opset_for, ort_attention
from vitprune_deploy.latency.pieces import PieceFiles


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model = tiny_vit(depth=1)
    path = tmp_path_factory.mktemp("dense") / "model.onnx"
    return model, path, export_onnx(model, path, metadata={"plan": "abc"})


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {value.name: array.numpy() for value, array in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def shape(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_input_output_and_axes_bear_the_names_that_services_rely_on(dense):
    graph = onnx.load(dense[1]).graph
    assert [(value.name, shape(value)) for value in graph.input] == [("images", ["batch", 3, 28, 28])]
    assert [(value.name, shape(value)) for value in graph.output] == [("logits", ["batch", 10])]
    assert dense[2].dynamic == {"images": {0: "batch"}}


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_dense_export_computes_what_torch_does_at_every_batch(dense, batch):
    x = images(batch)
    torch.testing.assert_close(run(dense[1], x), dense[0](x).detach(), rtol=1e-5, atol=1e-5)  # fp32, one block


def test_attention_is_five_nodes(dense):
    nodes = dense[2].nodes
    assert (nodes["Split"], nodes["MatMul"], nodes["Softmax"]) == (1, 6, 1)
    assert nodes["Transpose"] == 5  # patches, q, k, v, and back: k is not turned round twice
    assert nodes["Mul"] == 1  # the scale, on q alone
    assert nodes.keys().isdisjoint({"Where", "IsNaN", "Sqrt", "Slice"})


def test_the_same_model_gives_the_same_bytes(dense, tmp_path):
    assert export_onnx(dense[0], tmp_path / "again.onnx", metadata={"plan": "abc"}).sha256 == dense[2].sha256


def test_the_file_names_no_path_of_this_machine(dense):
    assert b"vit.py" not in dense[1].read_bytes()


def test_metadata_are_strings_under_one_prefix(dense):
    found = {prop.key: prop.value for prop in onnx.load(dense[1]).metadata_props}
    assert found["vitprune.plan"] == "abc"
    assert found["vitprune.precision"] == "fp32"
    assert all(key.startswith("vitprune.") for key in found)
    assert json.loads(metadata_json(preprocess={"mean": [0.5]})["preprocess"]) == {"mean": [0.5]}


def test_height_and_width_stay_symbolic_and_positions_follow_them(tmp_path):
    model = tiny_vit(depth=1, dynamic_image_size=True)
    export_onnx(model, tmp_path / "m.onnx", image_size=((16, 64), (16, 64)))
    assert shape(onnx.load(tmp_path / "m.onnx").graph.input[0]) == ["batch", 3, "height", "width"]
    for size in ((28, 28), (16, 64), (40, 24)):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(run(tmp_path / "m.onnx", x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_fixed_batch_stays_fixed(tmp_path):
    info = export_onnx(tiny_vit(depth=1), tmp_path / "m.onnx", batch=1)
    assert shape(onnx.load(tmp_path / "m.onnx").graph.input[0]) == [1, 3, 28, 28]
    assert info.dynamic == {}


@pytest.mark.parametrize("method", ["evit", "tome"])
def test_token_methods_export_without_a_node_that_tensorrt_refuses(method, tmp_path):
    model = build(tiny_config(depth=2, keep={0: 30}, reducer=method))
    randomise(model)
    export_onnx(model, tmp_path / "m.onnx")
    x = images(3)
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reducer", [None, "tome"])
def test_a_last_block_for_the_class_token_has_its_weights_apart_in_the_file(reducer, tmp_path):
    model = build(tiny_config(depth=2, keep={0: 30, 1: 0} if reducer else {1: 0}, reducer=reducer))
    randomise(model)
    export_onnx(model, tmp_path / "m.onnx")
    x = images(3)
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), model(x).detach(), rtol=1e-4, atol=1e-5)
    graph = onnx.load(tmp_path / "m.onnx").graph
    weights = {tuple(weight.dims) for weight in graph.initializer}
    assert {(32, 32), (32, 64)} <= weights  # queries, and keys with values
    stored = {weight.name for weight in graph.initializer}
    assert not [node for node in graph.node if node.op_type in ("Split", "Slice") and node.input[0] in stored]


def test_fp16_is_in_the_graph_and_two_casts_are_at_its_ends(tmp_path):
    model = tiny_vit(depth=1)
    info = export_onnx(model, tmp_path / "m.onnx", precision="fp16")
    graph = onnx.load(tmp_path / "m.onnx").graph
    weights = [w for w in graph.initializer if w.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)]
    assert {w.data_type for w in weights} == {onnx.TensorProto.FLOAT16}
    assert info.nodes["Cast"] == 2
    assert next(model.parameters()).dtype == torch.float32  # the model itself stays what it was
    x = images(2)
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), model(x).detach(), rtol=0, atol=2e-2)  # 11 bits


def test_bf16_is_in_the_graph_and_two_casts_are_at_its_ends(tmp_path):
    model = tiny_vit(depth=1)
    info = export_onnx(model, tmp_path / "m.onnx", precision="bf16")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert info.opset == 22
    assert info.weights == {"bfloat16": sum(p.numel() for p in model.parameters()) + 1}  # and the scale of attention
    assert info.nodes["Cast"] == 2
    ends = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    assert ends == [onnx.TensorProto.FLOAT] * 2
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)  # every operator takes bf16 in this opset


def test_a_file_says_how_many_weights_are_in_which_format(dense):
    found = {prop.key: prop.value for prop in onnx.load(dense[1]).metadata_props}
    floats = [w for w in onnx.load(dense[1]).graph.initializer if w.data_type == onnx.TensorProto.FLOAT]
    counted = sum(math.prod(weight.dims) for weight in floats)
    assert json.loads(found["vitprune.weights"]) == dense[2].weights == {"float32": counted}


def test_attention_is_one_node_where_the_runtime_fuses_it():
    assert opset_for("fp32", "tensorrt_rtx") == 20  # its Attention does not build in fp32
    assert opset_for("fp16", "tensorrt_rtx") == opset_for("fp16", "tensorrt-rtx") == 23
    assert opset_for("fp16", "tensorrt", "10.13.3.9") == 20
    assert opset_for("fp16", "tensorrt", "10.14.1") == 23
    assert opset_for("fp16", "tensorrt") == 20
    assert opset_for("fp16", "onnxruntime") == 20
    assert opset_for("bf16", "tensorrt-rtx") == opset_for("bf16", "tensorrt", "11.4.0.106") == 23
    assert opset_for("bf16", "tensorrt", "10.3.0") == opset_for("bf16", "onnxruntime") == 22  # a Conv in bf16


def test_attention_is_onnx_runtimes_own_operator_where_that_was_faster():
    assert ort_attention("fp16", "onnxruntime", "cuda")
    assert ort_attention("fp16", "onnxruntime", "CUDAExecutionProvider")
    assert not ort_attention("fp32", "onnxruntime", "cuda")
    assert not ort_attention("fp16", "onnxruntime", "cpu")
    assert not ort_attention("fp16", "tensorrt", "cuda")


@pytest.mark.parametrize("method", [None, "evit", "psvit", "tome"])
def test_onnx_runtimes_attention_answers_as_five_nodes_do(method, tmp_path):
    model = tiny_vit(depth=3, **({"keep": {1: 30}, "reducer": method} if method else {}))
    nodes = export_onnx(model, tmp_path / "m.onnx", ort_attention=True).nodes
    masked = 1 if method == "tome" else 0  # tokens have sizes behind the block that merged them
    assert nodes["com.microsoft:MultiHeadAttention"] == 3 - masked
    assert nodes["Transpose"] <= 1 + 12 * bool(method)  # of the patches; the attention's cancel each other
    x = images(3)
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_part_with_onnx_runtimes_attention_takes_any_count_of_tokens(tmp_path):
    path = PieceFiles(tiny_vit(depth=1), tmp_path, 2, "fp32", "onnxruntime", ort_attention=True).attention(2)
    assert [node.op_type for node in onnx.load(path).graph.node].count("MultiHeadAttention") == 1
    for tokens in (50, 7):
        assert run(path, torch.randn(2, tokens, 32)).shape == (2, tokens, 32)


def test_half_a_block_exports_with_symbolic_tokens(tmp_path):
    class Half(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.norm, self.attn = block.norm1, block.attn

        def forward(self, x):
            return x + self.attn(*self.attn.project(self.norm(x)), None)

    half = Half(tiny_vit(depth=1).blocks[0]).eval()
    axes = [{0: Axis("batch", 1, 64), 1: Axis("tokens", 2, 1000)}]
    export_module(half, (torch.zeros(2, 50, 32),), tmp_path / "half.onnx", dynamic=axes, names=(["x"], ["y"]))
    graph = onnx.load(tmp_path / "half.onnx").graph
    assert shape(graph.input[0]) == shape(graph.output[0]) == ["batch", "tokens", 32]
    for size in ((1, 50), (3, 7)):
        x = torch.randn(*size, 32)
        torch.testing.assert_close(run(tmp_path / "half.onnx", x), half(x).detach(), rtol=1e-5, atol=1e-5)


class Bad(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def merge_by_scatter(x):
    index = x[:, :, :1].argsort(1).expand(-1, -1, x.shape[2])
    return torch.zeros_like(x).scatter_add(1, index, x)


def antialiased(x):
    return nn.functional.interpolate(x[:, None], size=(8, 8), mode="bilinear", antialias=True)


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: x[x > 0], "NonZero"),
        (merge_by_scatter, "ScatterElements"),
        (antialiased, "Resize"),
        (lambda x: x + torch.rand_like(x), "RandomUniformLike"),
    ],
)
def test_a_node_that_a_runtime_refuses_is_named(function, operator, tmp_path):
    axes = [{0: Axis("batch", 1, 8)}]
    with pytest.raises(NotSupported, match=rf"the node \w+ of type {operator}\b"):
        export_module(Bad(function), (torch.randn(2, 16, 4),), tmp_path / "m.onnx", dynamic=axes, names=(["x"], ["y"]))
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_an_axis_that_the_exporter_fixes_in_silence_is_an_error(tmp_path):
    def take(x):  # torch 2.14 exports this with the batch fixed to the example's
        return torch.take_along_dim(x, x[:, :, :1].argsort(1), 1)

    axes = [{0: Axis("batch", 1, 8)}]
    with pytest.raises(NotSupported, match="fixed batch"):
        export_module(Bad(take), (torch.randn(2, 16, 4),), tmp_path / "m.onnx", dynamic=axes, names=(["x"], ["y"]))


def test_what_cannot_be_exported_is_one_sentence(tmp_path):
    with pytest.raises(NotSupported, match=r"^Bad cannot be exported to ONNX: .+") as error:
        export_module(
            Bad(lambda x: x.masked_select(x > 0)),
            (torch.randn(2, 4),),
            tmp_path / "m",
            dynamic=[{}],
            names=(["x"], ["y"]),
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": (0, 4)}, "batch must range from at least 1 upwards, got 0 to 4"),
        ({"batch": (4, 2)}, "batch must range from at least 1 upwards, got 4 to 2"),
        ({"image_size": ((16, 30), 28)}, "height must be a multiple of the patch size 4, got 30"),
        ({"precision": "int3"}, "precision must be one of fp32, fp16, bf16, got 'int3'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_sentence(arguments, message, tmp_path):
    with pytest.raises(InputError) as error:
        export_onnx(tiny_vit(depth=1), tmp_path / "m.onnx", **arguments)
    assert str(error.value) == message


def test_exporting_is_silent_and_leaves_modes_and_logging_as_they_were(tmp_path, capfd, recwarn):
    model = tiny_vit(depth=1).train()
    model.blocks[0].eval()
    export_onnx(model, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert not recwarn
    assert model.training
    assert not model.blocks[0].training
    assert logging.root.manager.disable == 0


def test_weights_that_one_file_cannot_hold_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "EXTERNAL_DATA_FROM_BYTES", 1000)  # the real limit would take 2 GB
    model = tiny_vit(depth=1)
    info = export_onnx(model, tmp_path / "m.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert info.external_data == "m.onnx.data"
    assert info.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    torch.testing.assert_close(run(tmp_path / "m.onnx", images(2)), model(images(2)).detach(), rtol=1e-5, atol=1e-5)
