"""What only a machine with an NVIDIA GPU can run: CUDA's buffers for real, ONNX Runtime's CUDA provider, training."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tiny import images, tiny_vit

from vitprune import parts
from vitprune.errors import MissingError, NotSupported
from vitprune.recover import Batch, RecoverSettings, recover
from vitprune_deploy.backends._cuda import KINDS, open_cuda
from vitprune_deploy.backends.onnxruntime import OnnxRuntime
from vitprune_deploy.export.onnx import export_onnx

pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no NVIDIA GPU")
EXACT = {"provider": "cuda", "provider_options": {"use_tf32": "0"}}  # TF32 multiplies 10 bits of the mantissa


@pytest.fixture(params=sorted(KINDS))
def cuda(request):
    pytest.importorskip(request.param)
    return open_cuda(request.param)


@pytest.fixture
def cuda_provider():
    """ONNX Runtime's package for GPUs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built without CUDA")


def test_bytes_go_to_the_gpu_and_come_back(cuda):
    assert cuda.device().memory_bytes > 1e9
    sent, got = cuda.pinned((1000,), np.dtype(np.float32)), cuda.pinned((1000,), np.dtype(np.float32))
    sent[:], got[:] = np.arange(1000), 0
    address, stream = cuda.allocate(sent.nbytes), cuda.stream()
    first, last = cuda.event(), cuda.event()
    cuda.record(first, stream)
    cuda.copy_in(address, sent, stream)
    cuda.copy_out(got, address, stream)
    cuda.record(last, stream)
    cuda.synchronize(stream)
    np.testing.assert_array_equal(sent, got)
    assert 0 < cuda.elapsed_ms(first, last) < 1000
    assert cuda.handle(stream)
    cuda.free(address)


def test_more_memory_than_the_gpu_has_is_a_sentence(cuda):
    with pytest.raises(MissingError, match="memory"):
        cuda.allocate(1 << 46)


@pytest.mark.parametrize("batch", [2, (1, 8)])
@pytest.mark.parametrize("method", [None, *parts.names("vitprune.tokens")])
@pytest.mark.usefixtures("cuda_provider")
def test_every_node_runs_on_the_gpu_and_answers_as_torch_does(tmp_path, method, batch):
    # some methods have seen no attention before the first block, CAIT merges 7 x 7 patches to 7 x 4 and to 4 x 4
    left = {1: 28, 2: 16} if method == "cait" else {1: 30, 2: 20}
    model, pixels = tiny_vit(depth=4, **({"keep": left, "reducer": method} if method else {})), images(2)
    path = tmp_path / "model.onnx"
    export_onnx(model, path, batch=batch)
    with OnnxRuntime.load(path, options=EXACT) as engine:
        assert engine.provider == "cuda"
        for rows in (pixels, pixels[:1]) if isinstance(batch, tuple) else (pixels,):
            with torch.no_grad():
                wanted = model(rows).numpy()
            np.testing.assert_allclose(engine.run(rows.numpy()), wanted, atol=1e-4)
    for copies in (True, False):
        with OnnxRuntime.load(path, options={**EXACT, "copies": copies}) as engine:
            assert all(0 < ms < 1000 for ms in engine.time_ms({"images": pixels.numpy()}, runs=5))


@pytest.mark.usefixtures("cuda_provider")
def test_an_fp16_graph_answers_nearly_as_torch_does(tmp_path):
    model, pixels = tiny_vit(depth=3), images(2)
    path = tmp_path / "model.onnx"
    export_onnx(model, path, batch=(1, 8), precision="fp16")
    with OnnxRuntime.load(path, options=EXACT) as engine, torch.no_grad():
        wanted = model(pixels).numpy()
        found = engine.run(pixels.numpy().astype(engine.inputs[0].dtype))
    np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max())


@pytest.mark.usefixtures("cuda_provider")
def test_a_node_that_only_the_cpu_has_is_refused_by_name(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("StringConcat", ["x", "x"], ["y"], name="texts")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [2])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [2])],
    )
    path = tmp_path / "texts.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    with pytest.raises(NotSupported, match="does not take the node texts of type StringConcat"):
        OnnxRuntime.load(path, options=EXACT)


def test_recovery_trains_on_the_gpu_and_hands_the_model_back_on_the_cpu():
    student, teacher = tiny_vit(seed=1), tiny_vit()
    some = images(32)

    def batches(epoch):
        for start in range(0, 32, 8):
            yield Batch(some[start : start + 8], torch.arange(start, start + 8))

    torch.cuda.reset_peak_memory_stats()
    found = recover(student, teacher, batches, images(16, seed=1), RecoverSettings(steps=40, lr=2e-3, checks=4))
    assert torch.cuda.max_memory_allocated() > 0
    assert found.checks[-1].loss < found.checks[0].loss
    assert next(found.model.parameters()).device.type == "cpu"
