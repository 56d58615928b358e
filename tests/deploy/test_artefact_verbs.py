"""validate, inspect and visualize, on a folder as a build leaves it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from PIL import Image

from vitprune import parts
from vitprune_deploy import cli
from vitprune_deploy.artifact import Manifest, hash_files
from vitprune_deploy.build.bench import save_vit
from vitprune_deploy.data import Preprocess
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.profile import commented_yaml, load_profile
from vitprune_deploy.runtime import load
from vitprune_deploy.validate import write_golden
from vitprune_deploy.verbs.fusion import missed_multiples

PREPROCESS = Preprocess((3, 28, 28), crop_pct=1.0)
FIGURES = {"params": 1, "macs": 1, "top1": 50.0, "latency_ms": {"p50": 1.0, "samples": 100}}
FILES = ["model.onnx", "model.json", "profile.yaml"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A model that is its own dense model, and images whose class is what the model says."""
    folder, model = tmp_path_factory.mktemp("built"), tiny.tiny_vit()
    out = folder / "out"
    kept = out / ".work" / "export-0"
    kept.mkdir(parents=True)
    export_onnx(model, out / "model.onnx")
    shutil.copy(out / "model.onnx", kept / "dense.onnx")
    (kept / "stage.json").write_text(json.dumps({"key": {}, "files": hash_files(kept, ["dense.onnx"])}))
    (out / "model.json").write_text(json.dumps(model.config.to_dict()))
    draw(folder / "images", model)
    values = {
        "model": {"name": "vit_tiny_patch16_224"},
        "data": {"source": str(folder / "images"), "calibration": {"images": 8}, "recovery": {"images": 8}},
        "search": {"probe_images": 4, "holdout_images": 4},
        "budget": {"latency_ms": 10_000.0, "threads": 1},
        "accuracy": {"min_top1": 99.0, "min_agreement": 99.0},
        "validation": {"runs": 20},
    }
    (folder / "made.yaml").write_text(commented_yaml(values))
    (out / "profile.yaml").write_text(load_profile(folder / "made.yaml").to_yaml())
    write_manifest(out)
    return out


def write_manifest(out, budget_ms=10_000.0, files=FILES):
    engine = {"runtime": "onnxruntime", "precision": "fp32", "status": "run", "file": "model.onnx"}
    Manifest(
        schema=1, verdict="pass", reasons=(), device={"cpu": "another"}, versions={}, dense=FIGURES, pruned=FIGURES,
        budget={"latency_ms": budget_ms, "percentile": 50, "batch": 1, "image_size": (28, 28)},
        parity={"max_abs": 0.0, "top1_agreement": 100.0}, engines=(engine,), files=hash_files(out, files),
        preprocess=PREPROCESS.to_dict(), classes=[f"class {i}" for i in range(10)],
    ).write(out)  # fmt: skip


def draw(folder, model):
    for i in range(10):
        (folder / f"class {i}").mkdir(parents=True)
    for seed in range(60):
        pixels = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)
        image = Image.fromarray(pixels)
        with torch.no_grad():
            label = int(model(torch.from_numpy(PREPROCESS(image))[None]).argmax())
        image.save(folder / f"class {label}" / f"{seed}.png")
    for i in range(10):  # a class without an image is no folder of a data set
        if not any((folder / f"class {i}").iterdir()):
            Image.new("RGB", (28, 28)).save(folder / f"class {i}" / "none.png")


def copied(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "copy"))


