"""Zeros in a build: the stages that make them, keep them and ship them, and what is said of their worth."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml

from vitprune.criteria.base import Ranking
from vitprune.errors import InputError, NotSupported
from vitprune.model.vit import fingerprint
from vitprune.search.counts import Counts
from vitprune.search.rankings import Rankings, save_index, save_ranking
from vitprune_deploy.backends._trt_sparse import account as said_by
from vitprune_deploy.backends.tensorrt import build_engine
from vitprune_deploy.build import choose, make, runtimes, sparse, training
from vitprune_deploy.build.bench import Bench, load_vit, save_vit, write_json
from vitprune_deploy.data import Preprocess
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.export.sparsity import products
from vitprune_deploy.latency import wholes
from vitprune_deploy.profile import load_profile

PROFILE = """\
model: {name: vit_tiny_patch16_224, pretrained: false}
data: {source: images}
budget: {speedup: 2}
accuracy: {min_agreement: 90}
search: {probe_images: 8, holdout_images: 8}
recover: {max_steps: 6, batch: 8, lr: 1.0e-3}
"""
MLP = [f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("fc1", "fc2")]


@pytest.fixture
def profile(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "p.yaml").write_text(PROFILE)
    return lambda *overrides: load_profile(tmp_path / "p.yaml", overrides)


@pytest.fixture
def bench(profile, tmp_path, monkeypatch):
    """A build whose search is done: a plan with fewer heads, MLP units, tokens, and the profile's pattern."""

    def make_bench(*overrides, mlp=48):
        found, dense, said = profile(*overrides), tiny.tiny_vit(), []
        folders = {
            name: tmp_path / "work" / name for name in ("model", "images", "methods", "losses", "search", "export")
        }
        for folder in folders.values():
            folder.mkdir(parents=True)
        save_vit(dense, folders["model"], "dense")
        write_json(folders["model"] / "preprocess.json", Preprocess.from_dict({"input_size": (3, 28, 28)}).to_dict())
        halves = {
            (i, half): save_ranking(folders["losses"] / "rankings", i, half, Ranking.from_scores(torch.arange(units)))
            for i in range(2)
            for half, units in (("attn", 4), ("mlp", 64))
        }
        save_index(folders["losses"] / "rankings", Rankings(halves))
        plan = Rankings(halves).plan(fingerprint(dense), [3, 4], [mlp, 64], [30, 0], patches=49, reducer="evit")
        text = yaml.safe_dump(sparse.with_zeros(plan, found).to_dict())
        (folders["search"] / "plan.yaml").write_text(text)
        write_json(folders["search"] / "search.json", {"sparse": None})
        shows = SimpleNamespace(say=said.append, progress=lambda *done: None)
        made = Bench(found, shows, tmp_path / "work", folders)
        made.said, made.calibration = said, tiny.images(24)
        monkeypatch.setattr(training, "batches", lambda bench, epoch: tiny.labelled_by(dense)(epoch))
        monkeypatch.setattr(make, "parity_images", lambda bench: tiny.images(4))
        return made

    return make_bench


def stage(bench, name, work):
    folder = bench.work / name
    folder.mkdir(exist_ok=True)
    work(bench, folder)
    bench.folders[name] = folder
    return folder


def share_of_zeros(model):
    modules = dict(model.named_modules())
    return {name: float((modules[name].weight == 0).float().mean()) for name in MLP}


