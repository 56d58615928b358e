"""Stages of a build by themselves: what they hand to runtimes, what they compare, and what the manifest says of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tiny
import torch

from vitprune import parts
from vitprune.errors import InputError, MissingError, NotSupported
from vitprune.search.counts import TokenMethod
from vitprune.search.probes import kl_to_dense
from vitprune.surgery import reduce_tokens
from vitprune.tokens.base import Reducer
from vitprune_deploy.artifact import sha256_file
from vitprune_deploy.backends import tensorrt
from vitprune_deploy.backends._cuda import open_cuda
from vitprune_deploy.build import judge, make, runtimes, screen, soundness, training
from vitprune_deploy.build.bench import Bench
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.profile import load_profile

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
    return SimpleNamespace(profile=profile, folders=folders, shows=shows, **{**models, **more})


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
    import onnx

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


def test_an_fp16_product_of_tensorrt_is_judged_against_an_fp32_engine(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "build_engine", lambda onnx, plan, options: plan.write_bytes(b"a plan"))
    monkeypatch.setattr(make, "_installed", lambda runtime: True)
    found = profile(
        "runtime.name=tensorrt", "runtime.precision=fp16", "runtime.also_build=[{name: tensorrt, precision: fp32}]"
    )
    bench = a_bench(found, tmp_path)
    bench.json = lambda stage, name: json.loads((bench.folders[stage] / name).read_text())
    make.build_engines(bench, bench.folders["engines"])
    files = judge.engine_files(bench)
    assert {name: path.name for name, path in files.items()} == {
        "dense": "dense.tensorrt.fp16.plan",
        "pruned": "model.tensorrt.fp16.plan",
        "reference": "reference.tensorrt.fp32.plan",
    }
    engines = judge._engines(bench)
    assert [(e["precision"], e["status"]) for e in engines] == [("fp16", "run"), ("fp32", "built")]


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
def test_the_methods_that_are_searched_are_two_at_most(tmp_path, asked, searched):
    kinds = {name: parts.load("vitprune.tokens", name, Reducer) for name in parts.names("vitprune.tokens")}
    names = list(kinds) if asked is None else asked
    lines = []
    bench = SimpleNamespace(
        candidates=lambda: [TokenMethod.of(name, kinds[name]) for name in names],
        dense=tiny.tiny_vit(depth=4), search_images=tiny.images(8), shows=SimpleNamespace(say=lines.append),
        profile=SimpleNamespace(model=SimpleNamespace(checkpoint_format=None)),
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
