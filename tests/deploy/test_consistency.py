"""Each check of an engine fires on a fault that is planted for it, and a healthy engine passes all of them.

Faults are graphs that real ONNX Runtime runs. Where a graph cannot have the fault, as with a state that is carried from
run to run, a wrapper around the real engine plants it.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny import images, tiny_vit

from vitprune.errors import MissingError, NotSupported
from vitprune_deploy.backends import onnxruntime as backend
from vitprune_deploy.backends.base import Backend
from vitprune_deploy.backends.onnxruntime import OnnxRuntime
from vitprune_deploy.export.int8 import quantize_dynamic
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.profile import load_profile
from vitprune_deploy.remote.device import Here
from vitprune_deploy.validate import FEW, Figures, Limits, Served, arithmetic, check_consistency, judge, subject
from vitprune_deploy.validate.consistency import LIMITS, Shape, check_row
from vitprune_deploy.validate.shaken import moves

SERVED = Served(1, 4, 8, ((4, 4),))  # looked at: 1, 3, 4, 5 and 8


def graph(path, nodes, constants=None, batch="batch", opset=20):
    """``images`` [batch, 1, 4, 4] in rows ``x`` times a matrix are ``y`` [batch, 3]; ``nodes`` make it ``logits``."""
    rng = np.random.default_rng(0)
    stored = {"to_rows": np.array([0, 16], np.int64), "w": rng.standard_normal((16, 3)).astype(np.float32)}
    stored |= {name: np.array(value) for name, value in (constants or {}).items()}
    made = helper.make_graph(
        [helper.make_node("Reshape", ["images", "to_rows"], ["x"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
        + [helper.make_node(kind, ins, outs, **attributes) for kind, ins, outs, attributes in nodes],
        "toy",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def node(kind, ins, outs, **attributes):
    return kind, ins.split(), outs.split(), attributes


HEALTHY = [node("Relu", "y", "logits")]
SIZE = [node("Shape", "images", "size", start=0, end=1), node("Cast", "size", "batch_f", to=TensorProto.FLOAT)]


def few(seed=0):
    return np.random.default_rng(seed).standard_normal((FEW, 1, 4, 4)).astype(np.float32)


def looked_at(path, served=SERVED, computes="fp32", pictures=None, **planted):
    """The result for the engine in ``path``; ``planted`` replaces what can be done with it."""
    engine = replace(subject(Here(), "onnxruntime", path, path, threads=1), **planted)
    return check_consistency(engine, few() if pictures is None else pictures, served, computes)


def failed(found):
    return {check.name for check in found.checks if not check.passed}


def only(found, name):
    return next(check for check in found.checks if check.name == name)


# ---- a healthy engine --------------------------------------------------------------------------------------------


def test_a_healthy_engine_passes_every_check_at_every_batch(tmp_path):
    found = looked_at(graph(tmp_path / "m.onnx", HEALTHY))
    assert found.passed
    assert found.reasons() == ()
    seen = {check.name: sorted({case.shape.batch for case in check.cases}) for check in found.checks}
    assert seen == {
        "finite": [1, 3, 4, 5, 8],
        **{name: [3, 4, 5, 8] for name in ("alone", "identical rows", "permuted rows", "poisoned rows")},
        **{name: [4] for name in ("second session", "second process", "unfused", "repeated")},
    }
    assert all(sum(case.rows for case in check.cases) for check in found.checks)
    assert not any(check.skipped for check in found.checks)


def test_the_result_is_plain_data_with_what_was_seen_and_the_limit(tmp_path):
    plain = looked_at(graph(tmp_path / "m.onnx", HEALTHY)).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert (plain["arithmetic"], plain["passed"]) == ("fp32", True)
    alone = plain["checks"][1]
    assert (alone["name"], alone["batches"], alone["wrong"], alone["ties"]) == ("alone", [3, 4, 5, 8], 0, 0)
    assert 0 <= alone["max_abs"] <= 1e-5  # fp32, one product of 16
    assert alone["limit"] >= 1e-4
    assert check_row(alone)[-1] == "passed"


def test_an_engine_that_takes_one_batch_alone_is_checked_at_that(tmp_path):
    found = looked_at(graph(tmp_path / "m.onnx", HEALTHY, batch=4), Served(4, 4, 4, ((4, 4),)))
    assert found.passed
    assert [case.shape.batch for case in only(found, "alone").cases] == [4]
    turned = [node("Sub", "y mean", "logits"), node("ReduceMean", "y axes", "mean", keepdims=1)][::-1]
    path = graph(tmp_path / "bad.onnx", turned, {"axes": np.array([0], np.int64)}, batch=4)
    assert "alone" in failed(looked_at(path, Served(4, 4, 4, ((4, 4),))))


def test_an_engine_of_one_image_at_a_time_has_no_rows_to_compare(tmp_path):
    found = looked_at(graph(tmp_path / "m.onnx", HEALTHY, batch=1), Served(1, 1, 1, ((4, 4),)))
    assert found.passed
    assert {check.name for check in found.checks if check.skipped == "one image is served at a time"} == {
        "alone", "identical rows", "permuted rows", "poisoned rows",
    }  # fmt: skip
    assert [case.rows for case in only(found, "repeated").cases] == [FEW]


def test_the_shapes_are_the_ends_of_what_is_served_and_odd_ones_between():
    batches = lambda *ends: [shape.batch for shape in Served(*ends, ((4, 4),)).shapes()]  # noqa: E731
    assert batches(1, 32, 64) == [1, 5, 32, 45, 64]
    assert batches(1, 1, 8) == [1, 3, 8]
    assert batches(1, 1, 1) == [1]
    assert batches(8, 8, 16) == [8, 11, 16]
    assert Served(1, 2, 4, ((8, 8), (4, 4), (16, 12))).shapes()[-2:] == [Shape(1, (4, 4)), Shape(4, (16, 12))]


def test_a_profile_says_which_shapes_are_served(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "p.yaml").write_text(
        "model: {name: vit_tiny_patch16_224, pretrained: false}\ndata: {source: images}\nbudget: {speedup: 2}\n"
        "accuracy: {min_agreement: 90}\ninput:\n  batch: {min: 1, opt: 2, max: 9}\n"
        "  dynamic_width: {min: 112, max: 448, step: 16}\n"
    )
    found = Served.of(load_profile(tmp_path / "p.yaml"), (224, 224))
    assert found == Served(1, 2, 9, ((224, 224), (224, 112), (224, 448)))


# ---- planted faults ----------------------------------------------------------------------------------------------

AXES = {"axes": np.array([0], np.int64)}
FAULTS = {
    # answers depend on the other rows, whatever their order
    "other rows": (
        [node("ReduceMean", "y axes", "mean", keepdims=1), node("Sub", "y mean", "logits")],
        AXES,
        {"alone"},
    ),
    # answers depend on how many rows there are
    "batch size": ([*SIZE, node("Mul", "y batch_f", "logits")], {}, {"alone"}),
    # answers depend on the place in the batch
    "order": (
        [*SIZE, node("Squeeze", "batch_f", "count"), node("Range", "zero count one", "place"),
         node("Unsqueeze", "place back", "column"), node("Add", "y column", "logits")],
        {"zero": np.float32(0), "one": np.float32(1), "back": np.array([1], np.int64)},
        {"alone", "identical rows", "permuted rows"},
    ),
    # NaN at one size alone
    "size": (
        [*SIZE, node("Equal", "size five", "is"), node("Where", "is nan y", "logits")],
        {"five": np.array([5], np.int64), "nan": np.float32(np.nan)},
        {"finite"},
    ),
    # nothing of another row but whether it is a number
    "poison": (
        [node("ReduceMean", "y axes", "mean", keepdims=1), node("Mul", "mean zero", "nothing"),
         node("Add", "y nothing", "logits")],
        AXES | {"zero": np.float32(0)},
        {"poisoned rows"},
    ),
    # the export has fixed that rows come in pairs
    "no odd size": (
        [node("Reshape", "y pairs", "p"), node("Reshape", "p rows", "logits")],
        {"pairs": np.array([-1, 2, 3], np.int64), "rows": np.array([-1, 3], np.int64)},
        {"finite"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_graph_is_found_by_its_check_and_by_no_other(name, tmp_path):
    nodes, constants, want = FAULTS[name]
    # a matter of the graph itself: with nothing fused, and in any session or process, it is the same
    served = Served(2, 4, 8, ((4, 4),)) if name == "no odd size" else SERVED
    found = looked_at(graph(tmp_path / "m.onnx", nodes, constants), served)
    if name in ("other rows", "batch size"):  # what NaN does to a mean is the same fault once more
        assert want <= failed(found) <= want | {"poisoned rows"}
    else:
        assert failed(found) == want


def test_the_reason_names_the_check_the_batches_and_the_worst_difference(tmp_path):
    nodes, constants, _ = FAULTS["size"]
    (reason,) = looked_at(graph(tmp_path / "size.onnx", nodes, constants)).reasons()
    assert reason == (
        "check 'finite' at batch 5: images get NaN, infinity or no answer, in 5 of 5 rows; do not use this engine"
    )
    nodes, constants, _ = FAULTS["batch size"]
    (reason,) = looked_at(graph(tmp_path / "batch.onnx", nodes, constants)).reasons()
    assert reason.startswith("check 'alone' at batch 3, 4, 5, 8: an image gets another answer among others than alone")
    assert "in 8 of 8 rows by up to" in reason
    nodes, constants, _ = FAULTS["no odd size"]
    reasons = looked_at(graph(tmp_path / "odd.onnx", nodes, constants), Served(2, 4, 8, ((4, 4),))).reasons()
    assert reasons[0].startswith("check 'finite' at batch 3, 5: images get NaN, infinity or no answer: ")
    nodes, constants, _ = FAULTS["poison"]
    (reason,) = looked_at(graph(tmp_path / "poison.onnx", nodes, constants)).reasons()
    assert "by NaN or infinity where" in reason


def test_what_fails_makes_the_verdict_fail_with_that_reason():
    good = Figures(latency=None, samples=0, inconsistent=("check 'alone' at batch 8: wrong",))
    found = judge(Limits(1.0), good)
    assert found.verdict == "fail"
    assert found.reasons[0] == "check 'alone' at batch 8: wrong"


def test_an_image_of_one_colour_that_gets_nan_is_found(tmp_path):
    nodes = [node("ReduceMin", "x axes", "least", keepdims=1), node("Sub", "x least", "above"),
             node("ReduceSum", "above axes", "width", keepdims=1), node("Div", "width width", "one"),
             node("Mul", "y one", "logits")]  # fmt: skip
    path = graph(tmp_path / "m.onnx", nodes, {"axes": np.array([1], np.int64)})
    found = looked_at(path)  # 0 / 0 for an image that is nowhere above its own least value
    assert failed(found) == {"finite"}
    assert only(found, "finite").reason().startswith("check 'finite' at batch 1: ")


def test_any_of_the_images_that_gets_nan_is_found_where_one_is_served_at_a_time(tmp_path):
    nodes = [node("ReduceMax", "x axes", "most", keepdims=1), node("Greater", "most limit", "is"),
             node("Where", "is nan y", "logits")]  # fmt: skip
    constants = {"axes": np.array([1], np.int64), "limit": np.float32(90), "nan": np.float32(np.nan)}
    pictures = few()
    pictures[5, 0, 1, 1] = 99
    found = looked_at(graph(tmp_path / "m.onnx", nodes, constants), Served(1, 1, 1, ((4, 4),)), pictures=pictures)
    assert failed(found) == {"finite"}
    assert [case.wrong for case in only(found, "finite").cases] == [1, 0, 1]  # each alone; the first; of one colour


def test_a_fusion_that_computes_something_else_is_found(tmp_path, monkeypatch):
    """ONNX Runtime's own approximation of GELU, which it applies where it is asked to while it optimises."""
    constants = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    nodes = [node("Div", "y root", "a"), node("Erf", "a", "b"), node("Add", "b one", "c"), node("Mul", "y c", "d"),
             node("Mul", "d half", "gelu"), node("Relu", "y", "relu"), node("Sub", "gelu relu", "logits")]  # fmt: skip
    # opset 17 has no GELU of its own, which would be left as it is
    path, pictures = graph(tmp_path / "m.onnx", nodes, constants, opset=17), 0.3 * few()
    assert looked_at(path, pictures=pictures).passed
    usual = backend._session_options

    def approximate(*arguments, **more):
        options = usual(*arguments, **more)
        options.add_session_config_entry("optimization.enable_gelu_approximation", "1")
        return options

    monkeypatch.setattr(backend, "_session_options", approximate)
    engine = subject(Here(), "onnxruntime", path, path, threads=1)
    found = looked_at(path, pictures=pictures, apart=here(engine))  # another process would not be patched
    assert failed(found) == {"unfused"}
    assert only(found, "unfused").cases[0].max_abs < 1e-3  # the approximation is good to 5e-4


