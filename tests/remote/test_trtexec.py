from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vitprune.errors import DamagedFile, InputError, MissingError, NotSupported
from vitprune_deploy.backends.base import TensorSpec
from vitprune_deploy.backends.tensorrt import Shapes, engine_name
from vitprune_deploy.remote.trtexec import (
    Version,
    build_arguments,
    explain,
    help_arguments,
    plan_version,
    read_gpu,
    read_outputs,
    read_times,
    read_version,
    run_arguments,
    sidecar,
    timing_arguments,
)

RECORDED = Path(__file__).parent / "recorded"
PROGRAM = "/usr/src/tensorrt/bin/trtexec"
TEN, ELEVEN = Version(10, 3, 0), Version(11, 1, 0, 106)
IMAGES = {"images": Shapes((1, 3, 224, 224), (4, 3, 224, 224), (8, 3, 224, 224))}
LARGE = {"images": Shapes((8, 3, 224, 224), (16, 3, 224, 224), (32, 3, 224, 224))}
ONE = {"images": (1, 3, 224, 224)}
NO_MEMORY = (
    "m.onnx: TensorRT 10.3.0 ran out of the device's memory; lower workspace_mb or the largest batch, or end what else "
    "uses the memory"
)
BANNER = "&&&& FAILED TensorRT.trtexec [TensorRT v100300] # trtexec\n"
# the first 28 bytes of a plan of 10.3.0.30, as trtexec --getPlanVersionOnly reads them
HEAD = b"ftrt" + bytes(20) + bytes([10, 3, 0, 30])


def recorded(name):
    return (RECORDED / f"trtexec_{name}.txt").read_text()


def times_text(*runs):
    """A file of times as sampleReporting.cpp writes it."""
    rows = [
        f'{{ "startEnqMs" : {start}, "endEnqMs" : {start}, "startH2dMs" : {start}, "endH2dMs" : {start}, '
        f'"startComputeMs" : {start}, "endComputeMs" : {start}, "startD2hMs" : {start}, "endD2hMs" : {start}, '
        f'"h2dMs" : 0.25, "computeMs" : {compute}, "d2hMs" : 0.125, "latencyMs" : {latency} }}\n'
        for start, compute, latency in runs
    ]
    return f"[\n  {', '.join(rows)}]\n"


@pytest.mark.parametrize(
    ("log", "version", "text"),
    [
        (recorded("10.16_help"), (10, 16, 2, 10), "10.16.2.10"),
        (recorded("10.13_version_option"), (10, 13, 3, 9), "10.13.3.9"),
        (recorded("10.3_timed"), (10, 3, 0, None), "10.3.0"),
        (recorded("10.0_version"), (10, 0, 1, None), "10.0.1"),
        (recorded("8.4_device"), (8, 4, 12, None), "8.4.12"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v110100] [b106]", (11, 1, 0, 106), "11.1.0.106"),
    ],
)
def test_the_version_is_read_from_the_banner(log, version, text):
    found = read_version(log)
    assert found == version
    assert str(found) == text


def test_a_device_without_trtexec_says_so():
    with pytest.raises(MissingError, match="bash: trtexec: command not found; install TensorRT there"):
        read_version("bash: trtexec: command not found\n")
    with pytest.raises(MissingError, match=r"libnvinfer\.so\.10: cannot open shared object file: No such file"):
        read_version("trtexec: error while loading shared libraries: libnvinfer.so.10: cannot open shared object file: "
                     "No such file or directory")  # fmt: skip


def test_help_is_what_is_asked_for_the_banner():
    assert help_arguments(PROGRAM) == [PROGRAM, "--help"]


def test_an_engine_is_built_in_its_files_own_precision():
    assert build_arguments(
        PROGRAM, TEN, "/c/m.onnx", "/c/m.plan", [IMAGES], workspace_mb=2048, timing_cache="/c/timings"
    ) == [
        PROGRAM,
        "--onnx=/c/m.onnx",
        "--saveEngine=/c/m.plan",
        "--skipInference",
        "--stronglyTyped",
        "--minShapes=images:1x3x224x224",
        "--optShapes=images:4x3x224x224",
        "--maxShapes=images:8x3x224x224",
        "--memPoolSize=workspace:2048",
        "--timingCacheFile=/c/timings",
    ]


