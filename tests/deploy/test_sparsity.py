"""2:4 on the way into an engine: the exported file is looked at, and TensorRT-RTX really builds from it.

Lines of builders' logs and inspectors' texts are of the forms that TensorRT 8 and 10 write and that others have
published; which kernels a builder takes needs a GPU.
"""

from __future__ import annotations

import json
import re
import zlib
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from tiny import images, tiny_vit

from vitprune.errors import NotSupported
from vitprune_deploy.backends import _trt_refit, _trt_sparse
from vitprune_deploy.backends._trt_common import Refused, logger
from vitprune_deploy.backends.tensorrt import EngineOptions, Shapes, build_engine, sidecar_path
from vitprune_deploy.export.int8 import quantize
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.export.sparsity import check_pattern, compressed_bytes, products
from vitprune_deploy.remote import trtexec
from vitprune_deploy.remote._trtexec_log import Version

MLP = [f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("fc1", "fc2")]
ALL = [f"blocks.{i}.attn.{name}" for i in range(2) for name in ("qkv", "proj")] + MLP
SHAPES = ({"images": Shapes((1, 3, 28, 28), (4, 3, 28, 28), (8, 3, 28, 28))},)


@torch.no_grad()
def two_of_four(model, layers, axis=1):
    """Zero the first two of every four weights along an axis of [out, in]."""
    for name in layers:
        weight = model.get_submodule(name).weight
        places = torch.arange(weight.shape[axis]) % 4 >= 2
        weight *= places if axis == 1 else places[:, None]
    return model


@pytest.fixture(scope="module")
def sparse():
    """A model that is pruned in tokens too, whose last block computes the class token alone from cut-out weights."""
    model = tiny_vit(keep={0: 20, 1: 0}, reducer="evit")
    return two_of_four(model, ALL)


@pytest.fixture(scope="module")
def exported(sparse, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("sparse"), {}

    def export(precision="fp32", opset=None):
        if (precision, opset) not in made:
            path = folder / f"model.{precision}.{opset}.onnx"
            export_onnx(sparse, path, precision=precision, opset=opset)
            made[precision, opset] = path
        return made[precision, opset]

    return export


# ---- the exported file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "opset"), [("fp32", None), ("fp16", 20), ("fp16", 23), ("bf16", 22)])
def test_the_pattern_is_found_in_every_precision_and_in_weights_that_were_cut_out(exported, precision, opset):
    held = check_pattern(exported(precision, opset), ALL)
    assert len(held) == 9  # the last block's qkv is two: queries, and keys with values
    assert {layer.zeros for layer in held} == {0.5}
    assert {(layer.inputs, layer.outputs) for layer in held if "fc2" in layer.node} == {(64, 32)}


def test_the_pattern_is_found_between_quantize_and_dequantize(exported, tmp_path):
    path = tmp_path / "int8.onnx"
    quantize(exported(), path, "symmetric", images(2).numpy())
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)
    assert len(check_pattern(path, ALL)) == 9


def test_whole_numbers_are_zero_where_their_zero_point_is(tmp_path):
    stored = np.full((8, 2), 7, np.int8)
    stored[::4] = stored[1::4] = 3  # what stands for zero
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["wide"], axis=1),
        helper.make_node("MatMul", ["x", "wide"], ["y"], name="blocks.0.mlp.fc1/MatMul_0"),
    ]
    constants = {"w": stored, "scale": np.ones(2, np.float32), "zero": np.full(2, 3, np.int8)}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", 1, [1, 8])], [value("y", 1, [1, 2])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "q.onnx")
    assert [layer.zeros for layer in check_pattern(tmp_path / "q.onnx", ["blocks.0.mlp.fc1"])] == [0.5]


def edited(source, target, name, edit):
    """The exported file with the weights [in, out] of a module's product changed."""
    model = onnx.load(source)
    (weights,) = (node.input[1] for node in model.graph.node if node.name.startswith(f"{name}/MatMul"))
    held = next(one for one in model.graph.initializer if one.name == weights)
    held.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(held).copy()), weights))
    onnx.save(model, target)
    return target


