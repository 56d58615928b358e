"""Stages of a build by themselves: what they hand to runtimes, what they compare, and what the manifest says of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx import TensorProto, helper

from vitprune import parts
from vitprune.errors import InputError, MissingError, NotSupported
from vitprune.search.counts import TokenMethod
from vitprune.search.probes import kl_to_dense
from vitprune.surgery import reduce_tokens
from vitprune.tokens.base import Reducer
from vitprune_deploy.backends import tensorrt
from vitprune_deploy.backends._cuda import open_cuda
from vitprune_deploy.backends.onnxruntime import OnnxRuntime
from vitprune_deploy.build import account, int8, judge, make, runtimes, screen, soundness, training
from vitprune_deploy.build.bench import Bench
from vitprune_deploy.data import Preprocess
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.files import sha256_file
from vitprune_deploy.profile import load_profile
from vitprune_deploy.runtime import Model

PROFILE = """\
model: {name: vit_tiny_patch16_224, pretrained: false}
data: {source: images}
budget: {speedup: 2}
accuracy: {min_agreement: 90}
"""


@pytest.fixture
def profile(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "p.yaml").write_text(PROFILE)
    return lambda *overrides: load_profile(tmp_path / "p.yaml", overrides)


def a_bench(profile, folder, **more):
    """A bench with two tiny models, and what earlier stages wrote."""
    for name in ("search", "export", "engines"):
        (folder / name).mkdir()
    (folder / "search" / "plan.yaml").write_text("a plan")
    folders = {name: folder / name for name in ("search", "export", "engines")}
    models = {"dense": tiny.tiny_vit(), "pruned": tiny.tiny_vit(reducer="evit", keep={0: 30})}
    shows = SimpleNamespace(say=lambda text: None, progress=lambda *done: None)
    parts = {**models, "islands": lambda model, precision: (), "int8_file": lambda: None}
    return SimpleNamespace(profile=profile, folders=folders, shows=shows, **{**parts, **more})


@pytest.mark.parametrize("cuda", ["auto", "cuda-bindings", "pycuda"])
def test_every_way_to_cuda_that_a_profile_names_is_one_that_the_backend_knows(profile, cuda):
    options = runtimes.load_options(profile("runtime.name=tensorrt", f"runtime.cuda={cuda}"))
    assert options.keys() <= set(tensorrt.OPTIONS)
    with contextlib.suppress(MissingError):  # the package is known, and not here, or there is no driver
        open_cuda(options["cuda"])


def test_options_of_a_builder_reach_it_and_unknown_ones_are_refused(profile):
    config = tiny.tiny_config()
    found = profile("runtime.name=tensorrt", "runtime.options={workspace_mb: 512}")
    assert runtimes.engine_options(found, config, "tensorrt").workspace_mb == 512
    with pytest.raises(
        InputError, match=r"runtime\.options: tensorrt takes workspace_mb, a whole number, got fast: True"
    ):
        runtimes.engine_options(profile("runtime.name=tensorrt", "runtime.options={fast: true}"), config, "tensorrt")
    beside = profile("runtime.options={arena: 1}")
    assert runtimes.engine_options(beside, config, "tensorrt-rtx").workspace_mb is None


def test_ranges_of_batches_become_optimisation_profiles(profile):
    found = profile(
        "runtime.name=tensorrt",
        "input.batch={min: 1, opt: 8, max: 32}",
        "input.batch_ranges=[1, {min: 2, opt: 8, max: 32}]",
    )
    options = runtimes.engine_options(found, tiny.tiny_config(), "tensorrt", "fp16")
    batches = [tuple(shape[0] for shape in one["images"]) for one in options.profiles]
    assert batches == [(1, 1, 1), (2, 8, 32)]
    assert {shape[1:] for one in options.profiles for shape in one["images"]} == {(3, 28, 28)}
    assert options.precision == "fp16"
    alone = runtimes.engine_options(profile("runtime.name=tensorrt"), tiny.tiny_config(), "tensorrt")
    assert len(alone.profiles) == 1


def test_compatibility_is_asked_of_tensorrt_alone_and_timings_are_kept_in_the_users_cache(
    profile, monkeypatch, tmp_path
):
    monkeypatch.setenv("VITPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    found = profile(
        "runtime.name=tensorrt", "runtime.hardware_compatibility=ampere_plus", "runtime.version_compatible=true",
        "runtime.refit=true", "runtime.also_build=[{name: tensorrt-rtx}]",
    )  # fmt: skip
    classic, rtx = (runtimes.engine_options(found, tiny.tiny_config(), name) for name in ("tensorrt", "tensorrt-rtx"))
    assert (classic.hardware_compatibility, classic.version_compatible, classic.refit) == ("ampere_plus", True, True)
    assert (rtx.hardware_compatibility, rtx.version_compatible, rtx.refit) == ("none", False, True)
    assert classic.timing_cache == rtx.timing_cache == tmp_path / "cache" / "timings"


def test_engines_that_are_only_timed_are_built_like_the_product(profile, tmp_path):
    path = a_chain(1, tmp_path)
    found = profile("runtime.name=tensorrt", "runtime.version_compatible=true", "runtime.options={workspace_mb: 64}")
    options = runtimes.fixed_options(path, {"batch": 1}, found)
    assert (options.version_compatible, options.workspace_mb, options.precision) == (True, 64, None)
    assert options.profiles == ({"images": ((1, 3, 28, 28),) * 3},)


def test_nodes_may_be_left_to_the_cpu_by_the_profile(profile):
    found = runtimes.load_options(profile("runtime.provider=cuda", "runtime.options={cpu_nodes: true, device_id: 1}"))
    assert found == {"provider": "cuda", "cpu_nodes": True, "provider_options": {"device_id": 1}}


@pytest.mark.parametrize(
    ("batch", "compared"),
    [("1", [1]), ("{min: 1, opt: 1, max: 2}", [1, 2]), ("{min: 8, opt: 8, max: 16}", [8, 16]),
     ("{min: 1, opt: 8, max: 8}", [1, 3, 8]), ("{min: 1, opt: 1, max: 64}", [1, 3])],
)  # fmt: skip
def test_two_batch_sizes_are_compared_wherever_more_than_one_is_served(profile, batch, compared):
    assert make.parity_batches(profile(f"input.batch={batch}")) == compared


def test_every_exported_file_is_compared_with_torch_and_the_pruned_one_names_its_plan(profile, tmp_path, monkeypatch):
    from vitprune_deploy.export import parity

    compared, check = [], parity.check_parity

    def checking(model, path, *args, **kinds):
        compared.append(path.name)
        return check(model, path, *args, **kinds)

    monkeypatch.setattr(parity, "check_parity", checking)
    monkeypatch.setattr(make, "parity_images", lambda bench: tiny.images(12))
    preprocess = SimpleNamespace(to_dict=dict)
    bench = a_bench(profile("input.batch={min: 1, opt: 1, max: 2}"), tmp_path, preprocess=preprocess)
    make.export(bench, bench.folders["export"])
    assert sorted(compared) == ["dense.onnx", "model.onnx"]
    said = {
        name: {p.key: p.value for p in onnx.load(tmp_path / "export" / f"{name}.onnx").metadata_props}
        for name in ("dense", "model")
    }
    assert json.loads(said["model"]["vitprune.plan_sha256"]) == sha256_file(tmp_path / "search" / "plan.yaml")
    assert "vitprune.plan_sha256" not in said["dense"]


def a_chain(steps, folder):
    """An ONNX file that takes images and takes as long as it has ``steps``."""
    names = ["images", *(f"x{i}" for i in range(steps))]
    nodes = [helper.make_node("Erf", [a], [b]) for a, b in itertools.pairwise(names)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 28, 28]) for name in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    path = folder / f"{steps}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


@pytest.fixture
def engines_of_nobody(monkeypatch):
    """Engines of a GPU that is not here: what was asked for, and the sidecar that would come back."""
    asked = []

    def build(onnx, plan, options):
        asked.append((onnx.name, options))
        plan.write_bytes(b"a plan")
        tensorrt.sidecar_path(plan).write_text("{}")
        return {"runtime": "tensorrt", "version": "11.4.0.106", "precision": options.precision,
                "compute_capabilities": ["8.9"], "profiles": options.profiles}  # fmt: skip

    monkeypatch.setattr(tensorrt, "build_engine", build)
    monkeypatch.setattr(make, "_installed", lambda bench, runtime: True)
    return asked


def test_an_fp16_product_of_tensorrt_is_judged_against_an_fp32_engine(profile, tmp_path, engines_of_nobody):
    found = profile(
        "runtime.name=tensorrt", "runtime.precision=fp16", "runtime.also_build=[{name: tensorrt, precision: fp32}]"
    )
    bench = a_bench(found, tmp_path)
    bench.json = lambda stage, name: json.loads((bench.folders[stage] / name).read_text())
    make.build_engines(bench, bench.folders["engines"])
    files = judge.engine_files(bench)
    assert {name: path.name for name, path in files.items()} == {
        "dense": "dense.sm89.trt11.4.fp16.b1.plan",
        "pruned": "model.sm89.trt11.4.fp16.b1.plan",
        "reference": "reference.sm89.trt11.4.fp32.b1.plan",
    }
    assert {path.name for path in (tmp_path / "engines").glob("model.*")} == {
        "model.sm89.trt11.4.fp16.b1.plan",
        "model.sm89.trt11.4.fp16.b1.json",
        "model.sm89.trt11.4.fp32.b1.plan",
        "model.sm89.trt11.4.fp32.b1.json",
    }
    engines = judge._engines(bench)
    assert [(e["precision"], e["status"]) for e in engines] == [("fp16", "run"), ("fp32", "built")]
    assert [(onnx, options.precision) for onnx, options in engines_of_nobody] == [
        ("dense.onnx", "fp16"), ("model.onnx", "fp16"), ("reference.onnx", "fp32"), ("model.fp32.onnx", "fp32"),
    ]  # fmt: skip


def test_int8_for_tensorrt_is_a_plan_of_a_graph_with_pairs(profile, tmp_path, engines_of_nobody):
    bench = a_bench(profile("runtime.name=tensorrt", "runtime.try_int8=true"), tmp_path, search_images=tiny.images(4))
    export_onnx(bench.pruned, bench.folders["export"] / "model.onnx")
    bench.folders["int8"] = tmp_path / "int8"
    bench.folders["int8"].mkdir()
    made = int8._make(bench, bench.folders["int8"])
    assert made.name == "model.sm89.trt11.4.b1.plan"
    assert [(onnx, options.precision) for onnx, options in engines_of_nobody] == [("model.int8.onnx", None)]
    nodes = onnx.load(bench.folders["int8"] / "model.int8.onnx").graph.node
    assert "QuantizeLinear" in {node.op_type for node in nodes}
    bench.json = lambda stage, name: []
    bench.int8_file = lambda: made
    assert judge.engine_files(bench) == {"pruned": made}
    assert [(e["precision"], e["file"]) for e in judge._engines(bench)] == [("int8", f"engine/{made.name}")]


def test_a_compiled_product_is_what_runs_and_the_graph_stays_beside_it(profile, tmp_path, monkeypatch):
    def compiled(source, target, *, threads, options):
        target.write_bytes(source.read_bytes())
        assert options["provider"] == "openvino"

    monkeypatch.setattr(OnnxRuntime, "compile", compiled)
    bench = a_bench(profile("runtime.provider=openvino", "runtime.compiled=true"), tmp_path)
    (bench.folders["export"] / "model.onnx").write_bytes(b"a graph")
    bench.json = lambda stage, name: json.loads((bench.folders[stage] / name).read_text())
    make.build_engines(bench, bench.folders["engines"])
    assert judge.engine_files(bench)["pruned"].read_bytes() == b"a graph"
    engines = judge._engines(bench)
    assert [(e["file"], e["status"]) for e in engines] == [("engine/model.compiled.onnx", "run"), ("model.onnx", "run")]
    assert engines[0]["options"] == engines[1]["options"]
    assert engines[0]["compiled"]


def test_what_compatibility_costs_is_measured_beside_an_engine_without_it(
    profile, tmp_path, monkeypatch, engines_of_nobody
):
    found = profile("runtime.name=tensorrt", "runtime.version_compatible=true", "validation.runs=40")
    bench = a_bench(found, tmp_path)
    bench.json = lambda stage, name: json.loads((bench.folders[stage] / name).read_text())
    make.build_engines(bench, bench.folders["engines"])
    asked = [(onnx, options.version_compatible) for onnx, options in engines_of_nobody]
    assert asked == [("dense.onnx", True), ("model.onnx", True), ("model.onnx", False)]
    assert judge.engine_files(bench).keys() == {"dense", "pruned"}  # it is no product
    assert not list((tmp_path / "engines").glob("model*plain*"))

    opened = []

    def engine(path):
        opened.append(path.name)
        steps = 20 if path.name.startswith("plain") else 100
        return Model(OnnxRuntime.load(a_chain(steps, tmp_path), threads=1), Preprocess((3, 28, 28)))

    monkeypatch.setattr(judge, "open_engine", lambda bench, path: engine(path))
    price = judge.compatibility_price(bench, [engine(Path("model"))], tiny.images(1).numpy())
    assert set(opened[1:]) == {"plain.sm89.trt11.4.fp32.b1.plan"}
    assert price["times"] == pytest.approx(price["with_ms"] / price["without_ms"])
    assert price["times"] > 1.5  # about five
    bench.profile = profile("runtime.name=tensorrt")
    assert judge.compatibility_price(bench, [], tiny.images(1).numpy()) is None


def test_islands_are_found_on_calibration_images_for_fp16_alone_and_once_for_the_dense_model(profile, monkeypatch):
    dense = tiny.tiny_vit(depth=1)
    with torch.no_grad():
        dense.blocks[0].mlp.fc2.bias[3] = 1e5
    bench = a_bench_of(profile(), dense)
    bench.__dict__["calibration"] = tiny.images(80)
    assert [bench.islands(dense, precision) for precision in ("fp32", "bf16")] == [(), ()]
    first = bench.islands(dense, "fp16")
    assert [island.kind for island in first] == ["stream", "layer"]
    assert bench.islands(dense, "fp16") is first
    assert bench.islands(tiny.tiny_vit(depth=1), "fp16") == []


def test_the_report_says_which_operations_are_islands_and_what_int8_and_compatibility_cost():
    written = {
        "export.json": {"islands": {"model.onnx": [["stream", "blocks.5", 1e5, True]]}},
        "figures.json": {"compatibility": {"with_ms": 1.73, "without_ms": 1.25, "times": 1.384, "runs": 1000}},
        "recovery.json": [],
        "int8.json": {"kept": False, "why": "it is not faster"},
    }
    kept = written["export.json"]["islands"]["model.onnx"]
    kept[:] = [dict(zip(("kind", "where", "reaches", "wide"), one, strict=True)) for one in kept]
    notes = account._notes(SimpleNamespace(json=lambda stage, name: written[name]))
    assert "the residual stream from blocks.5 on (up to 100000)" in notes[0]
    assert notes[1] == "The model in int8 was left out: it is not faster."
    assert notes[2] == (
        "To serve other GPUs or versions of TensorRT, the engine takes 1.73 ms, which is 1.38 times the 1.25 ms "
        "without (medians of 1000 runs)."
    )


def test_an_engine_other_than_the_one_of_the_export_is_compared_with_torch(profile, tmp_path, monkeypatch):
    images = tiny.images(5)
    pairs = [(images[:3].numpy(), None), (images[3:].numpy(), None)]
    monkeypatch.setattr(judge, "batches", lambda part, preprocess, size: iter(pairs))
    monkeypatch.setattr(judge, "PARITY_BATCH", 3)
    parts = SimpleNamespace(test=None)
    bench = a_bench(
        profile("runtime.name=tensorrt", "validation.parity_images=3"), tmp_path, images=parts, preprocess=None
    )
    with torch.no_grad():
        logits = bench.pruned(images).numpy()
    logits[0] -= 0.5 * np.eye(10)[logits[0].argmax()]
    found = judge._engine_parity(bench, logits)
    assert found["images"] == 3
    assert found["max_abs"] == pytest.approx(0.5, abs=1e-4)
    bench.profile = profile()
    assert judge._engine_parity(bench, logits) is None


def models_of(*layers):
    """Loaded engines whose inspector says ``layers``, the dense one's first."""
    backends = [SimpleNamespace(layers=lambda one=one: {"Layers": one}) for one in layers]
    return {name: SimpleNamespace(backend=one) for name, one in zip(("dense", "pruned"), backends, strict=True)}