def test_tensorrt_11_is_strongly_typed_by_itself_and_a_fixed_graph_is_told_no_shapes():
    assert build_arguments(PROGRAM, ELEVEN, "m.onnx", "m.plan", []) == [
        PROGRAM,
        "--onnx=m.onnx",
        "--saveEngine=m.plan",
        "--skipInference",
    ]


def test_several_profiles_are_numbered_each_before_its_shapes():
    arguments = build_arguments(PROGRAM, TEN, "m.onnx", "m.plan", [IMAGES, LARGE])
    assert arguments[5:] == [
        "--profile=0",
        "--minShapes=images:1x3x224x224",
        "--optShapes=images:4x3x224x224",
        "--maxShapes=images:8x3x224x224",
        "--profile=1",
        "--minShapes=images:8x3x224x224",
        "--optShapes=images:16x3x224x224",
        "--maxShapes=images:32x3x224x224",
    ]


def test_several_inputs_share_one_option():
    both = {"ids": Shapes((1, 4), (2, 4), (2, 8)), "mask:0": Shapes((1, 4), (2, 4), (2, 8))}
    assert "--optShapes=ids:2x4,mask:0:2x4" in build_arguments(PROGRAM, TEN, "m.onnx", "m.plan", [both])


@pytest.mark.parametrize(
    ("version", "copies", "launch"),
    [
        (TEN, True, ["--exposeDMA", "--useSpinWait"]),
        (TEN, False, ["--exposeDMA", "--useSpinWait", "--noDataTransfers"]),
        (ELEVEN, True, ["--exposeDMA", "--noCudaGraph", "--includeDataTransfers"]),
        (ELEVEN, False, ["--exposeDMA", "--noCudaGraph"]),
    ],
)
def test_both_versions_time_the_same_thing(version, copies, launch):
    arguments = timing_arguments(
        PROGRAM, version, "m.plan", ONE, "times.json", runs=200, seconds=1.5, profile=1, copies=copies
    )
    assert arguments == [
        PROGRAM,
        "--loadEngine=m.plan",
        "--shapes=images:1x3x224x224",
        "--useProfile=1",
        *launch,
        "--warmUp=200",
        "--duration=1.5",
        "--iterations=200",
        "--avgRuns=200",
        "--exportTimes=times.json",
    ]


@pytest.mark.parametrize(("version", "wanted"), [(TEN, "--useSpinWait"), (ELEVEN, "--includeDataTransfers")])
def test_given_inputs_run_once(version, wanted):
    given = {"images": ((2, 3, 8, 8), "/c/images.bin")}
    arguments = run_arguments(PROGRAM, version, "m.plan", given, "outputs.json")
    assert wanted in arguments
    assert "--noDataTransfers" not in arguments
    assert arguments[-5:] == [
        "--loadInputs=images:/c/images.bin",
        "--warmUp=0",
        "--duration=0",
        "--iterations=1",
        "--exportOutput=outputs.json",
    ]
    assert "--shapes=images:2x3x8x8" in arguments


def test_what_trtexec_would_split_is_refused():
    shapes = Shapes((1,), (1,), (1,))
    with pytest.raises(InputError, match="the input 'a,b' holds a comma, at which trtexec splits its options"):
        build_arguments(PROGRAM, TEN, "m.onnx", "m.plan", [{"a,b": shapes}])
    with pytest.raises(InputError, match='the input "it\'s" holds a quotation mark'):
        timing_arguments(PROGRAM, TEN, "m.plan", {"it's": (1,)}, "t", runs=1)
    with pytest.raises(InputError, match="the file 'c:/x' holds a colon"):
        run_arguments(PROGRAM, TEN, "m.plan", {"images": ((1,), "c:/x")}, "o")


