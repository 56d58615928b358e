"""What is counted in networks and engines, what is refused by it, and how an engine gets new weights.

The inspector's texts are of the forms that TensorRT 8, 10 and 11 document and that others have published; an inspector
itself needs a GPU. So does refitting: there, a double shows our order of calls.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper
from tiny import tiny_vit

from vitprune.errors import InputError, MissingError
from vitprune_deploy.backends import _onnx_file, _trt_engine, _trt_refit
from vitprune_deploy.backends._trt_census import check_engine, check_network, check_size, of_inspection, tells
from vitprune_deploy.backends._trt_common import Refused
from vitprune_deploy.backends.tensorrt import read_sidecar, refit_engine, sidecar_path
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.files import sha256_file


def layer(kind, gives, **more):
    return {
        "Name": f"{kind}\x1fpart",
        "LayerType": kind,
        "Outputs": [{"Format/Datatype": one} for one in gives],
        **more,
    }


INSPECTED = json.dumps(
    {
        "Layers": [
            layer("gemm", ["Half"], TacticName="sm80_xmma_gemm_f16f16_f16f32_f32_tn_n"),
            layer("kgen", ["Half", "Half"]),
            layer("fusion", ["Float"]),
            layer("CaskConvolution", ["Row major linear FP16 format"], Weights={"Type": "Half", "Count": 4608}),
            layer("Reformat", ["BFloat16"], Bias={"Type": "Float", "Count": 8}),
            layer("NoOp", ["N/A due to dynamic shapes"]),
            layer("shape_call", ["Int64"]),
            {"Name": "signal", "LayerType": "signal"},
        ],
        "Bindings": ["images", "logits"],
    }
).replace("\\u001f", "\x1f")  # inspectors write it as it is


def test_an_inspection_is_counted_by_number_format():
    assert of_inspection(INSPECTED) == {
        "layers": 8,
        "tensors": {"float16": 4, "float32": 1, "bfloat16": 1},
        "weights": {"float16": 4608, "float32": 8},
        "unknown": 3,
    }


@pytest.mark.parametrize("text", ['{"Layers": ["gemm 1", "gemm 2"]}', "no JSON", "{}", "[]"])
def test_an_inspection_without_details_proves_nothing(text):
    found = of_inspection(text)
    assert (found["tensors"], found["weights"]) == ({}, {})
    assert not tells(found)


def test_a_few_layers_of_many_prove_nothing():
    assert tells(of_inspection(INSPECTED))
    hidden = [layer("gemm", ["N/A due to dynamic shapes"])] * 9
    assert not tells(of_inspection(json.dumps({"Layers": [layer("kgen", ["Float"]), *hidden]})))


NETWORK = {"tensors": {"float16": 90, "float32": 10}, "weights": {"float16": 900, "float32": 100}}


@pytest.mark.parametrize(
    ("weights", "wanted", "typed", "refused"),
    [
        ({"float16": 900, "float32": 100}, "float16", {"float16": 900, "float32": 100}, False),
        ({"float16": 900, "float32": 100}, "float16", {"float16": 1000}, True),  # more in fp32 than the file has
        ({"float16": 300, "float32": 700}, "float16", {"float16": 300, "float32": 700}, False),  # many islands
        ({"float16": 300, "float32": 700}, "float16", {}, True),
        ({"float32": 1000}, "float16", {"float32": 1000}, True),  # fp32 is never fp16, whatever the file says
        ({"float32": 1000}, "bfloat16", {}, True),
        ({"float16": 10, "float32": 990}, "float32", {}, True),
        ({"float32": 1000}, "float32", {}, False),
        ({"float32": 1000}, None, {}, False),
        ({}, "float16", {}, False),  # without weights there is nothing to tell
    ],
)
def test_a_network_must_hold_its_weights_as_asked(weights, wanted, typed, refused):
    found = {"tensors": {}, "weights": weights}
    if not refused:
        check_network(found, wanted, typed)
        return
    with pytest.raises(Refused, match=f"was asked for {wanted}, and of the weights in the network"):
        check_network(found, wanted, typed)


@pytest.mark.parametrize(
    ("built", "refused"),
    [
        ({"float16": 60, "float32": 40}, False),
        ({"float32": 50}, True),
        ({"float16": 10, "float32": 40}, True),
    ],
)
def test_an_engine_must_compute_as_its_network_was_typed(built, refused):
    if not refused:
        check_engine({"tensors": built}, NETWORK, "float16")
        return
    with pytest.raises(Refused, match=r"built an engine in which \d+% of what layers give is .* the network has 90%"):
        check_engine({"tensors": built}, NETWORK, "float16")


def test_a_plan_of_the_size_of_fp32_is_refused_where_size_tells():
    vit_small = {"weights": {"float16": 22_000_000}}
    assert check_size(51_000_000, vit_small, "float16")
    with pytest.raises(Refused, match="built a plan of 97 MB, where its weights take 44 MB and would take 88 MB in fl"):
        check_size(97_000_000, vit_small, "float16")
    assert not check_size(1_900_000, {"weights": {"float16": 20_000}}, "float16")  # kernels alone
    assert not check_size(97_000_000, {"weights": {"float32": 22_000_000}}, "float32")


# ---- what an ONNX file says of itself -----------------------------------------------------------------------------


def test_metadata_are_read_without_the_package_onnx_and_only_ours(tmp_path):
    export_onnx(tiny_vit(depth=1), tmp_path / "m.onnx", precision="fp16", metadata={"heads": "[4]", "plan": "é"})
    model = onnx.load(tmp_path / "m.onnx")
    model.metadata_props.add(key="somebody.else", value="x")
    onnx.save(model, tmp_path / "m.onnx")
    found = _onnx_file.metadata(tmp_path / "m.onnx")
    ours = {p.key.removeprefix("vitprune."): p.value for p in model.metadata_props if p.key.startswith("vitprune.")}
    assert found == ours
    assert found["plan"] == "é"
    assert _onnx_file.structure(tmp_path / "m.onnx") == {k: found[k] for k in ("precision", "heads", "weights")}
    assert sum(_onnx_file.weights(tmp_path / "m.onnx").values()) > 1000


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x3a\xff\xff\xff\xff\x7f", bytes(range(256))])
def test_a_file_that_is_no_onnx_file_says_nothing(content, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    assert _onnx_file.metadata(tmp_path / "m.onnx") == {}
    assert _onnx_file.weights(tmp_path / "m.onnx") == {}


def test_weights_beside_a_file_are_part_of_what_it_is(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"graph")
    (tmp_path / "m.onnx.data").write_bytes(b"weights")
    assert _onnx_file.identity(tmp_path / "m.onnx") == {
        "name": "m.onnx",
        "sha256": sha256_file(tmp_path / "m.onnx"),
        "external_data": {"m.onnx.data": sha256_file(tmp_path / "m.onnx.data")},
    }


# ---- new weights --------------------------------------------------------------------------------------------------


def a_file(path, **metadata):
    """An ONNX file with metadata and next to nothing else."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([], "g", [value], [value]))
    for key, text in metadata.items():
        model.metadata_props.add(key=f"vitprune.{key}", value=text)
    onnx.save(model, path)
    return path


