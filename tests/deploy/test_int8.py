"""int8 recipes on a model with dynamic axes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from tiny import images, tiny_vit

from vitprune.surgery import reduce_tokens
from vitprune_deploy.backends.onnxruntime import OnnxRuntime
from vitprune_deploy.backends.tensorrt import EngineOptions, Shapes, build_engine
from vitprune_deploy.build.int8 import _decide
from vitprune_deploy.export.int8 import quantize, recipe_for
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.latency.protocol import Distribution, Percentile


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A token-pruned model as ONNX, and images for it."""
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    export_onnx(reduce_tokens(tiny_vit(depth=3), "evit", {1: 30}), path)
    return path, images(16).numpy()


def nodes(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def answers(path, batch):
    with OnnxRuntime.load(path, threads=1) as model:
        return model.run(batch)


@pytest.mark.parametrize("recipe", ["dynamic", "symmetric"])
def test_answers_are_nearly_those_of_fp32_at_any_batch(exported, tmp_path, recipe):
    path, batch = exported
    quantize(path, tmp_path / "int8.onnx", recipe, batch)
    for count in (1, 3, 16):
        found, wanted = answers(tmp_path / "int8.onnx", batch[:count]), answers(path, batch[:count])
        assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def test_dynamic_products_are_of_integers(exported, tmp_path):
    path, batch = exported
    quantize(path, tmp_path / "int8.onnx", "dynamic", batch)
    found = nodes(tmp_path / "int8.onnx")
    linear = 4 * 3 + 1  # qkv, proj, fc1 and fc2 of each block, and the head
    assert found["MatMulInteger"] == linear
    assert not found["Gemm"]


def test_symmetric_pairs_are_signed_and_leave_biases_alone(exported, tmp_path):
    path, batch = exported
    quantize(path, tmp_path / "int8.onnx", "symmetric", batch)
    model = onnx.load(tmp_path / "int8.onnx")
    points = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer if "zero_point" in one.name}
    assert points
    assert all(point.dtype == np.int8 and not point.any() for point in points.values())


@pytest.mark.parametrize("opset", [20, 23])
def test_pairs_go_into_a_graph_in_fp16_which_tensorrt_rtx_builds(exported, tmp_path, opset):
    _, batch = exported
    model = reduce_tokens(tiny_vit(depth=2), "evit", {1: 30})
    export_onnx(model, tmp_path / "half.onnx", precision="fp16", opset=opset)
    quantize(tmp_path / "half.onnx", tmp_path / "int8.onnx", "symmetric", batch)
    assert nodes(tmp_path / "int8.onnx")["QuantizeLinear"] > 8
    found, wanted = answers(tmp_path / "int8.onnx", batch), answers(tmp_path / "half.onnx", batch)
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    pytest.importorskip("tensorrt_rtx")
    shapes = Shapes((1, 3, 28, 28), (2, 3, 28, 28), (4, 3, 28, 28))
    options = EngineOptions(({"images": shapes},), module="tensorrt_rtx", compute_capabilities=("8.9",))
    built = build_engine(tmp_path / "int8.onnx", tmp_path / "int8.plan", options)
    assert built["census"]["network"]["tensors"]["float16"] > built["census"]["network"]["tensors"]["float32"]


def test_an_old_processor_gets_weights_that_cannot_overflow_its_products(exported, tmp_path):
    path, batch = exported
    quantize(path, tmp_path / "old.onnx", "dynamic", batch, frozenset({"avx2"}))
    quantize(path, tmp_path / "new.onnx", "dynamic", batch, frozenset({"avx2", "avx512_vnni"}))
    largest = {}
    for name in ("old", "new"):
        weights = [onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / f"{name}.onnx").graph.initializer]
        largest[name] = max(int(np.abs(one.astype(np.int32)).max()) for one in weights if one.dtype == np.int8)
    assert largest == {"old": 64, "new": 127}


@pytest.mark.parametrize(
    ("runtime", "provider", "recipe"),
    [
        ("onnxruntime", "cpu", "dynamic"),
        ("onnxruntime", "openvino", "nncf"),
        ("onnxruntime", "OpenVINOExecutionProvider", "nncf"),
        ("onnxruntime", "tensorrt", "symmetric"),
        ("tensorrt-rtx", "cpu", "symmetric"),
    ],
)
def test_each_runtime_has_its_recipe(runtime, provider, recipe):
    assert recipe_for(runtime, provider) == recipe


def timed(value_ms, half=0.1):
    found = Percentile(value_ms, value_ms - half, value_ms + half)
    return Distribution("one", {50: found}, {50: value_ms}, 1000, (), 0, True, 1.0, 0.0)


@pytest.mark.parametrize(
    ("before", "after", "missed", "kept", "why"),
    [
        (10.0, 5.0, [], True, "p50 went from 10 to 5 ms, and the floors hold"),
        (10.0, 9.85, [], False, "it is not faster, p50 went from 10 to 9.85 ms"),
        (10.0, 12.0, ["top-1 fell"], False, "it is not faster, p50 went from 10 to 12 ms"),
        (10.0, 5.0, ["top-1 fell"], False, "top-1 fell (p50 went from 10 to 5 ms)"),
    ],
)
def test_it_is_kept_where_it_is_faster_beyond_doubt_and_holds_the_floors(before, after, missed, kept, why):
    found = _decide(50, (timed(before), timed(after)), missed)
    assert (found["kept"], found["why"]) == (kept, why)


def test_too_few_runs_decide_nothing():
    unknown = replace(timed(5.0), percentiles={})
    assert not _decide(50, (timed(10.0), unknown), [])["kept"]
