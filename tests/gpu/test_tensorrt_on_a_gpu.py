"""TensorRT for real: engines agree with torch, the inspector proves their precision, profiles switch, refits work."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from tiny import images, tiny_vit

from vitprune_deploy.backends.tensorrt import EngineOptions, Shapes, TensorRT, build_engine, refit_engine
from vitprune_deploy.export.islands import find_islands
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.export.parity import TOLERANCES

pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no NVIDIA GPU")
ONE = {"images": Shapes(*[(1, 3, 28, 28)] * 3)}
MANY = {"images": Shapes((2, 3, 28, 28), (4, 3, 28, 28), (8, 3, 28, 28))}


@pytest.fixture(scope="module", autouse=True)
def _tensorrt():
    pytest.importorskip("tensorrt")


def built(model, folder, precision="fp32", islands=(), **more):
    """The plan of ``model`` and its sidecar."""
    export_onnx(model, folder / "m.onnx", precision=precision, islands=islands)
    options = EngineOptions(
        **{"profiles": (ONE, MANY), "precision": precision, "timing_cache": folder / "cache"} | more
    )
    return folder / "m.plan", build_engine(folder / "m.onnx", folder / "m.plan", options)


@torch.no_grad()
def check(plan, model, precision):
    """At batches of both profiles, in turn."""
    with TensorRT.load(plan) as engine:
        for batch in (1, 4, 8, 1, 2):
            x = images(batch, seed=batch)
            wanted = model(x).numpy()
            limit = TOLERANCES[precision].output * np.abs(wanted).max()
            np.testing.assert_allclose(engine.run(x.numpy()), wanted, rtol=0, atol=max(limit, 5e-3))  # TF32 in fp32


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_answers_as_torch_in_every_profile_and_is_in_the_precision_asked_for(precision, tmp_path):
    model = tiny_vit(depth=3)
    plan, sidecar = built(model, tmp_path, precision)
    assert sidecar["census"]["proof"] == "inspector"
    assert sidecar["gpu"]["multiprocessors"] > 0
    assert sidecar["timing_cache"]["sha256"]
    check(plan, model, precision)


def test_islands_hold_what_fp16_cannot(tmp_path):
    model = tiny_vit(depth=3)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[3] = 1e5
    plan, _ = built(model, tmp_path, "fp16", find_islands(model, images(4)))
    check(plan, model, "fp16")


def test_a_refitted_engine_answers_as_the_model_that_its_weights_are_of(tmp_path):
    first, second = tiny_vit(depth=2), tiny_vit(depth=2, seed=1)
    plan, _ = built(first, tmp_path, refit=True)
    check(plan, first, "fp32")
    export_onnx(second, tmp_path / "second.onnx")
    refit_engine(plan, tmp_path / "second.onnx", tmp_path / "second.plan")
    check(tmp_path / "second.plan", second, "fp32")


@pytest.mark.parametrize("more", [{"version_compatible": True}, {"hardware_compatibility": "ampere_plus"}])
def test_engines_that_serve_more_answer_the_same(more, tmp_path):
    model = tiny_vit(depth=2)
    plan, _ = built(model, tmp_path, **more)
    check(plan, model, "fp32")
