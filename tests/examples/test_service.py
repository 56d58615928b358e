"""The example service as its users meet it: a process that is asked over HTTP, mostly by Triton's own client."""

from __future__ import annotations

import http.client
import importlib.util
import io
import json
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
from outputs import CLASSES, written
from PIL import Image
from serving import ENDS_S, SERVICE, environment, serving

from vitprune_deploy.runtime import load

NAME = "flowers"
MB = 1 << 20
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="the extra service is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("built"), max_batch=8)


@pytest.fixture(scope="module")
def model(folder):
    with load(folder, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--name", NAME) as running:
        yield running


@pytest.fixture(scope="module")
def triton():
    """Triton's own client: whatever it sends and reads here, it sends to and reads from Triton as well."""
    return pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")


def client(triton, server):
    return triton.InferenceServerClient(f"127.0.0.1:{server.port}")


def images(seed: int, count: int = 1) -> np.ndarray:
    return tiny.images(count, seed=seed).numpy()


def given(array: np.ndarray, triton, datatype: str = "FP32", binary: bool = True):
    tensor = triton.InferInput("images", list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)  # other batches, other kernels; another image: O(1)


def picture(seed: int, format: str = "PNG", size: tuple[int, int] = (50, 40)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def blob(*files: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


def request(shape=(1, 3, 28, 28), **changes):
    """A request of zeros as JSON."""
    tensor = {"name": "images", "datatype": "FP32", "shape": list(shape)} | changes
    if "data" not in tensor and "parameters" not in tensor:
        tensor["data"] = np.zeros(shape).tolist()
    return {"inputs": [tensor]}


# ---- what it says of itself -----------------------------------------------------------------------------------------


def test_health_and_metadata_are_as_tritons_client_expects(server, triton):
    with client(triton, server) as asked:
        assert asked.is_server_live()
        assert asked.is_server_ready()
        assert asked.is_model_ready(NAME)
        assert asked.is_model_ready(NAME, "1")
        assert not asked.is_model_ready("roses")
        assert asked.get_server_metadata()["extensions"] == ["binary_tensor_data", "classification"]
        found = asked.get_model_metadata(NAME)
    assert found["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 28, 28]}]
    assert found["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    assert (found["name"], found["versions"]) == (NAME, ["1"])
    assert found["platform"].startswith("onnxruntime_1.")


# ---- right answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("received", [True, False], ids=["binary", "json"])
def test_tensors_go_both_ways_as_bytes_and_as_json(server, triton, model, sent, received):
    inputs = images(3, 2)
    with client(triton, server) as asked:
        wanted = triton.InferRequestedOutput("logits", binary_data=received)
        answer = asked.infer(NAME, [given(inputs, triton, binary=sent)], outputs=[wanted], request_id="seven")
    close(answer.as_numpy("logits"), model.predict(inputs).logits)
    assert answer.get_response()["id"] == "seven"
    assert ("parameters" in answer.get_output("logits")) == received


def test_image_files_are_prepared_by_the_service(server, triton, model):
    files = [picture(1), picture(2, "JPEG", (200, 90)), picture(3, "WEBP")]
    with client(triton, server) as asked:
        answer = asked.infer(NAME, [given(np.array(files, object), triton, "BYTES")])
    close(answer.as_numpy("logits"), model.predict([Image.open(io.BytesIO(file)) for file in files]).logits)


@pytest.mark.parametrize("binary", [True, False])
def test_classes_come_with_their_names(server, triton, model, binary):
    inputs = images(4, 2)
    with client(triton, server) as asked:
        wanted = triton.InferRequestedOutput("logits", binary_data=binary, class_count=3)
        rows = asked.infer(NAME, [given(inputs, triton)], outputs=[wanted]).as_numpy("logits")
    assert rows.shape == (2, 3)
    prediction = model.predict(inputs)
    for row, logits, best in zip(rows, prediction.logits, prediction.top(3).indices, strict=True):
        parts = [(text.decode() if isinstance(text, bytes) else text).split(":") for text in row]
        assert [(int(index), label) for _, index, label in parts] == [(i, CLASSES[i]) for i in best]
        close(np.array([float(value) for value, *_ in parts]), logits[best])


def test_more_images_than_a_batch_are_one_request(server, triton, model):
    inputs = images(5, 21)
    with client(triton, server) as asked:
        close(asked.infer(NAME, [given(inputs, triton)]).as_numpy("logits"), model.predict(inputs).logits)


def test_no_answer_is_wrong_under_concurrent_load_and_requests_share_batches(server, triton, model):
    clients, each = 12, 20
    before = server.metrics()

    def work(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        with client(triton, server) as asked:
            sent = [images(100 * number + turn, 1 + (number + turn) % 3) for turn in range(each)]
            return [(one, asked.infer(NAME, [given(one, triton)]).as_numpy("logits")) for one in sent]

    with ThreadPoolExecutor(clients) as pool:
        found = [pair for pairs in pool.map(work, range(clients)) for pair in pairs]
    for inputs, logits in found:
        close(logits, model.predict(inputs).logits)
    after = server.metrics()
    counted = {name: after[name] - before.get(name, 0.0) for name in after}
    assert counted['vitprune_requests_total{code="200"}'] == clients * each == counted["vitprune_request_seconds_count"]
    assert counted["vitprune_batch_images_sum"] == sum(len(inputs) for inputs, _ in found)
    assert counted["vitprune_batch_images_count"] == counted["vitprune_batch_seconds_count"] < clients * each
    assert after["vitprune_requests_inside"] == 0


# ---- wrong requests -------------------------------------------------------------------------------------------------

RAW = np.zeros((1, 3, 28, 28), "<f4").tobytes()
SIZED = {"binary_data_size": len(RAW)}
FILES = {"name": "images", "datatype": "BYTES", "shape": [1]}


def as_bytes(data: bytes, count: int = 1):
    return {"inputs": [FILES | {"shape": [count], "parameters": {"binary_data_size": len(data)}}]}, data


@pytest.mark.parametrize(
    ("asked", "binary", "says"),
    [
        ([], b"", "the request is wrong at its start: "),
        ({}, b"", "the request is wrong at inputs: Field required"),
        ({"inputs": []}, b"", "the request is wrong at inputs: List should have at least 1 item"),
        ({"inputs": request()["inputs"] * 2}, b"", "wrong at inputs: List should have at most 1 item"),
        (request(name="pixels"), b"", "the model's input is images, got 'pixels'"),
        (request() | {"outputs": [{"name": "boxes"}]}, b"", "the model's output is logits, got 'boxes'"),
        (request(datatype="FP16"), b"", "input images is FP32 or, for image files, BYTES; got 'FP16'"),
        (request(shape=(1, 3, 32, 32)), b"", "must have the shape ['images', 3, 28, 28], got [1, 3, 32, 32]"),
        (request(shape=(0, 3, 28, 28)), b"", "a request takes 1 to 64 images, this one has 0"),
        (request(shape=(65, 3, 28, 28), data=[]), b"", "a request takes 1 to 64 images, this one has 65"),
        (request(shape=(), data=[]), b"", "a request takes 1 to 64 images, this one has 0"),
        (request(shape=(-1, 3, 28, 28), data=[]), b"", "wrong at inputs.0.shape.0: Input should be greater than"),
        (request(data=[1, 2]), b"", "input images needs 2352 numbers in data"),
        (request(data=[[1, 2], [3]]), b"", "input images needs 2352 numbers in data"),
        (request(data=["0"] * 2352), b"", "input images needs 2352 numbers in data"),
        (request(data=[1e300] * 2352), b"", "input images holds NaN or numbers beyond float32"),
        (request(data=[float("nan")] * 2352), b"", "input images holds NaN or numbers beyond float32"),
        (request(parameters=SIZED), np.full(588 * 4, np.inf, "<f4").tobytes(), "holds NaN or numbers beyond float32"),
        (request(parameters=SIZED), RAW[:-1], "takes 9408 bytes, its binary_data_size is 9408, and 9407 came"),
        (request(parameters={"binary_data_size": 4}), RAW, "takes 9408 bytes, its binary_data_size is 4, and 9"),
        (request(parameters={"binary_data_size": -4}), RAW, "wrong at inputs.0.parameters.binary_data_size"),
        (request(shape=(1,), datatype="BYTES", data=["x"]), b"", "as BYTES must have the shape ['images'] and come as"),
        (*as_bytes(blob(picture(1)), 2), "input images is cut off: fewer than 2 pieces came"),
        (*as_bytes(blob(picture(1)) + b"more"), "input images: its pieces end at byte"),
        (*as_bytes(struct.pack("<I", 99) + b"few"), "input images: its pieces end at byte 103, and 7 came"),
        (*as_bytes(blob(b"no image")), "image 0 is no JPEG, PNG, WEBP file that can be read"),
        (*as_bytes(blob(picture(1)[:200])), "image 0 is no JPEG, PNG, WEBP file that can be read"),
        (*as_bytes(blob(picture(1, "BMP"))), "image 0 is no JPEG, PNG, WEBP file that can be read"),
        (*as_bytes(blob(picture(1, "PNG", (200_000, 1)))), "image 0: an image of 200000 x 1 pixels would become"),
    ],
    ids=range(29),
)
def test_wrong_requests_are_answered_with_400_and_a_sentence(server, asked, binary, says):
    status, answer = server.infer(asked, NAME, binary)
    assert status == 400, answer
    assert says in answer["error"]
    assert "Traceback" not in answer["error"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (b"", {}, 400, "the request is wrong at its start: Invalid JSON"),
        (b"\xff\xfe", {}, 400, "the request is wrong at its start: Invalid JSON"),
        (b"[" * 100_000, {}, 400, "the request is wrong at its start: Invalid JSON"),
        (b"{}", {"Inference-Header-Content-Length": "99"}, 400, "a number of bytes up to the body's 2, got '99'"),
        (b"{}", {"Inference-Header-Content-Length": "-1"}, 400, "a number of bytes up to the body's 2, got '-1'"),
        (b"{}", {"Inference-Header-Content-Length": "9" * 5000}, 400, "a number of bytes up to the body's 2, got '99"),
        (b"{}", {"Content-Encoding": "gzip"}, 415, "compressed requests are not taken"),
        (b" " * (16 * MB + 1), {}, 413, f"a request may have {16 * MB} bytes, this one has {16 * MB + 1}; split it"),
    ],
    ids=range(8),
)
def test_bodies_that_are_no_request_are_answered_with_a_sentence(server, body, headers, status, says):
    got, _, answer = server.ask("POST", f"/v2/models/{NAME}/infer", body, headers)
    assert got == status
    assert says in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("POST", "/v2/models/roses/infer", 404, "the model here is version 1 of 'flowers', not 1 of 'roses'"),
        ("GET", f"/v2/models/{NAME}/versions/2", 404, "version 1 of 'flowers', not 2 of 'flowers'"),
        ("GET", "/v1/models", 404, "GET /v1/models: Not Found"),
        ("GET", f"/v2/models/{NAME}/infer", 405, "Method Not Allowed"),
    ],
)
def test_what_is_not_there_is_told(server, method, path, status, says):
    got, _, answer = server.ask(method, path, b"{}" if method == "POST" else None)
    assert got == status
    assert says in json.loads(answer)["error"]


def test_a_model_that_overflows_is_no_answer(server):
    status, answer = server.infer(request(data=[3e38] * 2352), NAME)
    assert (status, "no finite answer" in answer["error"]) == (422, True)


def test_after_all_that_it_still_answers_and_its_log_holds_no_failure(server, model):
    status, answer = server.infer(request(), NAME)
    assert status == 200
    close(np.array(answer["outputs"][0]["data"]), model.predict(np.zeros((1, 3, 28, 28), np.float32)).logits[0])
    assert "Traceback" not in server.log.read_text()


# ---- limits, memory, the end ----------------------------------------------------------------------------------------


@contextmanager
def half_sent(server):
    """A function that begins a request, which has a place from then on, and one that ends it and gives its status."""
    body, opened = json.dumps(request()).encode(), []

    def begin() -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ENDS_S)
        opened.append(connection)
        connection.putrequest("POST", f"/v2/models/{NAME}/infer")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:100])
        while server.metrics()["vitprune_requests_inside"] < len(opened):
            time.sleep(0.01)
        return connection

    def end(connection: http.client.HTTPConnection) -> int:
        connection.send(body[100:])
        answer = connection.getresponse()
        assert len(json.loads(answer.read())["outputs"][0]["data"]) == 10
        return answer.status

    try:
        yield begin, end
    finally:
        for connection in opened:
            connection.close()