def test_a_fusion_that_pruning_broke_is_told_whatever_the_runtime(profile, tmp_path):
    bench = a_bench(profile("runtime.name=tensorrt"), tmp_path)
    files = [bench.folders["export"] / name for name in ("dense.onnx", "model.onnx")]
    export_onnx(bench.dense, files[0], opset=23)
    shutil.copy(*files)
    attends = [node.name for node in onnx.load(files[0]).graph.node if node.op_type == "Attention"]
    whole = [{"Name": f"_gemm_mha_v2_{i}", "LayerType": "kgen", "Metadata": f"[ONNX Layer: {name}]"}
             for i, name in enumerate(attends)]  # fmt: skip
    parts = [whole[0], *(whole[1] | {"Name": part, "LayerType": "gemm"} for part in ("qk", "pv"))]
    found = soundness.fusions(bench, models_of(whole, whole), {"dense": Path(), "pruned": Path()})
    assert (found["runtime"], found["warnings"], found["unread"]) == ("tensorrt", [], None)
    assert [one["fused"] for one in found["pruned"]] == [True, True]
    (warning,) = soundness.fusions(bench, models_of(whole, parts), {"dense": Path(), "pruned": Path()})["warnings"]
    assert "the attention of block 1 is one kernel in the dense model" in warning


