"""Plans with other heads, dims and widths in every block, through the runtimes, at any batch."""

from __future__ import annotations

from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch
from tiny import images, tiny_vit

from vitprune.model.vit import Vit
from vitprune.plan import BlockPlan
from vitprune.surgery import dense_plan, prune
from vitprune_deploy.backends.tensorrt import EngineOptions, Shapes, build_engine
from vitprune_deploy.export.onnx import export_onnx

FORBIDDEN = {"NonZero", "If", "Loop", "Scan", "Where", "ScatterND", "Unique"}


@pytest.fixture(scope="module")
def narrow() -> Vit:
    """Three heads with dqk > dv, an MLP alone, one head with dqk < dv, and no block; on 24 of 32 channels."""
    model = tiny_vit(depth=4)
    blocks = (
        BlockPlan((0, 2, 3), tuple(range(40)), None, ((0, 1, 2, 5, 6),) * 3, ((1, 2, 3), (0, 4, 5), (5, 6, 7))),
        BlockPlan((), tuple(range(0, 64, 3))),
        BlockPlan((1,), (), None, ((0, 7),), ((1, 3, 4, 5, 6, 7),)),
        BlockPlan((), ()),
    )
    return prune(model, replace(dense_plan(model), blocks=blocks, embed=tuple(range(24))))


@pytest.fixture(scope="module")
def exported(narrow, tmp_path_factory):
    path = tmp_path_factory.mktemp("narrow") / "model.onnx"
    export_onnx(narrow, path)
    return path


def test_onnxruntime_answers_as_torch_does_at_any_batch(narrow, exported):
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    for batch in (1, 3, 64):
        (found,) = session.run(None, {"images": images(batch).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), narrow(images(batch)).detach(), rtol=0, atol=1e-4)


def test_widths_are_constants_of_a_graph_without_control_flow(exported):
    graph = onnx.load(exported).graph
    assert FORBIDDEN.isdisjoint({node.op_type for node in graph.node})
    shapes = {tuple(sorted(weight.dims)) for weight in graph.initializer}
    assert {(24, 39), (9, 24), (22, 24), (6, 24), (10, 24)} <= shapes  # qkv and proj of block 0, fc1 of 1, proj of 2


def test_tensorrt_rtx_builds_it(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    sizes = {"images": Shapes((1, 3, 28, 28), (4, 3, 28, 28), (8, 3, 28, 28))}
    sidecar = build_engine(exported, tmp_path / "m.plan", EngineOptions(profiles=(sizes,), module="tensorrt_rtx"))
    assert (tmp_path / "m.plan").stat().st_size > 0
    assert sidecar["runtime"] == "tensorrt_rtx"