def test_a_tensorrt_that_knows_no_strong_typing_is_refused():
    old = read_version("&&&& RUNNING TensorRT.trtexec [TensorRT v8602] # trtexec --help")
    with pytest.raises(MissingError, match=r"TensorRT 8\.6\.2, and TensorRT 10 or newer is needed; .* JetPack 6\.1"):
        build_arguments(PROGRAM, old, "m.onnx", "m.plan", [])
    with pytest.raises(MissingError, match="TensorRT 10 or newer"):
        timing_arguments(PROGRAM, old, "m.plan", ONE, "t", runs=1)


def test_times_are_the_intervals_not_the_moments():
    times = read_times(times_text((200.04, 3.14062, 3.51562), (12345.6, 3.25, 3.625)))
    assert times.latency_ms == [3.51562, 3.625]
    assert times.compute_ms == [3.14062, 3.25]


@pytest.mark.parametrize("text", ["", "[\n", "{}", "[]\n", "null", "[1]", '[{"computeMs": 1}]'])
def test_times_that_are_none_are_refused(text):
    with pytest.raises(DamagedFile, match="trtexec's file of times"):
        read_times(text)


def test_outputs_become_arrays():
    found = read_outputs(recorded("outputs"))
    assert {name: array.shape for name, array in found.items()} == {
        "probs_phone": (1, 5),
        "probs_headset": (1, 3),
        "probs_gaze": (1, 5),
    }
    np.testing.assert_array_equal(found["probs_headset"], np.array([[0.79014, 0.206794, 0.00306536]], np.float32))


def test_outputs_may_be_without_end_or_no_numbers_at_all():
    values = "nan, -nan, inf, -inf, 1e-05, -2"
    text = f'[\n  {{ "name" : "nan, inf"\n  , "dimensions" : "2x3"\n  , "values" : [ {values} ]\n  }}\n]'
    (array,) = read_outputs(text).values()
    np.testing.assert_array_equal(array, np.array([[np.nan, np.nan, np.inf], [-np.inf, 1e-05, -2]], np.float32))
    assert list(read_outputs(text)) == ["nan, inf"]


@pytest.mark.parametrize(
    "text", ["", "[\n  {", '[{"name": "y", "dimensions": "2x2", "values": [1, 2, 3]}]', '{"a": 1}', '[{"name": "y"}]']
)
def test_outputs_that_are_cut_off_are_refused(text):
    with pytest.raises(DamagedFile, match="trtexec's file of outputs is cut off or of an unknown form"):
        read_outputs(text)