def test_a_graph_that_cannot_be_read_costs_the_report_and_no_build(profile, tmp_path):
    bench = a_bench(profile(), tmp_path)
    files = dict.fromkeys(("dense", "pruned"), tmp_path / "none.onnx")
    found = soundness.fusions(bench, models_of([], []), files)
    assert found["dense"] == found["pruned"] == found["warnings"] == []
    assert "none.onnx" in found["unread"]


def test_of_many_token_methods_those_go_on_that_lose_least_at_the_same_counts():
    dense, pictures = tiny.tiny_vit(depth=4), tiny.images(8)
    names = ["evit", "evit_drop", "pitome", "tome"]
    losses = screen.one_schedule(dense, {name: {} for name in names}, pictures)
    assert all(0 < loss < 10 for loss in losses.values())
    with torch.no_grad():
        slim = reduce_tokens(dense, "evit_drop", {1: 34, 2: 24, 3: 17})  # 0.7 of 49, of 34 and of 24
        by_hand = float(kl_to_dense(dense(pictures), slim(pictures)).mean())
    assert losses["evit_drop"] == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize(("asked", "searched"), [(["tome"], ["tome"]), ([], []), (None, 2)])
def test_the_methods_that_are_searched_are_two_at_most(profile, tmp_path, asked, searched):
    kinds = {name: parts.load("vitprune.tokens", name, Reducer) for name in parts.names("vitprune.tokens")}
    names = list(kinds) if asked is None else asked
    lines = []
    bench = SimpleNamespace(
        candidates=lambda: [TokenMethod.of(name, kinds[name]) for name in names],
        base=tiny.tiny_vit(depth=4), search_images=tiny.images(8), shows=SimpleNamespace(say=lines.append),
        profile=profile(),
    )  # fmt: skip
    screen.screen(bench, tmp_path)
    found = json.loads((tmp_path / "methods.json").read_text())
    if searched == 2:
        assert found["searched"] == sorted(found["searched"])
        assert set(found["searched"]) == set(sorted(names, key=lambda name: found["losses"][name])[:2])
        assert "are searched" in lines[0]
    else:
        assert found == {"searched": searched, "losses": {}}