def test_2_4_with_fewer_tokens_heads_and_units_in_one_plan_through_recovery_export_and_an_rtx_engine(bench, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    made = bench(
        "prune.weights.method=sparsegpt", "runtime.name=tensorrt-rtx", "runtime.precision=fp16", "input.batch=2"
    )
    assert made.plan.patterns() == dict.fromkeys(MLP, "2:4")
    stage(made, "weights", sparse.prune_weights)
    before = load_vit(made.folders["weights"], "slim")
    stage(made, "recover", make.recover_accuracy)
    model = made.pruned
    assert [(b.heads, b.mlp, b.patches) for b in model.config.blocks] == [(3, 48, 30), (4, 64, 0)]
    assert share_of_zeros(model) == dict.fromkeys(MLP, 0.5)
    assert not torch.equal(before.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)  # it was trained
    stage(made, "export", make.export)
    exported = made.json("export", "export.json")["sparse"]["model.onnx"]
    assert [layer["node"].partition("/")[0] for layer in exported] == MLP
    options = runtimes.engine_options(made.profile, model.config, "tensorrt-rtx", "fp16")
    sidecar = build_engine(made.folders["export"] / "model.onnx", tmp_path / "model.plan", options)
    assert "SPARSE_WEIGHTS" in sidecar["flags"]
    assert [name.partition("/")[0] for name in sidecar["sparse"]["fitting"]] == MLP
    assert sidecar["precision"] == "fp16"


def test_an_exported_file_without_the_pattern_stops_the_build(bench):
    made = bench("prune.weights.method=magnitude", "recover.enabled=false", "input.batch=1")
    save_vit(make.slim_model(made)[0], made.work, "model")  # as if the zeros were lost on the way
    made.folders["recover"] = made.work
    with pytest.raises(NotSupported, match=r"model\.onnx: blocks\.0\.mlp\.fc1 was to be 2:4, and in \d+ of 384 groups"):
        make.export(made, made.folders["export"])


def test_zeros_of_any_pattern_come_before_recovery_or_grow_in_it(bench):
    made = bench(
        "prune.weights={method: magnitude, pattern: unstructured, sparsity: 0.7, schedule: gradual, where: all}",
    )
    stage(made, "weights", sparse.prune_weights)
    assert set(share_of_zeros(load_vit(made.folders["weights"], "slim")).values()) == {0.0}
    stage(made, "recover", make.recover_accuracy)
    assert share_of_zeros(made.pruned) == pytest.approx(dict.fromkeys(MLP, 0.7), abs=0.01)
    assert float((made.pruned.blocks[0].attn.qkv.weight == 0).float().mean()) == pytest.approx(0.7, abs=0.01)
    assert "bring no speed by themselves, in ONNX Runtime or TensorRT" in made.said[0]


def shipped(made):
    """Everything up to the exported file, without the comparisons that stages make."""
    for name, work in (("weights", sparse.prune_weights), ("recover", make.recover_accuracy)):
        stage(made, name, work)
    export_onnx(made.pruned, made.folders["export"] / "model.onnx", batch=1)
    return made


def test_the_account_counts_zeros_and_compresses_the_file(bench):
    made = shipped(
        bench("prune.weights={method: magnitude, pattern: unstructured, sparsity: 0.9}", "recover.enabled=false")
    )
    found = sparse.account(made)
    assert found["zeros"] / found["weights"] == pytest.approx(0.9, abs=0.01)
    assert found["weights"] == sum(dict(made.pruned.named_modules())[name].weight.numel() for name in MLP)
    assert found["size_bytes"] == (made.folders["export"] / "model.onnx").stat().st_size
    assert found["compressed_bytes"] < 0.8 * found["size_bytes"]
    assert (found["kernels"], found["layers"]["blocks.0.mlp.fc2"]) == (None, pytest.approx(0.9, abs=0.01))
    assert found["notes"][0].startswith(f"Weights: 90.0% of {found['weights']} in 4 layers are zero (unstructured, by")
    assert "bring no speed by themselves" in found["notes"][1]


def test_a_build_without_zeros_says_nothing_of_them(bench):
    made = bench()
    stage(made, "weights", sparse.prune_weights)
    assert (made.plan.patterns(), made.said, sparse.account(made)) == ({}, [], None)
    assert sparse.search_kernels(made, made.work) is None
    assert sparse.worth(made.profile) is None


# ---- what a search counts on --------------------------------------------------------------------------------------

ELIGIBLE = "(Sparsity) Found 4 layer(s) eligible to use sparse tactics"


def a_builder(monkeypatch, *lines):
    """What a build with TensorRT says needs a GPU: a double's words; requests to it are kept."""
    asked = []
    device = SimpleNamespace(build=lambda onnx, plan, options: asked.append(options) or {"sparse": said_by(lines)})
    monkeypatch.setattr(runtimes, "on", lambda profile: device)
    return asked


def test_a_search_measures_candidates_with_2_4_where_such_kernels_were_seen(bench, tmp_path, monkeypatch):
    made, measured = bench("prune.weights.method=magnitude", "runtime.name=tensorrt", "input.batch=1"), []
    asked = a_builder(monkeypatch, ELIGIBLE, "(Sparsity) Chose 3 layer(s) using sparse tactics")

    def measuring(paths, *args, **more):
        for path in paths.values():
            shares = {layer.node.partition("/")[0]: layer.zeros for layer in products(path)}
            measured.append({shares[layer] for layer in MLP})
        return [SimpleNamespace(value_ms=1.0, low_ms=1.0, high_ms=1.0) for _ in paths]

    monkeypatch.setattr(wholes, "measure_models", measuring)
    dense, fewer = choose.dense_counts(made), Counts((4, 4), (32, 32), (49, 49))
    choose.measure_counts(made, [dense, fewer], None, tmp_path / "candidates")
    assert measured == [{0.0}, {0.5}]  # the unpruned model, which speed-ups are against, has no zeros
    found = sparse.search_kernels(made, tmp_path)
    assert found["why"] == "kernels that skip zeros were taken for 3 layers, so candidates are measured with them"
    assert (found["used"], made.said) == (True, [f"search: {found['why']}"])
    assert [(one.sparse, one.module) for one in asked] == [(True, "tensorrt")]  # looked up once


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([ELIGIBLE, "(Sparsity) Chose 0 layer(s) using sparse tactics"],
         "TensorRT took kernels that skip zeros for none of 4 eligible layers, since dense ones were faster"),
        ([], "neither TensorRT's log nor an engine's inspector says which kernels it took"),
    ],
)  # fmt: skip
def test_a_search_counts_on_nothing_where_no_such_kernel_was_seen(bench, tmp_path, monkeypatch, lines, why):
    made = bench("prune.weights.method=magnitude", "runtime.name=tensorrt", "input.batch=1")
    a_builder(monkeypatch, *lines)
    monkeypatch.setattr(wholes, "export_whole", lambda model, path, **more: path)  # the double reads no file
    monkeypatch.setattr(runtimes, "fixed_options", lambda *of: None)
    assert sparse.search_kernels(made, tmp_path) == {
        "used": False,
        "why": f"no gain by 2:4 is counted on: {why}",
    }