class Wrapped(Backend):
    """A real engine whose answers pass through ``change(answers, number of the run)``."""

    def __init__(self, inner, change=lambda answers, run: answers, keep=False):
        self.inner, self.change, self.keep, self.runs = inner, change, keep, 0
        self.runtime, self.provider, self.inputs, self.outputs = "x", "cpu", inner.inputs, inner.outputs

    @classmethod
    def load(cls, path, **more):
        raise NotImplementedError

    def run(self, images):
        self.runs += 1
        return self.change(self.inner.run(images), self.runs)

    def bind(self, feed):
        return self.inner.bind(feed)

    def close(self):
        if not self.keep:
            self.inner.close()


def here(engine):
    """The answers of a second process, given in this one."""

    def apart(batches):
        with engine.open() as opened:
            found = np.stack([opened.run(batch) for batch in batches])
        return nullcontext(lambda: found)

    return apart


def test_a_state_that_is_carried_from_run_to_run_is_found(tmp_path):
    path = graph(tmp_path / "m.onnx", HEALTHY)
    drifting = lambda: Wrapped(OnnxRuntime.load(path), lambda answers, run: answers + 0.01 * run)  # noqa: E731
    assert "repeated" in failed(looked_at(path, open=drifting))


def test_a_second_session_that_answers_otherwise_is_found(tmp_path):
    path, opened = graph(tmp_path / "m.onnx", HEALTHY), []

    def opens():
        opened.append(len(opened))
        shift = 0.1 * opened[-1]
        return Wrapped(OnnxRuntime.load(path), lambda answers, run: answers + shift)

    assert failed(looked_at(path, open=opens)) == {"second session"}