@pytest.mark.parametrize(
    ("reducer", "labels", "says"),
    [
        (None, [0], "recover.recipe is published, and the plan that was found reduces no tokens; use distil"),
        ("evit", None, "recover.recipe is published, which learns classes, and the images for it carry none"),
    ],
)
def test_a_published_recipe_needs_its_method_and_classes(profile, reducer, labels, says):
    slim = tiny.tiny_vit(**({"reducer": reducer, "keep": {0: 30}} if reducer else {}))
    bench = SimpleNamespace(
        profile=profile("recover.recipe=published"), images=SimpleNamespace(recovery=SimpleNamespace(labels=labels))
    )
    with pytest.raises(InputError, match=says):
        training.published_recipe(bench, slim)


def test_a_published_recipe_is_that_of_the_method_and_ours_is_none(profile):
    slim = tiny.tiny_vit(reducer="dynamicvit", keep={0: 30})
    labelled = SimpleNamespace(recovery=SimpleNamespace(labels=[0]))
    bench = SimpleNamespace(profile=profile("recover.recipe=published"), images=labelled)
    assert training.published_recipe(bench, slim).lr == 1e-3
    bench.profile = profile()
    assert training.published_recipe(bench, slim) is None


def a_bench_of(profile, dense):
    """A real ``Bench`` whose dense model is at hand."""
    found = Bench(profile, SimpleNamespace(say=print), Path(), {})
    found.__dict__["dense"] = dense
    return found


