"""OpenVINO as a provider from a package of its own, where that is installed; and what is said where it is not."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from outputs import token_pruned

from vitprune.errors import DamagedFile, InputError, MissingError
from vitprune_deploy.backends import _ort_plugins as plugins
from vitprune_deploy.backends import onnxruntime as backend
from vitprune_deploy.backends.onnxruntime import OnnxRuntime
from vitprune_deploy.build import make
from vitprune_deploy.latency.fingerprint import device_fingerprint
from vitprune_deploy.profile import load_profile


def why_not():
    """Why OpenVINO does not run here; empty where it does."""
    if not plugins.is_installed(plugins.OPENVINO):
        return "onnxruntime-ep-openvino is not installed"
    try:
        plugins.devices(plugins.OPENVINO)
    except MissingError as error:
        return str(error)
    return ""


here = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A token-pruned model as ONNX, images for it and the CPU provider's answers."""
    return token_pruned(tmp_path_factory.mktemp("plugins"), 5)


def openvino(precision, **more):
    given = plugins.precision_options(precision) | more
    return {"provider": "openvino", "provider_options": given}


@here
def test_openvino_computes_what_the_cpu_provider_does_at_any_batch(exported):
    path, batch, wanted = exported
    with OnnxRuntime.load(path, threads=1, options=openvino("fp32")) as model:
        assert model.provider == "openvino"
        for count in (5, 1, 3):
            np.testing.assert_allclose(model.run(batch[:count]), wanted[:count], atol=1e-4)


@here
def test_the_precision_asked_for_is_the_one_that_computes(exported):
    path, batch, wanted = exported
    errors = {}
    for precision in ("fp32", "bf16"):
        with OnnxRuntime.load(path, threads=1, options=openvino(precision)) as model:
            errors[precision] = np.abs(model.run(batch) - wanted).max()
    assert errors["fp32"] < 1e-4
    if {"amx_bf16", "avx512_bf16"} & set(device_fingerprint("none")["flags"]):
        assert 1e-3 < errors["bf16"] < 0.1 * np.abs(wanted).max()


@here
def test_a_compiled_file_gives_the_same_answers_and_needs_no_graph(exported, tmp_path):
    path, batch, wanted = exported
    OnnxRuntime.compile(path, tmp_path / "compiled.onnx", threads=1, options=openvino("fp32"))
    assert [node.op_type for node in onnx.load(tmp_path / "compiled.onnx").graph.node] == ["EPContext"]
    with OnnxRuntime.load(tmp_path / "compiled.onnx", threads=1, options=openvino("fp32")) as model:
        np.testing.assert_allclose(model.run(batch), wanted, atol=1e-4)
        np.testing.assert_allclose(model.run(batch[:2]), wanted[:2], atol=1e-4)


@here
def test_a_build_compiles_its_product_where_the_profile_asks_for_it(exported, tmp_path):
    path, batch, wanted = exported
    (tmp_path / "model.onnx").write_bytes(path.read_bytes())
    (tmp_path / "images").mkdir()
    (tmp_path / "p.yaml").write_text(
        "model: {name: vit_tiny_patch16_224}\ndata: {source: images}\nbudget: {speedup: 2, threads: 1}\n"
        "accuracy: {min_agreement: 90}\nruntime: {provider: openvino, compiled: true}\n"
    )
    shows = SimpleNamespace(progress=lambda *done: None)
    bench = SimpleNamespace(profile=load_profile(tmp_path / "p.yaml"), folders={"export": tmp_path}, shows=shows)
    entry = make._compile(bench, tmp_path)
    with OnnxRuntime.load(tmp_path / entry["file"], threads=1, options=openvino("fp32")) as model:
        np.testing.assert_allclose(model.run(batch), wanted, atol=1e-4)


@here
def test_a_device_that_is_not_here_and_a_damaged_file_are_a_sentence(exported, tmp_path):
    path, *_ = exported
    with pytest.raises(InputError, match="OpenVINO has no device 'NPU' here, it has CPU"):
        OnnxRuntime.load(path, options=openvino("fp32", device_type="NPU"))
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedFile, match=r"cut\.onnx is cut off or not an ONNX model"):
        OnnxRuntime.load(tmp_path / "cut.onnx", options=openvino("fp32"))


def test_threads_go_where_the_plugin_looks_for_them():
    given = plugins.precision_options("bf16")["load_config"]
    assert json.loads(plugins._with_threads(given, "CPU", 2)) == {
        "CPU": {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": "2"}
    }
    own = '{"CPU": {"INFERENCE_NUM_THREADS": "7"}}'
    assert json.loads(plugins._with_threads(own, "CPU", 2)) == json.loads(own)
    for wrong in ("no JSON", "[]", '{"CPU": 3}'):
        with pytest.raises(InputError, match="load_config must be a JSON object"):
            plugins._with_threads(wrong, "CPU", 2)


@here
def test_no_more_threads_work_than_were_asked_for(exported):
    """Processor time of a run against its duration; on a machine with two processors or more."""
    path, batch, _ = exported
    many = np.repeat(batch, 200, axis=0)
    with OnnxRuntime.load(path, threads=1, options=openvino("fp32")) as model:
        model.run(many)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(5):
            model.run(many)
        assert time.process_time() - cpu < 1.4 * (time.perf_counter() - wall)


@pytest.mark.skipif(not why_not().startswith("OpenVINOExecutionProvider"), reason="OpenVINO runs here, or is not here")
def test_a_processor_that_openvino_does_not_serve_is_a_sentence(exported):
    for _ in range(2):  # the library is loaded once
        with pytest.raises(MissingError, match="OpenVINOExecutionProvider runs on Intel's processors and GPUs alone"):
            OnnxRuntime.load(exported[0], options=openvino("fp32"))


@pytest.mark.parametrize("provider", ["openvino", "tensorrt-rtx"])
def test_a_package_that_is_missing_is_named(exported, provider, monkeypatch):
    monkeypatch.setattr(plugins, "find_spec", lambda name: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])  # one stays loaded
    package = plugins.PLUGINS[backend.PROVIDERS[provider]].distribution
    with pytest.raises(MissingError, match=f"pip install {package}"):
        OnnxRuntime.load(exported[0], options={"provider": provider})


def test_what_the_cpu_provider_runs_is_not_compiled(exported, tmp_path):
    with pytest.raises(InputError, match="cpu compiles nothing ahead of time"):
        OnnxRuntime.compile(exported[0], tmp_path / "compiled.onnx")
    assert not (tmp_path / "compiled.onnx").exists()