def filled(weights):
    weights[8:11, 5] = 1.0
    return weights


@pytest.mark.parametrize(
    ("edit", "lack"),
    [
        (filled, "in 1 of 512 groups of four weights along its inputs more than two are not zero"),
        (lambda w: w.reshape(64, 2, 16)[:, :1].repeat(2, 1).reshape(64, 32), None),  # other zeros, still two of four
        (lambda w: np.where(np.arange(32) % 4 >= 2, np.float32(1), np.float32(0)) * np.ones((64, 1), np.float32),
         "in 256 of 512 groups"),  # along the outputs it is none
        (lambda w: w[:62], "its 62 inputs are no multiple of 4"),
    ],
)  # fmt: skip
def test_a_layer_in_which_the_pattern_does_not_hold_is_named(exported, tmp_path, edit, lack):
    path = edited(exported(), tmp_path / "model.onnx", "blocks.1.mlp.fc2", edit)
    assert check_pattern(path, MLP[:3])
    if lack is None:
        assert check_pattern(path, MLP)
        return
    with pytest.raises(NotSupported, match=rf"model\.onnx: blocks\.1\.mlp\.fc2 was to be 2:4, and {lack}"):
        check_pattern(path, MLP)


def test_a_layer_that_is_not_there_is_a_sentence(exported):
    with pytest.raises(NotSupported, match=r"no product with constant weights for blocks\.3\.mlp\.fc1"):
        check_pattern(exported(), ["blocks.3.mlp.fc1"])


def test_products_of_activations_are_none_of_weights(exported):
    assert {re.sub(r"_\d+$", "", layer.node) for layer in products(exported())} == {
        *(f"{name}/MatMul" for name in ALL if name != "blocks.1.attn.qkv"), "blocks.1/MatMul", "head/Gemm",
    }  # fmt: skip


def test_files_are_compressed_together(tmp_path):
    parts = {"a": bytes(3_000_000), "b": np.random.default_rng(0).bytes(50_000)}
    for name, data in parts.items():
        (tmp_path / name).write_bytes(data)
    assert compressed_bytes([tmp_path / name for name in parts]) == sum(
        len(zlib.compress(d, 6)) for d in parts.values()
    )


# ---- the builder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "opset"), [("fp32", None), ("fp16", 23)])
def test_an_rtx_engine_is_allowed_sparse_kernels_and_its_layers_are_listed(exported, tmp_path, precision, opset):
    pytest.importorskip("tensorrt_rtx")
    options = EngineOptions(SHAPES, module="tensorrt_rtx", sparse=True)
    sidecar = build_engine(exported(precision, opset), tmp_path / "model.plan", options)
    assert sidecar["flags"] == ["SPARSE_WEIGHTS"]
    found = sidecar["sparse"]
    assert {name.partition("/")[0] for name in found["fitting"]} >= {*MLP, "blocks.0.attn.qkv"}
    assert not any(name.startswith("head") for name in found["fitting"])
    if sidecar["gpu"] is None:  # it chooses kernels where it runs
        assert (found["used"], found["proof"]) == (None, None)


