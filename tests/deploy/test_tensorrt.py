"""TensorRT: engines are really built by TensorRT-RTX, which needs no GPU. Running one does.

So for running there is a double of the driver and of the engine: it shows in which order our code calls them and what
it does with their answers, nothing about TensorRT.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tiny import images, randomise, tiny_config, tiny_vit

from vitprune.errors import DamagedFile, InputError, MissingError, NotSupported
from vitprune.surgery import build
from vitprune_deploy.backends import _trt_child, tensorrt
from vitprune_deploy.backends._cuda import Cuda, Device
from vitprune_deploy.backends.tensorrt import (
    EngineOptions,
    Shapes,
    TensorRT,
    build_engine,
    capabilities,
    check_parses,
    engine_name,
    read_sidecar,
    sidecar_path,
)
from vitprune_deploy.export.islands import find_islands
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.files import sha256_file

DENSE = {"images": Shapes((1, 3, 28, 28), (4, 3, 28, 28), (8, 3, 28, 28))}
ANY_SIZE = {"images": Shapes((1, 3, 16, 16), (4, 3, 28, 28), (8, 3, 56, 56))}


@pytest.fixture(scope="session")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("trt") / "model.onnx"
    export_onnx(tiny_vit(depth=1), path)
    return path


@pytest.fixture(scope="module")
def engine(rtx, dense):
    """A plan, its sidecar, and the progress that was reported."""
    steps = []
    plan = dense.parent / "model.plan"
    sidecar = build_engine(dense, plan, options(), progress=lambda *step: steps.append(step))
    return plan, sidecar, steps


def options(profile=None, **others):
    return EngineOptions(**{"profiles": (profile or DENSE,), "module": "tensorrt_rtx"} | others)


def graph_with_nonzero(path):
    nodes = [helper.make_node("NonZero", ["x"], ["y"], "where_it_counts")]
    graph = helper.make_graph(
        nodes,
        "bad",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [2, None])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


# ---- building: the real thing -------------------------------------------------------------------------------------


def test_the_sidecar_says_what_the_plan_cannot(engine, dense, rtx):
    plan, sidecar, _ = engine
    assert json.loads(sidecar_path(plan).read_text()) == json.loads(json.dumps(sidecar))
    assert sidecar["status"] == "built"  # and not run
    assert (sidecar["runtime"], sidecar["version"]) == ("tensorrt_rtx", rtx.__version__)
    assert sidecar["inputs"] == [{"name": "images", "dtype": "float32", "shape": ["batch", 3, 28, 28]}]
    assert sidecar["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}]
    assert sidecar["profiles"] == [{"images": [[1, 3, 28, 28], [4, 3, 28, 28], [8, 3, 28, 28]]}]
    assert sidecar["compute_capabilities"] == ["8.6+"]
    assert (sidecar["sha256"], sidecar["size_bytes"]) == (sha256_file(plan), plan.stat().st_size)
    onnx_file = sidecar["onnx"]
    assert (onnx_file["name"], onnx_file["sha256"], onnx_file["external_data"]) == (
        "model.onnx",
        sha256_file(dense),
        {},
    )
    assert (sidecar["precision"], sidecar["flags"], sidecar["hardware_compatibility"]) == ("fp32", [], "none")
    assert sidecar["timing_cache"] is None  # no folder was given
    assert (sidecar["gpu"] is None) == (capabilities()["tensorrt_rtx"]["gpu"] is None)


def test_a_plan_bears_in_its_name_what_must_fit(engine, rtx):
    version = ".".join(rtx.__version__.split(".")[:2])
    assert engine_name("model", engine[1]) == f"model.sm86plus.rtx{version}.fp32.b1-8.plan"
    classic = {
        "compute_capabilities": ["8.9"],
        "runtime": "tensorrt",
        "version": "11.4.0.106",
        "precision": "fp16",
        "profiles": [{"images": [[1, 3], [1, 3], [1, 3]]}, {"images": [[2, 3], [8, 3], [32, 3]]}],
    }
    assert engine_name("model", classic) == "model.sm89.trt11.4.fp16.b1-32.plan"
    alone = {"precision": None, "profiles": [{"images": [[4, 3], [4, 3], [4, 3]]}], "compute_capabilities": ["8.0+"]}
    assert engine_name("dense", classic | alone) == "dense.sm80plus.trt11.4.b4.plan"


def test_progress_goes_from_nothing_to_all_steps(engine):
    done = [(done, total) for _, done, total in engine[2]]
    assert done == sorted(done)
    assert done[0][0] == 0
    assert done[-1][0] >= done[-1][1] - 2  # the last steps may come with the end itself


def test_the_same_file_gives_the_same_plan(engine, dense, tmp_path):
    assert build_engine(dense, tmp_path / "again.plan", options())["sha256"] == engine[1]["sha256"]


@pytest.mark.parametrize(
    ("method", "precision", "opset", "dynamic"),
    [("evit", "fp32", 20, True), ("tome", "fp16", 23, False), ("tome", "fp32", 20, False)],
)
def test_token_methods_build(rtx, method, precision, opset, dynamic, tmp_path):
    model = build(tiny_config(depth=2, keep={0: 30, 1: 0}, reducer=method, dynamic_image_size=dynamic))
    randomise(model)
    size = ((16, 56), (16, 56)) if dynamic else None
    export_onnx(model, tmp_path / "m.onnx", image_size=size, precision=precision, opset=opset)
    sidecar = build_engine(tmp_path / "m.onnx", tmp_path / "m.plan", options(ANY_SIZE if dynamic else DENSE))
    want = ["batch", 3, "height", "width"] if dynamic else ["batch", 3, 28, 28]
    assert sidecar["inputs"][0]["shape"] == want


def test_timings_are_kept_by_version_and_gpu_and_read_again(rtx, dense, tmp_path):
    if capabilities()["tensorrt_rtx"]["gpu"] is not None:
        pytest.skip("there is a GPU")
    cache = tmp_path / "cache"
    first = build_engine(dense, tmp_path / "first.plan", options(timing_cache=cache))
    (file,) = cache.glob("*.timings")
    assert file.name == f"tensorrt_rtx-{rtx.__version__}-none.timings"
    assert first["timing_cache"] == {"file": file.name, "sha256": sha256_file(file)}
    file.write_bytes(b"damaged")  # which is no reason not to build
    again = build_engine(dense, tmp_path / "again.plan", options(timing_cache=cache))
    assert again["timing_cache"] == first["timing_cache"]


def test_timings_that_cannot_be_kept_do_not_stop_a_build(rtx, dense, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    sidecar = build_engine(dense, tmp_path / "m.plan", options(timing_cache=tmp_path / "cache"))
    assert sidecar["timing_cache"] is None


@pytest.mark.parametrize(("precision", "kind"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_the_census_finds_the_precision_that_was_asked_for_and_its_islands(rtx, precision, kind, tmp_path):
    model = tiny_vit(depth=2)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[3] = 1e5
    islands = find_islands(model, images(4)) if precision == "fp16" else ()
    export_onnx(model, tmp_path / "m.onnx", precision=precision, opset=23, islands=islands)
    census = build_engine(tmp_path / "m.onnx", tmp_path / "m.plan", options(precision=precision))["census"]
    assert census["asked"] == kind
    weights, tensors = census["network"]["weights"], census["network"]["tensors"]
    assert weights[kind] > 5 * weights["float32"]
    assert (weights["float32"] > 1000) == (tensors["float32"] > 20) == bool(islands)  # a layer and the stream
    assert census["proof"] == ("network" if census["engine"] is None else "inspector")


def test_a_file_in_another_precision_than_asked_for_is_refused(rtx, dense, tmp_path):
    with pytest.raises(InputError, match=r"model\.onnx is in fp32, and was to become an engine in fp16; export it in"):
        build_engine(dense, tmp_path / "m.plan", options(precision="fp16"))


@pytest.mark.parametrize("said", ["fp16", None])
def test_a_file_that_lies_or_says_nothing_of_its_precision_is_found_out(rtx, dense, said, tmp_path):
    model = onnx.load(dense)
    del model.metadata_props[:]
    if said:
        model.metadata_props.add(key="vitprune.precision", value=said)
    onnx.save(model, tmp_path / "lie.onnx")
    with pytest.raises(NotSupported, match=r"was asked for float16, and of the weights in the network 0% are"):
        build_engine(tmp_path / "lie.onnx", tmp_path / "m.plan", options(precision="fp16"))
    assert not (tmp_path / "m.plan").exists()


def test_several_profiles_are_built_into_one_engine(rtx, dense, tmp_path):
    one = {"images": Shapes(*[(1, 3, 28, 28)] * 3)}
    sidecar = build_engine(dense, tmp_path / "m.plan", options(profiles=(one, DENSE)))
    assert [profile["images"][0][0] for profile in sidecar["profiles"]] == [1, 1]
    assert sidecar["profiles"][1]["images"][2][0] == 8


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"version_compatible": True}, InputError, "has no version compatibility: build the engine again for each"),
        ({"hardware_compatibility": "ampere_plus"}, InputError, "has no levels of hardware compatibility"),
        ({"refit": True}, MissingError, "can be refitted only where there is an NVIDIA driver"),
    ],
)
def test_what_tensorrt_rtx_has_not_is_a_sentence(rtx, dense, asked, error, message, tmp_path):
    if "refit" in asked and capabilities()["tensorrt_rtx"]["gpu"] is not None:
        pytest.skip("there is a GPU")
    with pytest.raises(error, match=message):
        build_engine(dense, tmp_path / "m.plan", options(**asked))


def test_a_node_that_will_not_parse_is_named(rtx, tmp_path):
    bad = graph_with_nonzero(tmp_path / "bad.onnx")
    with pytest.raises(
        NotSupported, match=r"bad\.onnx: TensorRT-RTX cannot parse the node where_it_counts of type Non"
    ):
        check_parses(bad, "tensorrt_rtx")
    profile = {"x": Shapes((4, 4), (4, 4), (4, 4))}
    with pytest.raises(NotSupported, match="where_it_counts"):
        build_engine(bad, tmp_path / "bad.plan", options(profile))
    assert [file.name for file in tmp_path.iterdir()] == ["bad.onnx"]  # nothing half-written


def test_a_good_file_parses(rtx, dense):
    check_parses(dense, "tensorrt_rtx")


def test_a_file_that_is_cut_off_is_no_onnx_file(rtx, dense, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(dense.read_bytes()[:5000])
    with pytest.raises(DamagedFile, match=r"cut\.onnx is cut off or not an ONNX file"):
        build_engine(tmp_path / "cut.onnx", tmp_path / "cut.plan", options())


def test_a_build_that_takes_too_long_is_killed(rtx, dense, tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(_trt_child.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(InputError, match=r"took longer than 0\.2 s; raise its time limit"):
        build_engine(dense, tmp_path / "slow.plan", options(timeout_s=0.2))
    assert [process.poll() for process in started] == [-signal.SIGKILL]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("profile", "others", "message"),
    [
        (
            DENSE,
            {"compute_capabilities": ("8.7",)},
            r"builds no engines for compute capability 8\.7, only for 7\.5, 8\.0",
        ),
        (DENSE, {"compute_capabilities": ("7.5", "8.6")}, r"compute capability 7\.5; leave that out or use fp16"),
        ({"pixels": DENSE["images"]}, {}, "needs a profile for images, got pixels"),
        ({"images": Shapes(*[(1, 3, 32, 32)] * 3)}, {}, r"for images within .*28, 28\], got \[1, 3, 32, 32\]"),
    ],
)
def test_what_does_not_fit_is_a_sentence(rtx, dense, profile, others, message, tmp_path):
    with pytest.raises((InputError, NotSupported), match=message):
        build_engine(dense, tmp_path / "m.plan", options(profile, **others))


def test_this_machine_builds_for_rtx_and_says_why_it_cannot_run(rtx):
    found = capabilities()["tensorrt_rtx"]
    assert found["builds"]
    assert found["version"] == rtx.__version__
    assert "8.9" in found["compute_capabilities"]
    assert found["runs"] == (found["gpu"] is not None) == (found["why"] == "")


# ---- building: what needs no TensorRT -----------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_missing_package_comes_with_the_command_that_brings_it(dense, tmp_path):
    with pytest.raises(MissingError, match=r"TensorRT cannot be imported .*; run `pip install 'vitprune\[tensorrt\]'`"):
        build_engine(dense, tmp_path / "m.plan", options(module="tensorrt"))


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("kill -SEGV $$", NotSupported, r"TensorRT-RTX crashed \(SIGSEGV\)"),
        ("kill -KILL $$", MissingError, "was killed, most likely for want of memory"),
        ("echo the reason >&2; exit 3", NotSupported, r"crashed \(exit code 3\); its last line: the reason"),
    ],
)
def test_a_child_that_dies_is_a_sentence(script, error, message, dense, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(error, match=message):
        build_engine(dense, tmp_path / "m.plan", options())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profiles": ()}, "an engine needs at least one profile"),
        ({"module": "tensorrt9"}, "module must be tensorrt or tensorrt_rtx, got 'tensorrt9'"),
        ({"timeout_s": 0}, "timeout_s must be > 0 seconds, got 0"),
        ({"workspace_mb": -1}, "workspace_mb must be > 0, got -1"),
        ({"precision": "int3"}, "precision must be one of fp32, fp16, bf16, got 'int3'"),
        ({"hardware_compatibility": "all"}, "hardware_compatibility must be one of none, ampere_plus, same_comp"),
        ({"profiles": ({"images": Shapes((4, 3), (2, 3), (8, 3))},)}, r"profile 0, images, axis 0: .* got 4, 2, 8"),
        ({"profiles": ({"images": Shapes((4, 3), (4,), (8, 3))},)}, "the same number of axes"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_starts(change, message):
    with pytest.raises(InputError, match=message):
        options(**change)


def test_an_onnx_file_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="there is no such ONNX file"):
        build_engine(tmp_path / "none.onnx", tmp_path / "m.plan", options())


# ---- loading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path):
    """A file in the place of a plan, with a sidecar that fits it."""
    path = tmp_path / "model.plan"
    path.write_bytes(b"plan")
    text = json.dumps({"sha256": sha256_file(path), "runtime": "tensorrt_rtx", "version": "1"})
    sidecar_path(path).write_text(text)
    return path


def test_without_a_driver_loading_stops_at_the_driver(engine):
    if capabilities()["tensorrt_rtx"]["gpu"] is not None:
        pytest.skip("there is a GPU")
    with pytest.raises(MissingError, match="no NVIDIA driver"):
        TensorRT.load(engine[0])


def test_a_changed_plan_is_refused(plan):
    plan.write_bytes(b"plam")
    with pytest.raises(DamagedFile, match=r"not the engine that model\.json describes"):
        TensorRT.load(plan)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_sidecar_is_refused(plan, text):
    sidecar_path(plan).write_text(text)
    with pytest.raises(DamagedFile, match=r"model\.json is damaged"):
        read_sidecar(plan)


def test_a_plan_without_a_sidecar_is_refused(plan):
    sidecar_path(plan).unlink()
    with pytest.raises(InputError, match=r"model\.json: there is no such file"):
        read_sidecar(plan)


def test_a_sidecar_of_before_is_read_where_it_was(plan):
    wanted = read_sidecar(plan)
    sidecar_path(plan).rename(plan.with_name("model.plan.json"))
    assert read_sidecar(plan) == wanted


def test_an_unknown_option_is_refused(plan):
    with pytest.raises(InputError, match="tensorrt has no option 'speed', it has module, profile, cuda, copies"):
        TensorRT.load(plan, options={"speed": 9})


# ---- running: our order of calls, against doubles of the driver and the engine -----------------------------------


class DoubleCuda(Cuda):
    """Device memory as arrays by address, a clock that ticks with every event, and a list of what was done."""

    package = "double"

    def __init__(self):
        self.memory, self.done, self.ran, self.ticks, self.next = {}, [], [], 0.0, 1000

    def device(self):
        return Device("double", "8.6", 1 << 30)

    def allocate(self, size_bytes):
        self.next += 1000
        self.memory[self.next] = np.zeros(size_bytes, np.uint8)
        return self.next

    def free(self, address):
        del self.memory[address]

    def pinned(self, shape, dtype):
        return np.zeros(shape, dtype)

    def stream(self):
        return "stream"

    def handle(self, stream):
        assert stream == "stream"
        return 7

    def synchronize(self, stream):
        self.done.append("wait")

    def copy_in(self, address, array, stream):
        self.done.append("in")
        self.memory[address][:] = array.view(np.uint8).reshape(-1)

    def copy_out(self, array, address, stream):
        self.done.append("out")
        array[...] = self.memory[address].view(array.dtype).reshape(array.shape)

    def event(self):
        return {}

    def record(self, event, stream):
        self.done.append("event")
        self.ticks += 1.5
        event["at"] = self.ticks

    def elapsed_ms(self, first, last):
        return last["at"] - first["at"]


class DoubleEngine:
    """Images [batch, 3, 2, 2] to their sum, [batch, 1]; batch 1 to 4."""

    num_io_tensors = 2
    profiles = ([(1, 3, 2, 2), (2, 3, 2, 2), (4, 3, 2, 2)],)
    works = True

    def __init__(self, cuda):
        self.cuda, self.shape, self.address = cuda, None, {}

    @property
    def num_optimization_profiles(self):
        return len(self.profiles)

    def create_execution_context(self):
        return DoubleContext(self)

    def create_engine_inspector(self):
        return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": [{"Name": form}]}))

    def get_tensor_name(self, place):
        return ("images", "logits")[place]

    def get_tensor_mode(self, name):
        return {"images": "in", "logits": "out"}[name]

    def get_tensor_dtype(self, name):
        return "float"

    def get_tensor_shape(self, name):
        batch = -1 if self.shape is None else self.shape[0]
        return (batch, 3, 2, 2) if name == "images" else (batch, 1)

    def get_tensor_profile_shape(self, name, profile):
        return self.profiles[profile]


class DoubleContext(DoubleEngine):
    """Of one profile."""

    def __init__(self, engine):
        super().__init__(engine.cuda)
        self.engine, self.profile = engine, None

    def set_optimization_profile_async(self, profile, stream):
        assert stream == 7
        self.profile = profile
        return True

    def set_input_shape(self, name, shape):
        self.shape = shape
        return True

    def set_tensor_address(self, name, address):
        self.address[name] = address

    def execute_async_v3(self, stream):
        assert stream == 7
        least, _, most = self.engine.profiles[self.profile]
        assert least <= self.shape <= most
        self.cuda.done.append("run")
        self.cuda.ran.append(self.profile)
        images = self.cuda.memory[self.address["images"]].view(np.float32).reshape(self.shape)
        self.cuda.memory[self.address["logits"]].view(np.float32)[:] = images.sum((1, 2, 3))
        return self.works


TRT = SimpleNamespace(
    __name__="tensorrt", __version__="0", TensorIOMode=SimpleNamespace(INPUT="in"), nptype=lambda dtype: np.float32,
    LayerInformationFormat=SimpleNamespace(JSON="as JSON"),
)  # fmt: skip


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr(tensorrt, "WARM_UP_S", 0.0)
    cuda = DoubleCuda()
    backend = TensorRT(TRT, DoubleEngine(cuda), cuda, 0, True)
    cuda.done.clear()
    return backend, cuda


def pictures(batch, start=0.0):
    return (start + np.arange(batch * 12, dtype=np.float32)).reshape(batch, 3, 2, 2)


def test_what_the_inspector_says_of_the_layers_comes_as_plain_data(loaded):
    assert loaded[0].layers() == {"Layers": [{"Name": "as JSON"}]}


def test_a_run_copies_in_runs_copies_out_and_waits(loaded):
    backend, cuda = loaded
    np.testing.assert_array_equal(backend.run(pictures(2)), [[66.0], [210.0]])
    assert cuda.done == ["in", "run", "out", "wait"]


def test_memory_is_kept_for_the_same_shape_renewed_for_another_and_freed_at_the_end(loaded):
    backend, cuda = loaded
    backend.run(pictures(2))
    held = set(cuda.memory)
    backend.run(pictures(2, start=1.0))
    assert set(cuda.memory) == held
    np.testing.assert_array_equal(backend.run(pictures(1, start=1.0)), [[78.0]])
    assert len(cuda.memory) == 2
    backend.close()
    backend.close()
    assert cuda.memory == {}


def test_an_answer_does_not_change_with_the_next_run(loaded):
    first = loaded[0].run(pictures(1))
    loaded[0].run(pictures(1, start=5.0))
    np.testing.assert_array_equal(first, [[66.0]])


def test_timing_counts_copies_and_events_stand_around_them(loaded):
    backend, cuda = loaded
    once = backend.bind({"images": pictures(2)})
    cuda.done.clear()
    assert once() == 1.5
    assert cuda.done == ["event", "in", "run", "out", "event", "wait"]


def test_timing_without_copies_runs_on_the_inputs_that_were_bound(loaded):
    cuda = loaded[1]
    backend = TensorRT(TRT, DoubleEngine(cuda), cuda, 0, False)
    once = backend.bind({"images": pictures(2)})
    cuda.done.clear()
    once()
    assert cuda.done == ["event", "run", "event", "wait"]


def test_two_bound_shapes_take_turns_on_their_own_memory(loaded):
    backend, cuda = loaded
    small, large = backend.bind({"images": pictures(1)}), backend.bind({"images": pictures(4)})
    engine = backend._context(0)
    for once, batch in ((small, 1), (large, 4), (small, 1)):
        once()
        assert engine.shape[0] == batch
        assert cuda.memory[engine.address["images"]].nbytes == batch * 48


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (pictures(5), r"float32 \[5, 3, 2, 2\]"),
        (pictures(2).astype(np.float64), r"float64 \[2, 3, 2, 2\]"),
        (pictures(2)[0], r"float32 \[3, 2, 2\]"),
    ],
)
def test_what_the_profile_does_not_allow_is_refused(loaded, images, got):
    with pytest.raises(InputError, match=rf"images must be float32 from \[1, 3, 2, 2\] to \[4, 3, 2, 2\], got {got}"):
        loaded[0].run(images)


def test_a_failed_run_is_an_error_and_not_an_answer(loaded, monkeypatch):
    monkeypatch.setattr(DoubleEngine, "works", False)
    with pytest.raises(MissingError, match="could not run the engine"):
        loaded[0].run(pictures(1))


def test_a_profile_that_the_engine_lacks_is_refused():
    cuda = DoubleCuda()
    with pytest.raises(InputError, match="this engine has 1 profiles, there is no 3"):
        TensorRT(TRT, DoubleEngine(cuda), cuda, 3, True)


@pytest.fixture
def many(monkeypatch):
    """An engine with a profile for batch 1, one for 1 to 4 tuned for 4, and one for 5 to 16 tuned for 8."""
    monkeypatch.setattr(tensorrt, "WARM_UP_S", 0.0)
    sizes = ((1, 1, 1), (1, 4, 4), (5, 8, 16))
    monkeypatch.setattr(DoubleEngine, "profiles", tuple([(n, 3, 2, 2) for n in one] for one in sizes))
    cuda = DoubleCuda()
    return TensorRT(TRT, DoubleEngine(cuda), cuda, None, True), cuda


def test_each_batch_runs_in_the_profile_that_is_tuned_nearest_to_it(many):
    backend, cuda = many
    for batch in (1, 3, 7, 16, 1):
        assert backend.run(pictures(batch)).shape == (batch, 1)
    assert cuda.ran == [0, 1, 2, 2, 0]
    assert sorted(backend._contexts) == [0, 1, 2]


def test_batches_of_several_profiles_take_turns_on_their_own_contexts(many):
    backend, cuda = many
    small, large = backend.bind({"images": pictures(1)}), backend.bind({"images": pictures(8)})
    cuda.ran.clear()
    for once in (small, large, small):
        once()
    assert cuda.ran == [0, 2, 0]
    backend.close()
    assert cuda.memory == {}


def test_a_batch_that_no_profile_takes_is_refused_with_all_of_them(many):
    with pytest.raises(
        InputError, match=r"from \[1, 3, 2, 2\] to \[1, 3, 2, 2\] or from .* got float32 \[17, 3, 2, 2\]"
    ):
        many[0].run(pictures(17))


def test_one_profile_can_be_asked_for(monkeypatch, many):
    cuda = DoubleCuda()
    backend = TensorRT(TRT, DoubleEngine(cuda), cuda, 1, True)
    backend.run(pictures(1))
    assert cuda.ran == [1]
    with pytest.raises(InputError, match="images must be"):
        backend.run(pictures(8))