def test_another_process_that_answers_otherwise_is_found(tmp_path):
    """The file on the disk is no longer the one that was loaded here."""
    path = graph(tmp_path / "m.onnx", HEALTHY)
    loaded = OnnxRuntime.load(path)
    graph(path, [node("Neg", "y", "logits")])
    found = looked_at(path, open=lambda: Wrapped(loaded, keep=True), unfused="of the other file")
    assert failed(found) == {"second process"}


def test_a_process_that_dies_is_a_failed_check_with_its_last_words(tmp_path):
    path = graph(tmp_path / "m.onnx", HEALTHY)
    gone = subject(Here(), "onnxruntime", tmp_path / "none.onnx", path)
    found = looked_at(path, apart=gone.apart)
    assert failed(found) == {"second process"}
    assert "there is no such model file" in found.reasons()[0]


def test_a_check_that_cannot_be_made_says_why_and_does_not_fail(tmp_path):
    path = graph(tmp_path / "m.onnx", HEALTHY)

    def refuses():
        raise NotSupported("no kernel for a node of it")

    for unfused, why in (("the ONNX file is not at hand", "not at hand"), (refuses, "no kernel")):
        found = looked_at(path, unfused=unfused)
        assert found.passed
        assert why in only(found, "unfused").skipped
        assert check_row(only(found, "unfused").to_dict())[-1].startswith("not made: ")