def test_validate_runs_the_engine_beside_the_dense_one_that_the_build_kept(built, capsys):
    code = cli.main(["validate", str(built), "--set", "accuracy.min_top1=50", "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["latency"].keys() == {"dense", "pruned"}
    assert found["accuracy"]["agreement"]["percent"] == 100.0
    assert found["latency"]["pruned"]["samples"] >= 20
    assert (code, found["verdict"]) in {(0, "pass"), (1, "unstable")}  # others may use the machine
    assert any("cpu was another" in line for line in found["device_differences"])
    assert "cpu was another" in err
    sound = found["consistency"]["onnxruntime fp32"]
    assert sound["passed"]
    assert {check["name"] for check in sound["checks"] if not check["skipped"]} == {
        "finite", "second session", "second process", "unfused", "repeated",
    }  # fmt: skip


def test_validate_without_the_dense_engine_cannot_say_how_far_they_agree(built, tmp_path, capsys):
    folder = copied(built, tmp_path)
    (folder / ".work" / "export-0" / "dense.onnx").write_bytes(b"cut off")
    assert cli.main(["validate", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "agreement with the dense model was not measured" in out
    assert "dense p50" not in out


def test_validate_fails_where_the_golden_image_gives_other_logits(built, tmp_path, capsys):
    folder = copied(built, tmp_path)
    with load(folder) as model:
        write_golden(folder, model, Image.new("RGB", (40, 30), "orange"), "fp32")
    golden = json.loads((folder / "golden.json").read_text())
    golden["logits"][0] += 1
    (folder / "golden.json").write_text(json.dumps(golden))
    write_manifest(folder, files=[*FILES, "golden.png", "golden.json"])
    assert cli.main(["validate", str(folder), "--set", "accuracy.min_top1=50", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "fail"
    assert found["golden"]["max_abs"] == pytest.approx(1, abs=1e-4)
    assert found["reasons"][0].startswith("the golden image's logits differ by up to 1 from what the build gave")


def test_validate_judges_by_the_budget_in_milliseconds_of_the_build(built, tmp_path, capsys):
    folder = copied(built, tmp_path)
    shutil.rmtree(folder / ".work")
    write_manifest(folder, budget_ms=1e-4)
    assert cli.main(["validate", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["budget_ms"] == 1e-4
    assert found["verdict"] in ("fail", "unstable")


def test_validate_fails_an_engine_that_answers_otherwise_each_time(built, tmp_path, capsys):
    folder = copied(built, tmp_path)
    model = onnx.load(folder / "model.onnx")
    model.graph.node[-1].output[0] = "calm"
    model.graph.node.extend([
        onnx.helper.make_node("RandomNormalLike", ["calm"], ["noise"], scale=0.01),
        onnx.helper.make_node("Add", ["calm", "noise"], ["logits"]),
    ])  # fmt: skip
    onnx.save(model, folder / "model.onnx")
    write_manifest(folder)
    assert cli.main(["validate", str(folder), "--set", "accuracy={min_top1: 2}"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("fail\n")
    for name in ("second process", "repeated"):  # all sessions of a process begin with the same noise
        assert f"  check '{name}' at batch 1: " in out
        assert any(line.startswith(name) and "failed in" in line for line in out.splitlines())


def test_an_engine_that_was_only_built_and_does_not_load_is_left_out_with_a_line(built, tmp_path, capsys):
    folder = copied(built, tmp_path)
    plain = json.loads((folder / "manifest.json").read_text())
    plain["engines"].append({"runtime": "tensorrt", "precision": "fp16", "status": "built", "file": "engine/m.plan"})
    (folder / "manifest.json").write_text(json.dumps(plain))
    cli.main(["validate", str(folder), "--set", "accuracy={min_top1: 2}", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["consistency"].keys() == {"onnxruntime fp32"}
    assert "note: the engine for tensorrt fp16 is not checked: " in err


def test_validate_judges_the_memory_that_the_profile_allows(built, capsys):
    assert cli.main(["validate", str(built), "--set", "budget.memory_mb=0.001", "--json"]) == 1
    assert any("over budget.memory_mb 0.001" in reason for reason in json.loads(capsys.readouterr().out)["reasons"])


def test_validate_without_the_dense_engine_judges_a_drop_by_the_fp32_model_of_the_build(built, tmp_path, capsys):
    folder = copied(built, tmp_path)
    shutil.rmtree(folder / ".work")
    plain = json.loads((folder / "manifest.json").read_text())
    plain["dense"]["reference_top1"] = 200.0  # nothing comes near it, while dense.top1 is 50
    (folder / "manifest.json").write_text(json.dumps(plain))
    assert cli.main(["validate", str(folder), "--set", "accuracy.max_drop=10", "--json"]) == 1
    reasons = json.loads(capsys.readouterr().out)["reasons"]
    assert any("from 200.00 to" in reason for reason in reasons)


@pytest.mark.parametrize("verb", ["validate", "inspect"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_ends_with_2(verb, name, built, tmp_path, capsys):
    folder = copied(built, tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    assert cli.main([verb, str(folder)]) == 2
    assert f"{folder / name} is cut off or changed since it was built" in "".join(capsys.readouterr())


def test_inspect_shows_figures_blocks_engines_and_that_the_files_are_whole(built, capsys):
    assert cli.main(["inspect", str(built)]) == 0
    text = capsys.readouterr().out
    assert "all 3 files are what the manifest says" in text
    assert "latency p50 (ms), batch 1" in text
    assert any(line.split() == ["heads", "4", "4"] for line in text.splitlines())
    assert cli.main(["inspect", str(built / "manifest.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["blocks"] == {"heads": [4, 4], "mlp": [64, 64], "patches": [49, 49]}
    assert found["damaged"] == []
    assert found["warnings"] == [
        "TensorRT's fused attention takes heads of 16 to 256 channels in multiples of 8, and those of block 0, 1 have 8"
    ]
    assert f"warning: {found['warnings'][0]}" in text


def test_inspect_warns_of_sizes_that_kernels_do_not_favour(built, tmp_path, capsys):
    folder = copied(built, tmp_path)
    config = json.loads((folder / "model.json").read_text())
    config["blocks"][0] |= {"qk_dim": 24, "v_dim": 20, "mlp": 60}
    config["blocks"][1] |= {"heads": 0, "mlp": 64, "qk_dim": 24, "v_dim": 20}
    (folder / "model.json").write_text(json.dumps(config))
    write_manifest(folder)
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["blocks"]["qk"] == [24, 0]
    assert found["warnings"] == [
        "TensorRT's fused attention takes heads of 16 to 256 channels in multiples of 8, and those of block 0 have 20",
        "MLP units are multiples of 8 where kernels favour it, and there are 60 in block 0",
        "dims of a head are multiples of 8 where kernels favour it, and there are 20 in block 0",
    ]


def test_channels_that_kernels_do_not_favour_are_told_where_they_were_asked_for():
    asked = {"prune": {"embedding": 37}}
    assert missed_multiples({"dim": 37}, asked) == [
        "channels are multiples of 8 where kernels favour it, and there are 37"
    ]
    assert missed_multiples({"dim": 40}, asked) == missed_multiples({"dim": 37}, {}) == []


def test_inspect_shows_what_the_build_found_of_the_engine(built, tmp_path, capsys):
    folder = copied(built, tmp_path)
    plain = json.loads((folder / "manifest.json").read_text())
    mha = {"block": 0, "fused": True, "kernels": ["mha"], "around": {}}
    apart = mha | {"fused": False, "kernels": ["a", "b"]}
    plain["fusion"] = {"runtime": "tensorrt", "dense": [mha], "pruned": [apart], "warnings": ["a fusion broke"]}
    check = {"name": "alone", "passed": True, "batches": [3, 8], "max_abs": 1e-6, "limit": 1e-4, "rows": 11, "wrong": 0,
             "ties": 2, "skipped": None}  # fmt: skip
    plain["consistency"] = {"arithmetic": "fp32", "passed": True, "checks": [check]}
    (folder / "manifest.json").write_text(json.dumps(plain))
    assert cli.main(["inspect", str(folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "0 one kernel: mha a + b nothing" in lines
    assert "warning: a fusion broke" in lines
    assert "alone 3, 8 1e-06 0.0001 passed, 2 tied" in lines


def test_inspect_shows_the_sidecar_of_an_engine(tmp_path, capsys):
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"plan")
    sidecar = {"runtime": "tensorrt_rtx", "version": "1.7", **hashes(plan)}
    (tmp_path / "model.plan.json").write_text(json.dumps(sidecar))
    assert cli.main(["inspect", str(plan), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == sidecar
    plan.write_bytes(b"changed")
    assert cli.main(["inspect", str(plan)]) == 2


def hashes(plan):
    return {"sha256": hash_files(plan.parent, [plan.name])[plan.name]}


def test_inspect_of_an_empty_onnx_file_is_told(tmp_path, capsys):
    (tmp_path / "model.onnx").touch()
    assert cli.main(["inspect", str(tmp_path / "model.onnx")]) == 2
    assert "model.onnx is cut off or no ONNX file" in capsys.readouterr().err


def test_inspect_says_what_it_knows_of(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    assert cli.main(["inspect", str(tmp_path / "notes.txt")]) == 2
    assert "inspect knows output folders, .onnx files and .plan files" in capsys.readouterr().err


def reducing(folder, method="tome"):
    """An output folder of a model that reduces tokens twice; only what visualize reads."""
    keep = {1: 28, 2: 16} if method == "cait" else {1: 30, 2: 20}  # a grid of 7 x 7, merged twice
    model = tiny.tiny_vit(depth=3, **({"keep": keep, "reducer": method} if method else {}))
    save_vit(model, folder, "model")
    write_manifest(folder, files=["model.json", "model.safetensors"])
    return folder


@pytest.mark.parametrize("method", parts.names("vitprune.tokens"))
def test_visualize_draws_each_image_block_by_block(tmp_path, capsys, method):
    folder, pictures = reducing(tmp_path, method), [tmp_path / "a" / "it.png", tmp_path / "b" / "it.png"]
    for seed, path in enumerate(pictures):
        path.parent.mkdir()
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 28, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    assert cli.main(["visualize", str(folder), *map(str, pictures), "--json"]) == 0
    written = [Path(name) for name in json.loads(capsys.readouterr().out)]
    assert written == [folder / "tokens" / "it.png", folder / "tokens" / "it-2.png"]
    first, second = (np.asarray(Image.open(path)) for path in written)
    assert first.shape == second.shape
    assert first.shape[1] > 3 * 168  # the image and two blocks, each at least so wide
    assert (first != second).any()


def test_visualize_says_what_it_cannot_draw(tmp_path, capsys):
    (tmp_path / "dense").mkdir()
    (tmp_path / "notes.png").write_text("no image")
    Image.new("RGB", (28, 28)).save(tmp_path / "good.png")
    folder, dense = reducing(tmp_path), reducing(tmp_path / "dense", None)
    for arguments, says in [
        ([folder, tmp_path / "none.png"], "none.png: there is no such image"),
        ([folder, tmp_path / "notes.png"], "notes.png is no image that can be read"),
        ([dense, tmp_path / "good.png"], "the model reduces no tokens"),
        ([tmp_path / "nowhere", tmp_path / "good.png"], "nowhere: there is no such folder"),
    ]:
        assert cli.main(["visualize", *map(str, arguments)]) == 2
        assert says in capsys.readouterr().err
    assert not (dense / "tokens").exists()
    (folder / "model.safetensors").write_bytes(b"cut")
    assert cli.main(["visualize", str(folder), str(tmp_path / "good.png")]) == 2
    assert "is cut off or changed" in capsys.readouterr().err