def test_all_methods_are_those_that_need_no_training_and_can_leave_any_count(profile):
    found = a_bench_of(profile("prune.tokens.method=auto"), tiny.tiny_vit()).candidates()
    assert [one.name for one in found] == [
        "ats_fixed",
        "diffrate",
        "dpsvit",
        "evit",
        "evit_drop",
        "pitome",
        "psvit",
        "tome",
        "zero_tprune",
    ]
    without = a_bench_of(profile("prune.tokens.method=auto"), tiny.tiny_vit(class_token=False, pool="avg")).candidates()
    assert [one.name for one in without] == ["pitome", "tome", "zero_tprune"]


def test_a_method_that_must_be_trained_is_refused_where_it_will_not_be(profile):
    asked = ["prune.tokens.method=dynamicvit"]
    (found,) = a_bench_of(profile(*asked), tiny.tiny_vit()).candidates()
    assert (found.name, found.judged_as) == ("dynamicvit", "evit_drop")
    with pytest.raises(InputError, match=r"dynamicvit must be trained, and recover.enabled is false"):
        a_bench_of(profile(*asked, "recover.enabled=false"), tiny.tiny_vit()).candidates()
    with pytest.raises(NotSupported, match="evit_drop scores patches by the class token's attention"):
        a_bench_of(profile(*asked), tiny.tiny_vit(class_token=False, pool="avg")).candidates()