@pytest.mark.parametrize(
    ("asked", "computes"),
    [
        (("fp32", "onnxruntime", {"provider": "cpu"}), "fp32"),
        (("fp32", "onnxruntime", {}), "fp32"),
        (("fp32", "onnxruntime", {"provider": "cuda", "provider_options": {}}), "tf32"),
        (("fp32", "onnxruntime", {"provider": "cuda", "provider_options": {"use_tf32": 0}}), "fp32"),
        (("fp32", "onnxruntime", {"provider": "openvino"}), "fp32"),
        (("bf16", "openvino", {"precision": "bf16"}), "bf16"),
        (("int8", "onnxruntime", {"provider": "cpu"}), "dynamic int8"),
        (("int8", "openvino", {"precision": "fp32"}), "int8"),
        (("fp32", "tensorrt", {"cuda": None}), "tf32"),
        (("fp16", "tensorrt-rtx", {}), "fp16"),
        (("fp16", "onnxruntime", {"provider": "cpu"}), "fp16"),
    ],
)
def test_limits_go_by_what_the_device_computes_in(asked, computes):
    assert arithmetic(*asked) == computes
    assert computes in LIMITS


# ---- ties --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reducing(tmp_path_factory):
    """A model that drops tokens, its file, and a file whose attention scores are larger by twenty millionths."""
    model, folder = tiny_vit(depth=2, keep={0: 30}, reducer="evit"), tmp_path_factory.mktemp("ties")
    export_onnx(model, folder / "model.onnx", batch=(1, 8))
    file = onnx.load(folder / "model.onnx")
    product = next(one for one in file.graph.node if one.name.startswith("blocks.0.attn.qkv/MatMul"))
    weight = next(one for one in file.graph.initializer if one.name == product.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1 + 2e-5), weight.name))
    onnx.save(file, folder / "nudged.onnx")
    return model, folder