@pytest.fixture
def refittable(tmp_path):
    """A file in the place of a plan that was built to be refitted."""
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"plan")
    structure = _onnx_file.structure(a_file(tmp_path / "first.onnx", heads="[4]", plan_sha256='"abc"'))
    sidecar = {"sha256": sha256_file(plan), "runtime": "tensorrt", "version": "11.4.0", "flags": ["REFIT"],
               "onnx": {"name": "first.onnx", "structure": structure}}  # fmt: skip
    sidecar_path(plan).write_text(json.dumps(sidecar))
    return plan


def test_weights_of_another_plan_are_refused(refittable, tmp_path):
    other = a_file(tmp_path / "other.onnx", heads="[3]", plan_sha256='"abc"')
    with pytest.raises(InputError, match=r"other\.onnx differs from first\.onnx, which .* was built from, in heads"):
        refit_engine(refittable, other, tmp_path / "new.plan")


def test_an_engine_that_was_not_built_for_it_is_refused(refittable, tmp_path):
    sidecar = json.loads(sidecar_path(refittable).read_text())
    sidecar_path(refittable).write_text(json.dumps(sidecar | {"flags": []}))
    with pytest.raises(InputError, match=r"was not built to be refitted; set runtime\.refit: true and build it again"):
        refit_engine(refittable, tmp_path / "first.onnx", tmp_path / "new.plan")