def test_a_runtime_without_such_kernels_and_a_search_without_candidates_count_on_nothing(bench, profile):
    made = bench("prune.weights.method=magnitude")
    found = sparse.search_kernels(made, made.work)
    assert not found["used"]
    assert found["why"].startswith("onnxruntime has no kernels for the pattern 2:4")
    provider = profile("prune.weights.method=magnitude", "runtime.provider=tensorrt")
    assert "trt_sparsity_enable" in sparse.worth(provider)
    made.profile = profile("prune.weights.method=magnitude", "runtime.name=tensorrt", "search.landings=0")
    made.sparse_kernels = None
    assert "search.landings is 0" in sparse.search_kernels(made, made.work)["why"]


def test_the_report_says_what_the_engine_does_with_2_4(bench):
    made = bench("prune.weights.method=magnitude", "runtime.name=tensorrt", "recover.enabled=false")
    for name, work in (("weights", sparse.prune_weights), ("recover", make.recover_accuracy)):
        stage(made, name, work)
    (made.folders["export"] / "model.onnx").write_bytes(bytes(1000))
    made.folders["engines"] = made.work
    plan = {"model": "model", "runtime": "tensorrt", "precision": "fp32", "file": "m.plan", "status": "built"}
    write_json(made.work / "engines.json", [plan])
    write_json(made.folders["search"] / "search.json", {"sparse": {"used": False, "why": "nothing was counted on"}})
    chose = "(Sparsity) Chose {} layer(s) using sparse tactics{}"
    said = {
        chose.format(2, ": a, b"): "TensorRT skips zeros in 2 layers (seen in its log): a, b.",
        chose.format(
            0, ""
        ): "2:4 is credited with no speed here: TensorRT took kernels that skip zeros for none, since "
        "dense ones were faster.",
    }
    for line, note in said.items():
        write_json(made.work / "m.json", {"sparse": said_by([line])})
        assert sparse.account(made)["notes"][1:] == ["In the search, nothing was counted on.", note]


