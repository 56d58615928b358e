"""A board that has trtexec alone, behind a real sshd; for TensorRT itself a stand-in of ours, which needs no GPU.

It takes the options that we give, keeps its 'plan' as the ONNX file behind a plan's head, and runs it on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest
from outputs import token_pruned

from vitprune.errors import InputError, MissingError, NotSupported
from vitprune_deploy import cli
from vitprune_deploy.backends.tensorrt import EngineOptions, Shapes, read_sidecar
from vitprune_deploy.latency.protocol import measure
from vitprune_deploy.latency.visits import Subject
from vitprune_deploy.remote import registry, trtexec
from vitprune_deploy.remote.trtexec_board import TrtexecBoard

STAND_IN = """\
#!{python}
import json, pathlib, struct, sys, time
import numpy as np
import onnxruntime as ort
print("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # " + " ".join(sys.argv))
given = dict(part[2:].partition("=")[::2] for part in sys.argv[1:])
calls = pathlib.Path({calls!r})
calls.write_text(calls.read_text() + json.dumps(given) + "\\n" if calls.exists() else json.dumps(given) + "\\n")
if "help" in given:
    sys.exit(0)
HEAD = b"ftrt" + bytes(4) + bytes(16) + bytes([10, 3, 0, 30])
if "onnx" in given:
    data = pathlib.Path(given["onnx"]).read_bytes()
    pathlib.Path(given["saveEngine"]).write_bytes(HEAD + data)
    for line in ("Selected Device: Orin", "Compute Capability: 8.7", "SMs: 8", "Device Global Memory: 7620 MiB"):
        print("[11/26/2026-10:00:00] [I] " + line)
    print("&&&& PASSED TensorRT.trtexec [TensorRT v100300]")
    sys.exit(0)
plan = pathlib.Path(given["loadEngine"]).read_bytes()
if not plan.startswith(b"ftrt"):
    print("[11/26/2026-10:00:00] [E] Error[1]: [stdArchiveReader.cpp::StdArchiveReader::32] Error Code 1: "
          "Serialization (Serialization assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match)")
    print("[11/26/2026-10:00:00] [E] Engine deserialization failed")
    print("&&&& FAILED TensorRT.trtexec [TensorRT v100300]")
    sys.exit(1)
session = ort.InferenceSession(plan[len(HEAD):])
feed = {{}}
for part in given["shapes"].split(","):
    name, _, sizes = part.rpartition(":")
    feed[name] = np.zeros([int(size) for size in sizes.split("x")], np.float32)
if "loadInputs" in given:
    for part in given["loadInputs"].split(","):
        name, _, file = part.partition(":")
        feed[name] = np.frombuffer(pathlib.Path(file).read_bytes(), np.float32).reshape(feed[name].shape)
runs = []
for _ in range(max(1, int(given["iterations"]))):
    start = time.perf_counter()
    found = session.run(None, feed)
    ms = 1e3 * (time.perf_counter() - start)
    runs.append({{"latencyMs": ms + 0.5, "computeMs": ms}})
if "exportTimes" in given:
    pathlib.Path(given["exportTimes"]).write_text(json.dumps(runs))
if "exportOutput" in given:
    outputs = [{{"name": spec.name, "dimensions": "x".join(map(str, array.shape)), "values": array.ravel().tolist()}}
               for spec, array in zip(session.get_outputs(), found)]
    pathlib.Path(given["exportOutput"]).write_text(json.dumps(outputs))
