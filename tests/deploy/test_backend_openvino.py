"""OpenVINO by itself, where it is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
from outputs import token_pruned

from vitprune import parts
from vitprune.errors import DamagedFile, InputError, MissingError, NotSupported
from vitprune_deploy.backends import _onnx_file
from vitprune_deploy.backends import openvino as backend
from vitprune_deploy.backends.base import Backend, TensorSpec
from vitprune_deploy.backends.openvino import OpenVino

here = pytest.mark.skipif(not find_spec("openvino"), reason="openvino is not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A token-pruned model as ONNX, images for it and ONNX Runtime's answers."""
    return token_pruned(tmp_path_factory.mktemp("openvino"), 5)


@here
def test_the_folder_offers_openvino_by_its_file_name():
    assert parts.load("vitprune_deploy.backends", "openvino", Backend) is OpenVino


@here
def test_answers_are_those_of_onnxruntime_at_any_batch(exported):
    path, batch, wanted = exported
    with OpenVino.load(path, threads=1) as model:
        assert model.inputs == (TensorSpec("images", ("batch", 3, 28, 28), "float32"),)
        assert model.outputs[0].shape[1:] == (10,)
        assert model.provider == "cpu"
        assert model.runtime.startswith("openvino 20")
        for count in (5, 1, 3):
            np.testing.assert_allclose(model.run(batch[:count]), wanted[:count], atol=1e-4)


@here
def test_the_precision_asked_for_is_the_one_that_computes(exported):
    path, batch, wanted = exported
    try:
        with OpenVino.load(path, threads=1, options={"precision": "bf16"}) as model:
            error = np.abs(model.run(batch) - wanted).max()
    except NotSupported as error:
        pytest.skip(str(error))
    assert 1e-3 < error < 0.2 * np.abs(wanted).max()


@here
def test_a_bound_run_is_timed_and_can_be_repeated(exported):
    path, batch, _ = exported
    with OpenVino.load(path, threads=2, batch=2) as model:
        times_ms = model.time_ms({"images": batch[:2]}, runs=5)
        assert len(times_ms) == 5
        assert all(0 < t < 10_000 for t in times_ms)
        if sys.platform == "linux":
            assert model.thread_ids()


@here
def test_free_sizes_are_fixed_by_name(exported):
    path, batch, wanted = exported
    with OpenVino.load(path, options={"sizes": {"batch": 2}}) as model:
        assert model.inputs[0].shape == (2, 3, 28, 28)
        np.testing.assert_allclose(model.run(batch[:2]), wanted[:2], atol=1e-4)
        with pytest.raises(InputError, match=r"must be float32 \[2, 3, 28, 28\], got float32 \[3, 3, 28, 28\]"):
            model.run(batch[:3])


@here
def test_what_cannot_be_meant_is_a_sentence(exported, tmp_path):
    path, *_ = exported
    with pytest.raises(InputError, match="there is no such model file"):
        OpenVino.load(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="openvino has no option 'precission'"):
        OpenVino.load(path, options={"precission": "fp32"})
    with pytest.raises(InputError, match="openvino computes in fp32, bf16, fp16, got 'int4'"):
        OpenVino.load(path, options={"precision": "int4"})
    with pytest.raises(MissingError, match="OpenVINO has no device 'NPU' here"):
        OpenVino.load(path, options={"device": "NPU"})
    if "FP16" not in backend._import().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(NotSupported, match="CPU has no units for fp16 here"):
            OpenVino.load(path, options={"precision": "fp16"})
    for content in (b"", b"this is no model", path.read_bytes()[:1000]):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(DamagedFile, match=r"broken\.onnx is cut off or not a model"):
            OpenVino.load(tmp_path / "broken.onnx")


def test_the_axes_of_a_file_are_read_without_the_package_onnx(exported, tmp_path):
    path, *_ = exported
    assert _onnx_file.axes(path) == {"images": ("batch", 3, 28, 28)}
    assert _onnx_file.metadata(path)["precision"] == "fp32"
    content = path.read_bytes()
    for length in (0, 10, 1000, len(content) // 2):
        (tmp_path / "cut.onnx").write_bytes(content[:length])
        assert _onnx_file.axes(tmp_path / "cut.onnx") in ({}, {"images": ("batch", 3, 28, 28)})
