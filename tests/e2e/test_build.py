"""The whole pipeline with real runtimes on a small model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import yaml
from small import PROFILE

from vitprune.errors import DamagedFile, InputError
from vitprune.plan import Plan
from vitprune.search import psvit
from vitprune.search.frontier import from_rows
from vitprune.surgery import reduce_tokens
from vitprune_deploy.artifact import verify
from vitprune_deploy.build import build, run, screen
from vitprune_deploy.build.fleet import build_fleet
from vitprune_deploy.build.make import slim_model
from vitprune_deploy.build.sizes import sizes
from vitprune_deploy.build.training import train_on
from vitprune_deploy.cli import main
from vitprune_deploy.console import Console
from vitprune_deploy.profile import load_fleet, load_profile
from vitprune_deploy.runtime import load
from vitprune_deploy.verbs.validate import validate as validate_folder

pytestmark = pytest.mark.e2e

DELIVERED = {"profile.yaml", "plan.yaml", "model.json", "model.safetensors", "latency_table.json", "frontier.json",
             "model.onnx", "report.html", "golden.png", "golden.json"}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory, images):
    """One build with everything in it, for the tests that only look."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "small.yaml").write_text(PROFILE.format(images=images))
    manifest = build(load_profile(folder / "small.yaml"), folder / "out", Console(quiet=True))
    return folder / "out", manifest


def quick(profile_path, table, *more):
    """The profile with a recorded table and nothing measured for the search: what follows is decided by seeds alone."""
    return load_profile(profile_path, [f"measure.table={table}", "search.landings=0", *more])


def stage_folders(out):
    return {path.parent.name: path.stat().st_mtime_ns for path in (out / ".work").glob("*/stage.json")}


def test_the_folder_holds_what_the_manifest_says_and_nothing_is_damaged(built):
    out, manifest = built
    assert verify(out) == manifest
    assert manifest.files.keys() >= DELIVERED
    assert manifest.verdict in ("pass", "fail", "unstable")
    if manifest.verdict != "pass":  # this machine may be busy; accuracy cannot be missed at 2% agreement
        busy = ("latency", "budget", "quiet machine")
        assert all(any(word in reason for word in busy) for reason in manifest.reasons), manifest.reasons


def test_the_pruned_model_is_smaller_and_its_plan_is_what_was_exported(built):
    out, manifest = built
    plan = Plan.from_dict(yaml.safe_load((out / "plan.yaml").read_text()))
    config = json.loads((out / "model.json").read_text())
    assert manifest.pruned.macs < manifest.dense.macs
    assert [len(block.heads) for block in plan.blocks] == [block["heads"] for block in config["blocks"]]
    assert [len(block.mlp) for block in plan.blocks] == [block["mlp"] for block in config["blocks"]]
    assert manifest.parity.max_abs <= 1e-4


def test_a_service_gets_the_same_answers_from_files_and_from_pixels(built, images):
    from PIL import Image

    paths = sorted(images.glob("*/*.png"))[::30]
    with load(built[0]) as model:
        pictures = [Image.open(path) for path in paths]
        from_files = model.predict(pictures)
        from_pixels = model.predict(np.stack([np.asarray(picture) for picture in pictures]))
    assert from_files.logits.shape == (len(paths), 3)
    np.testing.assert_array_equal(from_files.logits, from_pixels.logits)


def test_the_engine_is_checked_for_faults_that_accuracy_does_not_show(built):
    sound, fusion = (built[1].model_extra[name] for name in ("consistency", "fusion"))
    assert sound["passed"]
    assert not any(check["skipped"] for check in sound["checks"])
    assert sound["checks"][1]["batches"] == [2, 3, 4]
    dense, pruned = ([one["kernels"][-2:] for one in fusion[name]] for name in ("dense", "pruned"))
    assert dense == [["Softmax", "MatMul"]] * 3  # no kernel of ONNX Runtime on the CPU is all of attention
    assert {tuple(kernels) for kernels in pruned} <= {("Softmax", "MatMul")}
    assert fusion["warnings"] == []


def test_the_frontier_has_a_plan_for_every_budget(built):
    points = from_rows(json.loads((built[0] / "frontier.json").read_text()))
    times = [point.predicted_ms for point in points]
    losses = [point.loss for point in points]
    assert len(points) > 3
    assert times == pytest.approx(sorted(times))  # equal but for the order of their sums
    assert losses == pytest.approx(sorted(losses, reverse=True))