@pytest.mark.parametrize(
    ("log", "code", "kind", "sentence"),
    [
        (
            recorded("10.3_node"),
            1,
            NotSupported,
            "m.onnx: TensorRT 10.3.0 cannot parse the node /Tile of type Tile (ITensor::getDimensions: Error Code 4: "
            "Internal Error (/OneHot: an IIOneHotLayer cannot be used to compute a shape tensor))",
        ),
        (
            recorded("10.3_options"),
            1,
            NotSupported,
            "m.onnx: trtexec of TensorRT 10.3.0 has no --workspace, --buildOnly, --explicitBatch",
        ),
        (
            recorded("10.3_memory") + BANNER,
            1,
            MissingError,
            NO_MEMORY,
        ),
        (
            recorded("10.3_build"),
            1,
            NotSupported,
            "m.onnx: TensorRT 10.3.0 could not do it: [convBaseBuilder.cpp::createConvolution::259] Error Code 2: "
            "Internal Error (Assertion isOpConsistent(convolution.get()) failed. Cask convolution isConsistent check "
            "failed.)",
        ),
        (
            recorded("10.0_version"),
            1,
            MissingError,
            "m.onnx does not load in TensorRT 10.0.1: another version built it; build it again on the device",
        ),
        (
            recorded("gpu") + BANNER,
            1,
            MissingError,
            "m.onnx was built for a GPU of compute capability 8.0, and that of the device has 8.6; build it again on "
            "the device",
        ),
        (
            recorded("10.10_disk"),
            1,
            MissingError,
            "m.onnx: TensorRT 10.10.0.31 could not write the engine; is the device's disk full?",
        ),
        (
            recorded("10.13_file"),
            1,
            InputError,
            "m.onnx: there is no such file on the device; send it again",
        ),
        (
            recorded("10.13_version_option"),
            1,
            NotSupported,
            "m.onnx: TensorRT 10.13.3.9 could not do it: Model missing or format not recognized",
        ),
        (
            "sh: 1: trtexec: not found",
            127,
            MissingError,
            "there is no trtexec that runs on the device: sh: 1: trtexec: not found; install TensorRT there",
        ),
        (
            recorded("10.3_node"),
            137,
            MissingError,
            "m.onnx: trtexec was killed, most likely for want of memory on the device",
        ),
        (
            "&&&& RUNNING TensorRT.trtexec [TensorRT v101602] [b10] # trtexec --onnx=m.onnx\nSegmentation fault\n",
            139,
            NotSupported,
            "m.onnx: trtexec of TensorRT 10.16.2.10 ended with 139; its last line: Segmentation fault",
        ),
        (
            BANNER + "NvMapMemAllocInternalTagged: 1075072515 error 12\n"
            "[01/01/2026-10:00:00] [E] Inference set up failed\n",
            1,
            MissingError,
            NO_MEMORY,
        ),
        (
            BANNER + "[01/01/2026-10:00:00] [I] === Device Information ===\n"
            "[01/01/2026-10:00:00] [I] Cannot find any available devices (GPUs)!\n",
            1,
            MissingError,
            "m.onnx: TensorRT 10.3.0 finds no GPU on the device, or its driver is too old",
        ),
    ],
)
def test_a_failure_is_one_sentence(log, code, kind, sentence):
    error = explain(log, code, "m.onnx")
    assert (type(error), str(error)) == (kind, sentence)


def test_memory_that_was_scarce_for_some_kernels_does_not_hide_what_failed():
    warning = "[W] [TRT] Tactic Device request: 1583MB Available: 1547MB. Device memory is insufficient to use tactic."
    log = f"[11/20/2024-16:16:44] {warning}\n{recorded('10.3_build')}"
    assert "isOpConsistent" in str(explain(log, 1, "m.onnx"))


def test_the_gpu_is_that_of_a_sidecar():
    assert read_gpu(recorded("8.4_device")) == {
        "name": "Orin",
        "compute_capability": "8.7",
        "multiprocessors": 16,
        "memory_bytes": 28826 * 2**20,
        "driver": None,
        "driver_cuda": None,
    }
    with pytest.raises(DamagedFile, match="does not describe the GPU"):
        read_gpu(recorded("10.3_build"))


@pytest.mark.parametrize("head", [b"", b"ftrt", HEAD[:27], b"vtrt" + HEAD[4:], b"ftrt" + b"\1" + HEAD[5:]])
def test_a_head_that_is_no_plans_has_no_version(head):
    assert plan_version(HEAD) == plan_version(HEAD + b"more") == "10.3.0.30"
    assert plan_version(head) is None


def test_a_sidecar_says_what_can_be_known():
    images = TensorSpec("images", ("batch", 3, 224, 224), "float16")
    logits = TensorSpec("logits", ("batch", 5), "float16")
    found = sidecar(recorded("8.4_device"), HEAD, [images], [logits], [IMAGES], "fp16")
    found = json.loads(json.dumps(found))
    assert (found["version"], found["runtime"], found["compute_capabilities"]) == ("10.3.0.30", "tensorrt", ["8.7"])
    assert found["inputs"] == [{"name": "images", "shape": ["batch", 3, 224, 224], "dtype": "float16"}]
    assert found["profiles"] == [{"images": [[1, 3, 224, 224], [4, 3, 224, 224], [8, 3, 224, 224]]}]
    assert engine_name("model", found) == "model.sm87.trt10.3.fp16.b1-8.plan"
    with pytest.raises(DamagedFile, match="what trtexec wrote is no TensorRT engine"):
        sidecar(recorded("8.4_device"), b"", [images], [logits], [IMAGES], "fp16")