@torch.no_grad()
def on_the_edge(model):
    """Images around a point at which one patch takes another's place among those that the first block keeps."""

    def kept(image):
        *_, attention = model.blocks[0].attend(model.embed(image))
        return attention.class_row().mean(1)[:, 1:].topk(29).indices.sort().values

    first, second = images(2, seed=5).split(1)
    low, high, start = 0.0, 1.0, kept(first)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.equal(kept(first.lerp(second, middle)), start) else (low, middle)
    return torch.cat([first.lerp(second, high + step * 1e-6) for step in range(-4, 4)]).numpy()


OF_28 = Served(1, 4, 8, ((28, 28),))


def nudged(folder):
    """An engine whose unfused form keeps other tokens where two scores are nearly equal."""
    engine = subject(Here(), "onnxruntime", folder / "model.onnx", folder / "model.onnx", threads=1)
    return replace(engine, unfused=lambda: OnnxRuntime.load(folder / "nudged.onnx", threads=1), apart=here(engine))


def test_another_choice_between_nearly_equal_scores_is_a_tie_and_no_fault(reducing):
    model, folder = reducing
    found = check_consistency(nudged(folder), on_the_edge(model), OF_28)
    assert found.passed
    assert only(found, "unfused").cases[0].ties > 0
    blind = replace(nudged(folder), moves=lambda images, share: np.zeros(len(images)))
    assert "unfused" in failed(check_consistency(blind, on_the_edge(model), OF_28))


def test_a_tie_excuses_no_more_than_it_can_explain(reducing):
    model, folder = reducing
    engine = replace(
        nudged(folder),
        unfused=lambda: Wrapped(OnnxRuntime.load(folder / "nudged.onnx"), lambda answers, run: answers + 10.0),
    )
    assert failed(check_consistency(engine, on_the_edge(model), OF_28)) == {"unfused"}