print("&&&& PASSED TensorRT.trtexec [TensorRT v100300]")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return token_pruned(tmp_path_factory.mktemp("model"), 4)


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What the stand-in was asked, call by call."""
    program, file = tmp_path / "trtexec", tmp_path / "calls"
    program.write_text(STAND_IN.format(python=sys.executable, calls=str(file)))
    program.chmod(0o755)
    monkeypatch.setattr(trtexec, "PLACES", ("/nowhere/trtexec", str(program)))
    return lambda: [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def registered(sshd, tmp_path):
    return registry.Device("orin", sshd.host, folder=str(tmp_path / "board"), runner="trtexec")


@pytest.fixture
def board(registered, calls):
    found = TrtexecBoard(registered)
    yield found
    found.close()


@pytest.fixture
def plan(board, exported, tmp_path):
    shapes = Shapes((1, 3, 28, 28), (2, 3, 28, 28), (4, 3, 28, 28))
    found = board.build(exported[0], tmp_path / "model.plan", EngineOptions(({"images": shapes},), workspace_mb=64))
    return tmp_path / "model.plan", found


def test_a_plan_is_built_there_and_described_here(plan, calls, exported):
    path, found = plan
    assert read_sidecar(path) == json.loads(json.dumps(found))
    assert (found["version"], found["compute_capabilities"]) == ("10.3.0.30", ["8.7"])
    assert [one["name"] for one in found["inputs"]] == ["images"]
    assert list(found["outputs"][0]["shape"]) == ["batch", 10]
    built = next(call for call in calls() if "onnx" in call)
    assert (built["minShapes"], built["maxShapes"]) == ("images:1x3x28x28", "images:4x3x28x28")
    assert "stronglyTyped" in built
    assert built["memPoolSize"] == "workspace:64"


def test_its_answers_are_those_of_the_model(board, plan, exported):
    _, batch, wanted = exported
    with board.load("tensorrt", plan[0]) as engine:
        assert engine.runtime == "tensorrt 10.3.0.30"
        for count in (4, 1):
            np.testing.assert_allclose(engine.run(batch[:count]), wanted[:count], atol=1e-4)
    with board.answering("tensorrt", plan[0], batch[None], {}) as wait:
        np.testing.assert_allclose(wait()[0], wanted, atol=1e-4)


def test_a_visit_is_a_process_for_each_of_the_two(board, plan, exported, calls):
    _, batch, _ = exported
    with board.load("tensorrt", plan[0], options={"copies": False}) as engine:
        one = Subject.of("one", engine, {"images": batch})
        (found,) = measure([one], one, max_rounds=2, max_seconds=60.0)
    assert found.value_ms > 0
    assert not found.gated
    timed = [call for call in calls() if "exportTimes" in call]
    assert all("noDataTransfers" in call and call["shapes"] == "images:4x3x28x28" for call in timed)
    assert {int(call["iterations"]) for call in timed} >= {1, 2}


def test_what_it_cannot_do_is_a_sentence(board, plan, exported, tmp_path):
    with pytest.raises(InputError, match="runs TensorRT engines alone, by trtexec"):
        board.load("onnxruntime", exported[0])
    with pytest.raises(InputError, match="leave runtime"):
        board.build(exported[0], tmp_path / "other.plan", EngineOptions(plan_profiles(), refit=True))
    assert board.memory_mb("tensorrt", plan[0], exported[1]) is None


def test_a_damaged_plan_is_told_in_one_sentence(board, plan, exported):
    path, found = plan
    spoilt = b"spoilt" + path.read_bytes()[6:]
    path.write_bytes(spoilt)
    path.with_suffix(".json").write_text(json.dumps({**found, "sha256": hashlib.sha256(spoilt).hexdigest()}))
    with (
        board.load("tensorrt", path) as engine,
        pytest.raises((MissingError, NotSupported, InputError), match=r"127\.0\.0\.1"),
    ):
        engine.run(exported[1])


def test_the_board_is_known_by_its_shell(board):
    facts = board.fingerprint("tensorrt 10.3.0", "tensorrt")
    assert facts["cores"] >= 1
    assert facts["memory_mb"] > 100
    assert (facts["runtime"], facts["runtime_version"]) == ("tensorrt", "10.3.0")
    assert board.version(["tensorrt"]) == "10.3.0"
    assert board.has("tensorrt")
    assert not board.has("onnxruntime")
    assert isinstance(board.state(), dict)


def test_the_verbs_take_such_a_board(sshd, tmp_path, calls, capsys):
    given = ["devices", "add", "orin", sshd.address, "--runner", "trtexec", "--folder", str(tmp_path / "board")]
    assert cli.main(given) == 0
    assert "of TensorRT 10.3.0" in capsys.readouterr().out
    assert cli.main(["devices", "check", "orin", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trtexec_version"] == "10.3.0"


def test_a_board_without_it_is_a_sentence(registered, monkeypatch):
    monkeypatch.setattr(trtexec, "PLACES", ("/nowhere/trtexec",))
    gone = TrtexecBoard(registered)
    with pytest.raises(MissingError, match="there is no trtexec that runs on the device"):
        gone.version(["tensorrt"])
    gone.close()


def plan_profiles():
    shapes = Shapes((1, 3, 28, 28), (2, 3, 28, 28), (4, 3, 28, 28))
    return ({"images": shapes},)