def test_a_refitted_engine_has_a_sidecar_of_its_own_and_names_the_old_one(refittable, tmp_path, monkeypatch):
    def ask(action, module, request, **_):
        assert (action, module, request["engine"], request["host_code"]) == (
            "refit",
            "tensorrt",
            str(refittable),
            False,
        )
        with open(request["plan"], "wb") as file:  # noqa: PTH123
            file.write(b"new plan")
        return {}

    monkeypatch.setattr(_trt_engine, "ask", ask)
    trained = a_file(tmp_path / "trained.onnx", heads="[4]", plan_sha256='"abc"', torch="2.14")
    found = refit_engine(refittable, trained, tmp_path / "new.plan")
    assert read_sidecar(tmp_path / "new.plan") == found
    assert found["onnx"]["sha256"] == sha256_file(trained)
    assert found["refitted_from"] == sha256_file(refittable)
    assert found["flags"] == ["REFIT"]  # and can be refitted again


class DoubleTrt:
    """The part of TensorRT that refitting calls; ``done`` is the order."""

    __version__ = "0"
    SerializationFlag = SimpleNamespace(EXCLUDE_WEIGHTS="exclude", __members__={"INCLUDE_REFIT": "refit"})

    def __init__(self, refittable=True, taken=True, missing=()):
        self.refittable, self.taken, self.missing, self.done = refittable, taken, missing, []

    def __getattr__(self, name):
        if name not in ("Runtime", "Refitter", "OnnxParserRefitter"):
            raise AttributeError(name)
        return lambda *_: self

    ILogger = type("ILogger", (), {"ERROR": 1, "__init__": lambda self: None})
    num_errors = 0

    def deserialize_cuda_engine(self, data):
        self.done.append(("load", data))
        return self

    def refit_from_file(self, path):
        self.done.append(("read", path))
        return self.taken

    def get_missing_weights(self):
        return self.missing

    def refit_cuda_engine(self):
        self.done.append("refit")
        return True

    def create_serialization_config(self):
        return SimpleNamespace(clear_flag=lambda flag: self.done.append(f"no {flag}"), set_flag=self.done.append)

    def serialize_with_config(self, config):
        return b"new plan"


@pytest.fixture
def request_to_refit(tmp_path, monkeypatch):
    (tmp_path / "old.plan").write_bytes(b"old plan")
    monkeypatch.setattr(_trt_refit, "gpu", lambda: ({"name": "L4"}, ""))
    return {"module": "tensorrt", "engine": str(tmp_path / "old.plan"), "onnx": "m.onnx",
            "plan": str(tmp_path / "new.plan"), "host_code": False}  # fmt: skip


def test_weights_are_read_checked_and_put_in_before_the_engine_is_written_whole(
    request_to_refit, monkeypatch, tmp_path
):
    trt = DoubleTrt()
    monkeypatch.setattr(_trt_refit, "load", lambda module: trt)
    _trt_refit.refit(request_to_refit, print)
    assert trt.done == [("load", b"old plan"), ("read", "m.onnx"), "refit", "no exclude", "refit"]
    assert (tmp_path / "new.plan").read_bytes() == b"new plan"


@pytest.mark.parametrize(
    ("trt", "message"),
    [
        (DoubleTrt(refittable=False), "it was not built for that"),
        (DoubleTrt(taken=False), "does not take the weights: no reason given"),
        (DoubleTrt(missing=["a", "b", "c", "d"]), "finds no new weights for a, b, c: the file is of another model"),
    ],
)
def test_an_engine_is_not_refitted_by_halves(trt, message, request_to_refit, monkeypatch, tmp_path):
    monkeypatch.setattr(_trt_refit, "load", lambda module: trt)
    with pytest.raises(Refused, match=message):
        _trt_refit.refit(request_to_refit, print)
    assert not (tmp_path / "new.plan").exists()


def test_refitting_without_a_gpu_is_a_sentence(refittable, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    if _trt_refit.gpu()[0] is not None:
        pytest.skip("there is a GPU")
    sidecar = json.loads(sidecar_path(refittable).read_text())
    sidecar_path(refittable).write_text(json.dumps(sidecar | {"runtime": "tensorrt_rtx"}))
    with pytest.raises(MissingError, match="changes weights on the GPU that the engine is for, and no NVIDIA driver"):
        refit_engine(refittable, tmp_path / "first.onnx", tmp_path / "new.plan")
    assert not (tmp_path / "new.plan").exists()