def test_noise_moves_the_answers_of_images_at_a_tie_and_of_no_others(reducing):
    model, folder = reducing
    edge, far = on_the_edge(model), images(8, seed=3).numpy()
    assert (moves(folder / "model.onnx", edge, 1e-4) > 1e-3).all()
    assert np.median(moves(folder / "model.onnx", far, 1e-6)) < 1e-5
    assert (moves(folder / "model.onnx", far, 0.5) > 1e-3).all()  # so much noise chooses at random
    assert (moves(folder / "model.onnx", edge, 1e-4) == moves(folder / "model.onnx", edge, 1e-4)).all()


def test_a_model_that_ranks_nothing_is_not_moved(tmp_path):
    assert moves(graph(tmp_path / "m.onnx", HEALTHY), few(), 0.5).tolist() == [0.0] * FEW


def test_telling_a_tie_from_a_fault_takes_the_graph(tmp_path):
    nodes, constants, _ = FAULTS["batch size"]
    engine = subject(Here(), "onnxruntime", graph(tmp_path / "m.onnx", nodes, constants), None, threads=1)
    with pytest.raises(MissingError, match="telling a tie between scores from a fault takes the ONNX file"):
        check_consistency(engine, few(), SERVED)


# ---- exported models -----------------------------------------------------------------------------------------------


def test_an_exported_model_in_fp16_passes(tmp_path):
    model = tiny_vit(depth=1, reducer="tome", keep={0: 30})
    export_onnx(model, tmp_path / "m.onnx", batch=(1, 8), precision="fp16")
    found = looked_at(tmp_path / "m.onnx", OF_28, "fp16", images(8).numpy())
    assert found.reasons() == ()
    assert only(found, "alone").cases[0].limit >= LIMITS["fp16"].output


def test_dynamic_int8_passes_but_for_the_scale_that_a_batch_shares(tmp_path):
    export_onnx(tiny_vit(depth=1), tmp_path / "m.onnx", batch=(1, 8))
    quantize_dynamic(tmp_path / "m.onnx", tmp_path / "int8.onnx")
    found = looked_at(tmp_path / "int8.onnx", OF_28, "dynamic int8", images(8).numpy())
    assert found.reasons() == ()
    assert only(found, "poisoned rows").skipped.startswith("one scale serves a whole batch")
    strict = looked_at(tmp_path / "int8.onnx", OF_28, "int8", images(8).numpy())
    assert not only(strict, "poisoned rows").passed


def test_image_sizes_that_are_free_are_checked_at_both_ends(tmp_path):
    """The brightest pixel; of the largest image alone, that of all images of a batch."""
    nodes = [
        helper.make_node("Shape", ["images"], ["width"], start=3, end=4),
        helper.make_node("Equal", ["width", "wide"], ["is"]),
        helper.make_node("ReduceMax", ["images", "each"], ["own"], keepdims=0),
        helper.make_node("ReduceMax", ["images"], ["common"], keepdims=0),
        helper.make_node("Where", ["is", "common", "own"], ["logits"]),
    ]
    stored = {"wide": [9], "each": [2, 3]}
    made = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, "height", "width"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in stored.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(made, opset_imports=opset, ir_version=9), tmp_path / "m.onnx")
    found = looked_at(tmp_path / "m.onnx", Served(1, 2, 4, ((4, 4), (2, 3), (8, 9))))
    shapes = {case.shape for case in only(found, "finite").cases}
    assert shapes == {*(Shape(n, (4, 4)) for n in (1, 2, 3, 4)), *(Shape(n, (8, 9)) for n in (1, 4)), Shape(1, (2, 3))}
    assert "alone" in failed(found)
    assert [case.shape for case in only(found, "alone").cases if case.wrong] == [Shape(4, (8, 9))]
    assert only(found, "alone").reason().startswith("check 'alone' at batch 4 of 8 x 9 pixels: ")