def test_the_report_names_the_verdict_and_needs_no_network(built):
    text = (built[0] / "report.html").read_text(encoding="utf-8")
    assert built[1].verdict in text.lower()
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_finished_stages_are_not_repeated_and_another_budget_measures_nothing(built, profile_path, tmp_path):
    table, out = built[0] / "latency_table.json", tmp_path / "out"
    build(quick(profile_path, table), out, Console(quiet=True))
    before = stage_folders(out)
    build(quick(profile_path, table), out, Console(quiet=True))
    assert stage_folders(out) == before
    build(quick(profile_path, table, "budget.speedup=1.3"), out, Console(quiet=True))
    changed = {name.rpartition("-")[0] for name in stage_folders(out).items() ^ before.items() for name in [name[0]]}
    assert not changed & {"model", "images", "measure", "losses"}
    assert "search" in changed


@pytest.mark.parametrize("seconds", [3.0, 6.0, 9.0])
def test_a_killed_build_goes_on_and_ends_with_the_same_model(built, profile_path, tmp_path, seconds):
    table = built[0] / "latency_table.json"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build(quick(profile_path, table), whole, Console(quiet=True))
    command = [sys.executable, "-c", "from vitprune_deploy.cli import main; raise SystemExit(main())", "build"]
    command += [
        str(profile_path),
        "--out",
        str(killed),
        "--set",
        f"measure.table={table}",
        "--set",
        "search.landings=0",
    ]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = stage_folders(killed)
    build(quick(profile_path, table), killed, Console(quiet=True))
    assert done.items() <= stage_folders(killed).items()  # what was finished was not done again
    for name in ("plan.yaml", "model.json", "frontier.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_damaged_files_are_refused_or_renewed(built, profile_path, tmp_path):
    table, out = built[0] / "latency_table.json", tmp_path / "out"
    build(quick(profile_path, table), out, Console(quiet=True))
    (out / "model.onnx").write_bytes((out / "model.onnx").read_bytes()[:-100])
    with pytest.raises(DamagedFile, match=r"model\.onnx is cut off or changed"):
        load(out)
    weights = next((out / ".work").glob("model-*/dense.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    manifest = build(quick(profile_path, table), out, Console(quiet=True))
    assert verify(out) == manifest


def test_an_unreachable_budget_leaves_the_fastest_plan_and_says_so(built, profile_path, tmp_path):
    table = built[0] / "latency_table.json"
    manifest = build(quick(profile_path, table, "budget.speedup=100"), tmp_path / "out", Console(quiet=True))
    assert manifest.verdict == "fail"
    assert manifest.model_extra["search"]["status"] == "unreachable"
    assert verify(tmp_path / "out") == manifest


def test_a_published_way_to_share_the_budget_takes_the_place_of_the_search(built, profile_path, tmp_path):
    asked = ["prune.tokens.method=none", "prune.criterion=savit", "prune.allocation=savit", "budget.speedup=1.3"]
    profile = quick(profile_path, built[0] / "latency_table.json", *asked)
    manifest = build(profile, tmp_path / "out", Console(quiet=True))
    assert manifest.pruned.macs < manifest.dense.macs
    assert manifest.parity.max_abs <= 1e-4
    plan = Plan.from_dict(yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text()))
    assert plan.reducer is None
    assert all(block.heads and block.mlp for block in plan.blocks)  # it protects the best of each half
    assert verify(tmp_path / "out") == manifest


def test_where_nothing_is_gained_the_dense_model_is_the_answer(built, profile_path, tmp_path):
    profile = load_profile(
        profile_path, [f"measure.table={built[0] / 'latency_table.json'}", "budget.speedup=1", "search.evaluations=1"]
    )
    manifest = build(profile, tmp_path / "out", Console(quiet=True))
    assert manifest.pruned.macs == manifest.dense.macs
    assert manifest.model_extra["search"]["status"] == "dense"


@pytest.mark.alone
@pytest.mark.skipif(not find_spec("openvino"), reason="openvino is not installed")
def test_openvino_is_searched_measured_and_judged_in_its_own_precision(profile_path, tmp_path):
    from vitprune_deploy.verbs.doctor import try_openvino

    precision = "fp32" if try_openvino("bf16") else "bf16"
    there = [f"runtime={{name: openvino, precision: {precision}}}", "budget.speedup=1.3", "recover.enabled=false"]
    there += ["prune.tokens={method: evit, levels: 3}", "prune.heads.enabled=false"]  # fewer parts to measure
    manifest = build(load_profile(profile_path, there), tmp_path / "out", Console(quiet=True))
    assert manifest.device["runtime"] == "openvino"
    assert [(one.runtime, one.precision, one.status) for one in manifest.engines] == [("openvino", precision, "run")]
    assert (manifest.parity.max_abs > 1e-4) == (precision == "bf16")
    assert verify(tmp_path / "out") == manifest
    with load(tmp_path / "out") as model:
        assert model.backend.runtime.startswith("openvino")
    validate_folder(Console(quiet=True), tmp_path / "out", [])


def test_int8_is_tried_and_the_reason_is_told_either_way(built, profile_path, tmp_path):
    out, asked = tmp_path / "out", ["runtime.try_int8=true", "recover.enabled=false"]
    manifest = build(quick(profile_path, built[0] / "latency_table.json", *asked), out, Console(quiet=True))
    found = manifest.model_extra["int8"]
    assert found["why"] in (out / "report.html").read_text()
    assert manifest.engines[0].precision == ("int8" if found["kept"] else "fp32")
    assert (out / "engine" / "model.int8.onnx").exists() == found["kept"]
    assert found["after_ms"]["value_ms"] > 0
    assert verify(out) == manifest
    with load(out) as model:
        assert np.isfinite(model.predict(np.zeros((3, 32, 32, 3), np.uint8)).logits).all()


def test_several_devices_are_built_in_one_go_and_share_what_no_device_decides(built, profile_path, tmp_path, capsys):
    table = built[0] / "latency_table.json"
    with profile_path.open("a") as file:
        file.write("devices: {plain: {}, strict: {budget: {speedup: 2}}}\n")
    fixed = [f"measure.table={table}", "search.landings=0", "recover.enabled=false"]
    arguments = ["build", str(profile_path), "--out", str(tmp_path / "out"), *(f"--set={one}" for one in fixed)]
    assert main([*arguments, "--json"]) in (0, 1)
    said = json.loads(capsys.readouterr().out)
    assert list(said["devices"]) == ["plain", "strict"]
    works = [stage_folders(tmp_path / "out" / name) for name in said["devices"]]
    shared = {name for name in works[0] if name in works[1]}
    assert {name.rpartition("-")[0] for name in shared} == {"model", "images", "methods", "measure", "learn", "losses"}
    speedups = [load(tmp_path / "out" / name) for name in said["devices"]]
    assert len(speedups) == 2
    assert "strict/report.html" in (tmp_path / "out" / "report.html").read_text()
    for name in said["devices"]:
        verify(tmp_path / "out" / name)


def test_one_plan_for_several_devices_is_the_plan_of_the_slowest(built, profile_path, tmp_path):
    plain = json.loads((built[0] / "latency_table.json").read_text())
    plain["attn"] = [[n, h, 3 * ms, seen] for n, h, ms, seen in plain["attn"]]
    (tmp_path / "slow.json").write_text(json.dumps(plain))
    with profile_path.open("a") as file:
        tables = {"one": built[0] / "latency_table.json", "other": tmp_path / "slow.json"}
        entries = ", ".join(f"{name}: {{measure: {{table: {path}}}}}" for name, path in tables.items())
        file.write(f"devices: {{{entries}}}\n")
    profiles = load_fleet(profile_path, ["search.one_plan=true", "search.landings=0", "recover.enabled=false"])
    boards = build_fleet(profiles, tmp_path / "out", Console(quiet=True))
    assert [board.why for board in boards] == ["", ""]
    plans = [(tmp_path / "out" / board.name / "plan.yaml").read_text() for board in boards]
    weights = [(tmp_path / "out" / board.name / "model.safetensors").read_bytes() for board in boards]
    assert plans[0] == plans[1]
    assert weights[0] == weights[1]
    for board in boards:
        dense_ms, found = board.manifest.dense.latency_ms.p50, board.manifest.pruned.predicted_latency_ms
        assert dense_ms > 0
        assert found > 0


def test_another_devices_table_is_refused(built, profile_path, tmp_path):
    plain = json.loads((built[0] / "latency_table.json").read_text())
    plain["circumstances"]["device"]["cpu"] = "another processor"
    (tmp_path / "table.json").write_text(json.dumps(plain))
    with pytest.raises(InputError, match="another device"):
        build(quick(profile_path, tmp_path / "table.json"), tmp_path / "out", Console(quiet=True))


def test_recovery_is_shared_by_several_processes(built, profile_path, tmp_path):
    profile = quick(profile_path, built[0] / "latency_table.json")
    bench = run(profile, tmp_path / "out", Console(quiet=True), until="search")
    slim, _ = slim_model(bench)
    (tmp_path / "trained").mkdir()
    train_on(2, bench, slim, tmp_path / "trained")
    checks = json.loads((tmp_path / "trained" / "recovery.json").read_text())
    assert checks[-1]["step"] == profile.recover.max_steps
    assert sorted(path.name for path in (tmp_path / "trained").iterdir()) == [
        "model.json", "model.safetensors", "recovery.json",
    ]  # fmt: skip


def test_a_schedule_is_what_the_built_model_keeps(profile_path, tmp_path):
    fixed = ["prune={tokens: {method: pitome, schedule: {0: 40, 1: 30}}, last_block: full}", "search.landings=0"]
    manifest = build(load_profile(profile_path, fixed), tmp_path, Console(quiet=True))
    plan = Plan.from_dict(yaml.safe_load((tmp_path / "plan.yaml").read_text()))
    assert plan.reducer == "pitome"
    assert [block.patches for block in plan.blocks] == [40, 30, None]
    assert manifest.parity.max_abs <= 1e-4


def test_a_methods_own_search_says_what_is_kept(profile_path, tmp_path):
    own = load_profile(profile_path, ["prune={tokens: {method: psvit, schedule: own-0.001}, last_block: full}"])
    bench = run(own, tmp_path / "out", Console(quiet=True), until="methods")
    found = bench.schedule()
    assert found[0] < 64
    assert found == psvit.search_counts(bench.dense, bench.search_images[: screen.CALIBRATION], 0.001).patches
    assert set(sizes(bench).patches) == {64, *found}
    small = reduce_tokens(bench.dense, "psvit", found, bench.method_weights("psvit"))
    assert torch.isfinite(small(bench.search_images[:2])).all()


@pytest.mark.parametrize(
    ("method", "recipe"),
    [("dynamicvit", "published"), ("evovit", "published"), ("ia_red2", "distil"), ("cait", "distil")],
)
def test_methods_with_weights_are_searched_trained_and_exported(profile_path, tmp_path, method, recipe):
    tokens_alone = [f"prune={{heads: {{enabled: false}}, mlp: {{enabled: false}}, depth: {{enabled: false}}, "
                    f"tokens: {{method: {method}, levels: 5}}, last_block: full}}"]  # fmt: skip
    profile = load_profile(profile_path, [*tokens_alone, f"recover.recipe={recipe}"])
    manifest = build(profile, tmp_path / "out", Console(quiet=True))
    plan = Plan.from_dict(yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text()))
    assert plan.reducer == method
    assert manifest.parity.max_abs <= 1e-4
    own = method != "evovit"  # has weights of its own
    assert (manifest.pruned.params > manifest.dense.params) == own
    log = json.loads(next((tmp_path / "out" / ".work").glob("recover-*/recovery.json")).read_text())
    assert log[-1]["step"] == profile.recover.max_steps


def test_an_official_checkpoint_is_built_with_its_own_weights(profile_path, tmp_path):
    import timm
    from safetensors.torch import load_file

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 3}
    weights = timm.create_model("vit_tiny_patch16_224", **sizes).state_dict()
    shapes = {
        "in_conv.0": (48,),
        "in_conv.1": (48, 48),
        "out_conv.0": (24, 48),
        "out_conv.2": (12, 24),
        "out_conv.4": (2, 12),
    }
    for stage in range(3):  # of three blocks: in front of the first, second and third
        for name, shape in shapes.items():
            weights[f"score_predictor.{stage}.{name}.weight"] = torch.randn(shape)
            weights[f"score_predictor.{stage}.{name}.bias"] = torch.randn(shape[0])
    torch.save({"model": weights}, tmp_path / "dynamicvit.pth")
    theirs = [f"model.checkpoint={tmp_path / 'dynamicvit.pth'}", "model.checkpoint_format=dynamicvit",
              "prune={tokens: {method: dynamicvit, schedule: {0: 40, 2: 20}}, last_block: full}",
              "recover.enabled=false", "search.landings=0"]  # fmt: skip
    build(load_profile(profile_path, theirs), tmp_path / "out", Console(quiet=True))
    built = load_file(tmp_path / "out" / "model.safetensors")
    for block in (0, 2):
        for ours, official in (("norm", "in_conv.0"), ("inner", "in_conv.1"), ("outer.4", "out_conv.4")):
            found = built[f"blocks.{block}.reducer.{ours}.weight"]
            assert torch.equal(found, weights[f"score_predictor.{block}.{official}.weight"])
