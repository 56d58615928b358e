from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitprune import parts
from vitprune.errors import DamagedFile, InputError, MissingError, NotSupported
from vitprune_deploy.backends import onnxruntime as backend
from vitprune_deploy.backends.base import Backend, TensorSpec
from vitprune_deploy.backends.onnxruntime import OnnxRuntime


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """images [batch, 3] @ a 3 x 2 matrix = logits [batch, 2]."""
    weight = numpy_helper.from_array(np.array([[1, 0], [0, 2], [3, 0]], np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["images", "w"], ["logits"])],
        "toy",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file = tmp_path_factory.mktemp("ort") / "toy.onnx"
    onnx.save(model, file)
    return file


def test_the_folder_offers_onnxruntime_by_its_file_name():
    assert parts.load("vitprune_deploy.backends", "onnxruntime", Backend) is OnnxRuntime


def test_a_batch_of_any_size_gives_the_product_computed_by_hand(path):
    with OnnxRuntime.load(path, threads=1) as model:
        assert model.inputs == (TensorSpec("images", ("batch", 3), "float32"),)
        assert model.outputs == (TensorSpec("logits", ("batch", 2), "float32"),)
        assert model.provider == "cpu"
        assert model.runtime.startswith("onnxruntime 1.")
        images = np.array([[1, 1, 1], [0, 1, 0], [2, 0, 1]], np.float32)
        np.testing.assert_array_equal(model.run(images), [[4, 2], [0, 2], [5, 0]])
        np.testing.assert_array_equal(model.run(images[:1]), [[4, 2]])


def test_a_bound_run_takes_measurable_time_and_can_be_repeated(path):
    with OnnxRuntime.load(path, threads=1, batch=2) as model:
        times_ms = model.time_ms({"images": np.ones((2, 3), np.float32)}, runs=5)
    assert len(times_ms) == 5
    assert all(0 < t < 10_000 for t in times_ms)


def test_a_fixed_batch_is_the_only_one_that_runs(path):
    with OnnxRuntime.load(path, batch=2) as model:
        assert model.run(np.ones((2, 3), np.float32)).shape == (2, 2)
        with pytest.raises(InputError, match=r"input images must be float32 \[2, 3\], got float32 \[3, 3\]"):
            model.run(np.ones((3, 3), np.float32))


def test_free_dimensions_can_be_fixed_by_name(path):
    with OnnxRuntime.load(path, options={"sizes": {"batch": 4}}) as model:
        assert model.inputs[0].shape == (4, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="thread ids come from /proc")
def test_the_pool_threads_of_a_session_are_known(path):
    with OnnxRuntime.load(path, threads=3) as model:
        assert len(model.thread_ids()) == 2  # the caller is the third
    with OnnxRuntime.load(path, threads=1) as model:
        assert model.thread_ids() == []


def test_images_of_another_shape_or_type_are_refused_with_both_named(path):
    with OnnxRuntime.load(path) as model:
        with pytest.raises(InputError, match=r"must be float32 \[batch, 3\], got float64 \[1, 3\]"):
            model.run(np.ones((1, 3)))
        with pytest.raises(InputError, match=r"got float32 \[1, 4\]"):
            model.run(np.ones((1, 4), np.float32))
        with pytest.raises(InputError, match="inputs are images, got x"):
            model.bind({"x": np.ones((1, 3), np.float32)})


@pytest.mark.parametrize("content", [b"", b"this is no model", "half"])
def test_a_truncated_or_foreign_file_is_damaged(path, tmp_path, content):
    file = tmp_path / "broken.onnx"
    file.write_bytes(path.read_bytes()[:60] if content == "half" else content)
    with pytest.raises(DamagedFile, match=r"broken\.onnx is cut off or not an ONNX model"):
        OnnxRuntime.load(file)


def test_an_operator_without_a_kernel_is_not_supported(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Det", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, [])],
    )
    file = tmp_path / "det.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    with pytest.raises(NotSupported, match="no kernel"):
        OnnxRuntime.load(file)


def test_a_missing_file_and_an_unknown_option_are_the_users(path, tmp_path):
    with pytest.raises(InputError, match="there is no such model file"):
        OnnxRuntime.load(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="no option 'porvider', it has provider"):
        OnnxRuntime.load(path, options={"porvider": "cpu"})
    with pytest.raises(InputError, match="no execution provider 'cdua'"):
        OnnxRuntime.load(path, options={"provider": "cdua"})


def test_a_provider_that_this_package_lacks_names_the_one_that_has_it(path):
    if "CUDAExecutionProvider" in backend._import().get_available_providers():
        pytest.skip("this is the GPU package")
    with pytest.raises(MissingError, match="pip install onnxruntime-gpu"):
        OnnxRuntime.load(path, options={"provider": "cuda"})


def test_two_packages_of_onnxruntime_at_once_are_refused(path, tmp_path, monkeypatch):
    for name in ("onnxruntime", "onnxruntime_gpu"):  # what pip would leave: two metadata folders, one package
        info = tmp_path / f"{name}-1.31.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert metadata.version("onnxruntime-gpu") == "1.31.1"
    with pytest.raises(MissingError, match="onnxruntime and onnxruntime-gpu are both installed"):
        OnnxRuntime.load(path)


def test_a_closed_model_may_be_closed_again(path):
    model = OnnxRuntime.load(path)
    model.close()
    model.close()


def test_a_node_that_the_cpu_runs_in_place_of_a_gpu_is_refused_by_name(path):
    ort = backend._import()
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime does not tell; it refuses such a session itself")
    options = backend._session_options(1, {}, "CUDAExecutionProvider", strict=True)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    with pytest.raises(NotSupported, match=r"CUDAExecutionProvider does not take the node .* of type MatMul"):
        backend._refuse_cpu_nodes(path, session, "CUDAExecutionProvider")


@pytest.mark.parametrize(("on_cpu", "refused"), [(["Shape", "Gather", "Concat", "Range"], False), (["TopK"], True)])
def test_arithmetic_on_sizes_may_run_on_the_cpu(path, on_cpu, refused):
    def part(name, types):
        nodes = [SimpleNamespace(name=f"a {kind}", op_type=kind) for kind in types]
        return SimpleNamespace(ep_name=name, get_nodes=lambda: nodes)

    parts_ = [part("CUDAExecutionProvider", ["TopK", "MatMul"]), part("CPUExecutionProvider", on_cpu)]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts_)
    with pytest.raises(NotSupported, match="a TopK") if refused else nullcontext():
        backend._refuse_cpu_nodes(path, session, "CUDAExecutionProvider")