def test_more_requests_than_there_are_places_are_told_to_come_again(folder):
    with serving(folder, "--name", NAME, "--places", "2") as server, half_sent(server) as (begin, end):
        first, second = begin(), begin()
        status, answer = server.infer(request(), NAME)
        assert (status, answer["error"]) == (503, "all 2 places are taken; try again in a moment")
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        assert end(first) == 200
        assert server.infer(request(), NAME)[0] == 200
        assert end(second) == 200
        assert server.metrics()["vitprune_requests_inside"] == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_stays_flat(server):
    body = json.dumps(request()).encode()

    def resident_mb(requests: int) -> float:
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda _: server.ask("POST", f"/v2/models/{NAME}/infer", body)[0], range(requests))
            assert set(answers) == {200}
        pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
        return pages * 4096 / MB

    before = resident_mb(400)
    # 800 inputs alone would take 7 MB, their JSON thrice that; tools/bench_service.py makes 10,000 requests
    assert resident_mb(800) - before < 5


def test_a_request_that_is_in_the_service_when_it_is_told_to_end_is_answered(folder):
    with serving(folder, "--name", NAME) as server, half_sent(server) as (begin, end):
        connection = begin()
        server.process.send_signal(signal.SIGTERM)
        while "Shutting down" not in server.log.read_text():
            time.sleep(0.01)
        with pytest.raises(ConnectionRefusedError):
            server.ask("GET", "/v2/health/ready")
        assert end(connection) == 200
        assert server.process.wait(ENDS_S) in (0, -signal.SIGTERM)  # as uvicorn passes the signal on, or not
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"cut off"), "model.onnx is cut off or changed"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing: the build did not finish"),
    ],
)
def test_a_folder_that_is_not_whole_is_not_served(tmp_path, damage, says):
    folder = written(tmp_path)
    damage(folder)
    with pytest.raises(AssertionError, match=f"did not start:\nerror: .*{says}"), serving(folder):
        pass


def test_the_service_needs_no_torch():
    code = "import sys; import app; print([name for name in ('torch', 'timm', 'onnx', 'scipy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SERVICE, env=environment())
    assert done.stdout.strip() == "[]", done.stderr