def test_an_engine_that_was_not_to_be_sparse_says_nothing_of_it(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    sidecar = build_engine(exported(), tmp_path / "model.plan", EngineOptions(SHAPES, module="tensorrt_rtx"))
    assert (sidecar["flags"], sidecar["sparse"]) == ([], None)


def test_a_tensorrt_without_the_flag_is_a_sentence():
    old = SimpleNamespace(__version__="7.0", BuilderFlag=SimpleNamespace(__members__={}))
    with pytest.raises(Refused, match=r"7\.0 has no SPARSE_WEIGHTS; leave the pattern 2:4 out"):
        _trt_sparse.allow(old, None)


OLD = [
    "(Sparsity) Layers eligible for sparse math: Conv_22, MatMul_51",
    "(Sparsity) TRT inference plan picked sparse implementation for layers: MatMul_51",
]
NEW = [
    "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b, c",
    "(Sparsity) Chose 2 layer(s) using sparse tactics: a, b",
    "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b",
    "(Sparsity) Chose 1 layer(s) using sparse tactics: b",
]
NONE = [OLD[0], "(Sparsity) TRT inference plan picked sparse implementation for layers:"]
WITHOUT_NAMES = [
    "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
    "(Sparsity) Chose 0 layer(s) using sparse tactics",
]


@pytest.mark.parametrize(
    ("lines", "eligible", "used", "names", "proof"),
    [
        (OLD, 2, 1, ["MatMul_51"], "log"),
        (NEW, 2, 1, ["b"], "log"),
        (NONE, 2, 0, [], "log"),
        (WITHOUT_NAMES, 39, 0, [], "log"),
        (["something else"], None, None, [], None),
    ],
)  # fmt: skip
def test_the_builders_log_is_read(lines, eligible, used, names, proof):
    found = _trt_sparse.account(lines)
    assert found == {"fitting": None, "eligible": eligible, "used": used, "names": names, "proof": proof}


def test_a_sparse_kernel_in_the_engine_is_proof_and_a_dense_one_is_not():
    layers = [
        {"Name": "fc1", "TacticName": "sm80_xmma_sparse_gemm_f16f16_f16f32_f16_tn_n_tilesize128x128x64"},
        {"Name": "fc2", "TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n"},
        "a name alone",
    ]
    found = _trt_sparse.account(NONE, ["fc1", "fc2"], json.dumps({"Layers": layers}))
    assert (found["used"], found["names"], found["proof"]) == (1, ["fc1"], "inspector")
    assert _trt_sparse.account(NEW, [], json.dumps({"Layers": layers[1:]}))["proof"] == "log"


@pytest.mark.parametrize(
    ("layers", "used", "proof"),
    [
        ([{"Name": "fc2", "TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n"}, "a name alone"], 0, "inspector"),
        ([{"Name": "fc2"}, {"Name": "fc1", "TacticName": ""}, "a name alone"], None, None),
    ],
)
def test_dense_kernels_alone_are_proof_where_the_log_is_silent(layers, used, proof):
    found = _trt_sparse.account([], ["fc1"], json.dumps({"Layers": layers}))
    assert (found["used"], found["names"], found["proof"]) == (used, [], proof)


# ---- new weights --------------------------------------------------------------------------------------------------


def test_an_engine_that_skips_zeros_takes_no_weights_without_them(exported, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")  # parses without a GPU
    plan, log = tmp_path / "model.plan", logger(trt)
    crowded = str(edited(exported(), tmp_path / "crowded.onnx", "blocks.1.mlp.fc2", filled))
    fitting = [layer.node for layer in products(exported()) if layer.fits]
    for used in (2, None):  # None: nobody knows
        sidecar_path(plan).write_text(json.dumps({"sparse": {"used": used, "fitting": fitting}}))
        _trt_refit.check_zeros(trt, log, plan, str(exported()))
        with pytest.raises(Refused, match=r"take the weights: those of blocks\.1\.mlp\.fc2/MatMul_\d+ are not 2:4"):
            _trt_refit.check_zeros(trt, log, plan, crowded)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(Refused, match=r"cannot read .*bad\.onnx"):
        _trt_refit.check_zeros(trt, log, plan, str(tmp_path / "bad.onnx"))


@pytest.mark.parametrize("said", [{"sparse": {"used": 0, "fitting": ["a"]}}, {"sparse": None}, {}])
def test_an_engine_that_skips_no_zeros_takes_any_weights(tmp_path, said):
    sidecar_path(tmp_path / "model.plan").write_text(json.dumps(said))
    _trt_refit.check_zeros(None, None, tmp_path / "model.plan", "never read")


def test_trtexec_is_allowed_sparse_kernels_as_the_weights_are():
    asked = trtexec.build_arguments("trtexec", Version(10, 3, 0), "m.onnx", "m.plan", SHAPES, sparse=True)
    assert "--sparsity=enable" in asked  # 'force' would change the weights
    assert not any("sparsity" in one for one in trtexec.build_arguments("trtexec", Version(10, 3, 0), "m", "p", SHAPES))