# ---- the profile --------------------------------------------------------------------------------------------------


def test_zeros_are_off_by_default_and_a_pattern_needs_no_quotes(profile, tmp_path):
    assert (profile().prune.weights.enabled, profile().asks_2_4, profile().mlp_multiple) == (False, False, 8)
    (tmp_path / "p.yaml").write_text(
        f"{PROFILE}prune: {{weights: {{method: magnitude, pattern: 2:4}}}}\n"
    )  # YAML 1.1: 124
    found = profile()
    assert (found.prune.weights.pattern, found.asks_2_4, found.mlp_multiple) == ("2:4", True, 16)
    assert profile("prune.weights.pattern=2:4") == found
    assert load_profile(save(tmp_path / "again.yaml", found.to_yaml()), []).prune == found.prune
    assert profile("prune.mlp.multiple=24").mlp_multiple == 48


BLOCKS_OF_4 = "prune.weights={method: magnitude, pattern: block-4, sparsity: 0.5, where: all}"
TWO_OF_4 = "prune.weights={method: magnitude, where: all}"


@pytest.mark.parametrize(
    ("weights", "mlp", "dims"), [(BLOCKS_OF_4, 12, 4), (TWO_OF_4, 48, 4), ("prune.weights.method=none", 6, 1)]
)
def test_widths_that_are_read_are_multiples_of_the_pattern(profile, weights, mlp, dims):
    found = profile(weights, "prune.mlp.multiple=6", "prune.head_dims={enabled: true, multiple: 1}")
    assert (found.mlp_multiple, found.head_dim_multiple) == (mlp, dims)
    narrow = profile(weights.replace("all", "mlp"), "prune.head_dims={enabled: true, multiple: 1}")
    assert narrow.head_dim_multiple == 1  # attention gets no zeros


@pytest.mark.parametrize("weights", [BLOCKS_OF_4, TWO_OF_4])
def test_channels_that_the_pattern_does_not_divide_are_a_sentence(profile, weights):
    with pytest.raises(
        InputError, match=r"prune\.embedding: must be a multiple of 4 for (block-4|2:4) weights, got 190"
    ):
        profile(weights, "prune.embedding=190")
    assert profile(weights, "prune.embedding=188").prune.embedding == 188
    assert profile("prune.embedding=190").prune.embedding == 190


def save(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("{method: wonder}", r"prune\.weights\.method: must be one of none, .*magnitude.*, got 'wonder'"),
        ("{method: magnitude, pattern: 3:4}", r"must be '2:4', 'block-4' or 'unstructured', got '3:4'"),
        ("{method: magnitude, sparsity: 0.75}", r"weights\.sparsity: must be 0\.5 for the pattern 2:4, got 0\.75"),
        ("{method: magnitude, pattern: block-4}", r"prune\.weights\.sparsity: is needed for the pattern block-4"),
        ("{method: magnitude, pattern: unstructured, sparsity: 1.0}", r"sparsity: must be < 1, got 1\.0"),
        ("{sparsity: 0.5}", r"prune\.weights\.sparsity: belongs to a method, and prune\.weights\.method is none"),
        ("{method: magnitude, schedule: gradual}", r"prune\.weights\.schedule: gradual has no steps on the way to"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence(profile, weights, message):
    with pytest.raises(InputError, match=message):
        profile(f"prune.weights={weights}")


def test_gradual_zeros_need_recovery(profile):
    wanted = "prune.weights={method: magnitude, pattern: unstructured, sparsity: 0.5, schedule: gradual}"
    with pytest.raises(InputError, match=r"gradual happens in recovery, and recover\.enabled is false"):
        profile(wanted, "recover.enabled=false")
