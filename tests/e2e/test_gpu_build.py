"""A whole build for ONNX Runtime's CUDA provider, on a machine that has it."""

from __future__ import annotations

import numpy as np
import pytest

from vitprune_deploy.build import build
from vitprune_deploy.console import Console
from vitprune_deploy.profile import load_profile
from vitprune_deploy.runtime import load

pytestmark = [pytest.mark.e2e, pytest.mark.alone]


def test_a_whole_build_for_the_gpu(profile_path, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built without CUDA")
    profile = load_profile(profile_path, ["runtime.provider=cuda"])
    manifest = build(profile, tmp_path / "out", Console(quiet=True))
    # so small a model is all calls, whose times jump: what is missed may only be time
    assert manifest.verdict != "fail" or all("latency" in reason for reason in manifest.reasons), manifest.reasons
    assert manifest.device["provider"] == "cuda"
    with load(tmp_path / "out") as model:
        assert model.predict(np.zeros((2, 32, 32, 3), np.uint8)).logits.shape == (2, 3)
