from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitprune.errors import InputError, MissingError
from vitprune_deploy import cli
from vitprune_deploy.build import Bench, prepare
from vitprune_deploy.console import Console
from vitprune_deploy.profile import commented_yaml, load_profile
from vitprune_deploy.verbs import init
from vitprune_deploy.verbs.estimate import duration

CLASSES = ["bird", "cat", "dog"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def draw(folder, classes=CLASSES, count=4):
    for number, name in enumerate(classes):
        Path(folder, name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(100 * number + i).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(Path(folder, name, f"{i}.png"))


def test_a_profile_of_a_timm_name_loads_and_shows_every_key(capsys):
    assert cli.main(["init", "deit_tiny_patch16_224", "--speedup", "1.5"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("profile.yaml: deit_tiny_patch16_224, 224 x 224 pixels, 196 patches, 1000 classes; 1.5 times")
    assert "data.source" in err
    profile = load_profile("profile.yaml")
    assert (profile.model.name, profile.budget.speedup) == ("deit_tiny_patch16_224", 1.5)
    assert profile.accuracy.max_drop == 1.0
    assert "# how hard the search tries\n" in Path("profile.yaml").read_text()


def test_splits_are_recognised_and_paths_are_relative_to_the_profile(capsys):
    draw("images/train")
    draw("images/val")
    assert cli.main(["init", "deit_tiny_patch16_224", "--data", "images", "--output", "my.yaml", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["values"]
    assert values["data"] == {"source": "images", "calibration": {"split": "train"}, "recovery": {"split": "train"},
                              "test": {"split": "val"}}  # fmt: skip
    assert load_profile("my.yaml", files_exist=True).data.source == str(Path("images").absolute())


def test_images_without_classes_get_a_floor_that_needs_none(capsys):
    draw("images", classes=["."])
    assert cli.main(["init", "deit_tiny_patch16_224", "--data", "images"]) == 0
    profile = load_profile("profile.yaml")
    assert (profile.accuracy.max_drop, profile.accuracy.min_agreement) == (None, 97.0)


def test_nothing_is_overwritten_and_nothing_is_left_by_a_refusal(capsys):
    Path("profile.yaml").write_text("mine")
    assert cli.main(["init", "deit_tiny_patch16_224"]) == 2
    assert capsys.readouterr().err == "error: profile.yaml exists; choose another name with --output\n"
    assert Path("profile.yaml").read_text() == "mine"
    assert cli.main(["init", "deit_tinny_patch16_224", "--output", "new.yaml"]) == 2
    assert "did you mean deit_tiny_patch16_224" in capsys.readouterr().err
    assert cli.main(["init", "deit_tiny_patch16_224", "--data", "nowhere", "--output", "new.yaml"]) == 2
    assert cli.main(["init", "gone.safetensors", "--output", "new.yaml"]) == 2
    assert not Path("new.yaml").exists()


def test_a_checkpoint_tells_its_architecture_by_its_name_or_shapes(capsys):
    weights = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32, in_chans=1).state_dict()
    for name in ("deit_tiny_distilled_patch16_224-ours.pth", "mine.pth"):
        torch.save({"model": weights}, name)
        assert cli.main(["init", name, "--output", f"{name}.yaml"]) == 0
        profile = load_profile(f"{name}.yaml")
        assert profile.model.name == "deit_tiny_distilled_patch16_224"
        assert profile.model.checkpoint == str(Path(name).absolute())
        assert profile.model.args == {"num_classes": 3, "in_chans": 1, "img_size": 32}


def test_an_architecture_that_cannot_be_told_is_asked_for():
    odd = {"patch_embed.proj.weight": torch.zeros(96, 3, 4, 4)}
    with pytest.raises(
        InputError, match=r"odd\.pth: its architecture cannot be told from its weights; .*--architecture"
    ):
        init.like_shapes(odd, Path("odd.pth"))


@pytest.mark.parametrize(
    ("gpu", "capability", "extends", "runtime"),
    [
        ("NVIDIA GeForce RTX 4090", "8.9", "devices/rtx4090", None),
        ("NVIDIA H100 80GB HBM3", "9.0", "devices/h100", None),
        ("Tesla T4", "7.5", "devices/t4", None),
        ("NVIDIA L4", "8.9", "devices/l4", None),
        ("NVIDIA L40S", "8.9", None, "tensorrt"),
        ("NVIDIA GeForce RTX 3080", "8.6", None, "tensorrt-rtx"),
        ("NVIDIA A100-SXM4-40GB", "8.0", None, "tensorrt"),
    ],
)
def test_a_gpu_is_matched_with_its_device_file_or_described(gpu, capability, extends, runtime, monkeypatch):
    facts = {"name": gpu, "compute_capability": capability, "memory_mb": "15360", "driver": "580"}
    here = {"cpu": "x", "architecture": "x86_64", "cores": 4, "gpus": [facts]}
    device = SimpleNamespace(fingerprint=lambda runtime: here, has=lambda module: False)
    monkeypatch.setattr(init, "on_host", lambda host: device)
    found = init._device(2.0, None)
    assert found.get("extends") == extends
    assert found.get("runtime", {}).get("name") == runtime
    rest = {"model": {"name": "deit_tiny_patch16_224"}, "data": {"source": "images"}, "accuracy": {"max_drop": 1.0}}
    Path("gpu.yaml").write_text(commented_yaml(rest | found))
    assert load_profile("gpu.yaml").device.compute_capability == capability


@pytest.mark.parametrize(
    ("cpu", "architecture", "flags", "extends"),
    [
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "aarch64", ["asimd"], "devices/orin-nx"),
        ("NVIDIA Orin Nano Developer Kit", "aarch64", [], "devices/orin-nano"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "aarch64", [], "devices/agx-orin"),
        ("Raspberry Pi 5 Model B", "aarch64", ["asimd"], None),
        ("Intel(R) Xeon(R)", "x86_64", ["amx_bf16"], "devices/x86-bf16"),
        ("AMD Ryzen 7", "x86_64", ["avx2"], "devices/x86-cpu"),
    ],
)
def test_a_board_is_asked_what_it_is(cpu, architecture, flags, extends, monkeypatch):
    here = {"cpu": cpu, "architecture": architecture, "cores": 8, "gpus": [], "flags": flags}
    device = SimpleNamespace(fingerprint=lambda runtime: here, has=lambda module: True)
    asked = []
    monkeypatch.setattr(init, "on_host", lambda host: asked.append(host) or device)
    found = init._device(2.0, "ssh://me@board")
    assert asked == ["ssh://me@board"]
    assert found.get("extends") == extends
    rest = {"model": {"name": "deit_tiny_patch16_224"}, "data": {"source": "images"}, "accuracy": {"max_drop": 1.0}}
    Path("board.yaml").write_text(commented_yaml(rest | found))
    loaded = load_profile("board.yaml")
    assert loaded.device.host == "ssh://me@board"
    assert loaded.device.name == (cpu if extends is None else load_profile("board.yaml").device.name)


def tiny_profile(**changes):
    """A tiny model with random weights, and 12 images of three classes."""
    draw("images", count=60)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    values = {
        "model": {"name": "vit_tiny_patch16_224", "pretrained": False, "args": arguments, "classes": CLASSES},
        "data": {"source": "images", "calibration": {"images": 16}},
        "search": {"probe_images": 8, "holdout_images": 8},
        "budget": {"speedup": 2.0, "threads": 1},
        "accuracy": {"max_drop": 1.0},
    }
    Path("tiny.yaml").write_text(commented_yaml(values | changes))


def test_check_finds_nothing_wrong_with_what_can_be_built_and_estimates_the_time(capsys):
    tiny_profile()
    assert cli.main(["check", "tiny.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["images"] == {"calibration": 16, "recovery": 82, "test": 82}
    assert found["token_methods"] == [
        "ats_fixed", "diffrate", "dpsvit", "evit", "evit_drop", "pitome", "psvit", "tome", "zero_tprune",
    ]  # fmt: skip
    assert found["folder"] == "out/tiny"
    seconds = found["estimated_seconds"]
    stages = {"measure", "learn", "losses", "search", "weights", "recover", "export", "engines", "validate"}
    assert seconds.keys() == stages
    assert all(value >= 0 for value in seconds.values())
    assert seconds["learn"] == seconds["weights"] == 0  # not asked for
    assert not Path("out").exists()


def test_check_estimates_the_learning_of_widths_and_the_pruning_of_weights(capsys):
    tiny_profile()
    learned = ["prune.learned={method: xpruner, max_steps: 10}", "prune.tokens.method=none", "recover.batch=8"]
    twice = [*learned[:2], "prune.learned.max_steps=1000000", "prune.learned.max_seconds=7", learned[2]]
    found = [_estimated(capsys, settings) for settings in (learned, twice)]
    assert found[0]["learn"] > 0
    assert found[0]["losses"] == 0
    assert found[1]["learn"] == 7
    magnitude, cap = (_estimated(capsys, [f"prune.weights={{method: {name}}}"]) for name in ("magnitude", "cap"))
    assert magnitude["weights"] == 0 < cap["weights"]


def _estimated(capsys, settings):
    """Seconds by stage, as ``check`` tells them."""
    words = [word for setting in settings for word in ("--set", setting)]
    assert cli.main(["check", "tiny.yaml", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["estimated_seconds"]


def test_check_tells_all_independent_problems_at_once(capsys):
    tiny_profile()
    wrong = ["--set", "runtime.provider=cuda", "--set", "data.class_map=[bird, cat, cow]", "--set",
             "prune.tokens.method=evit", "--set", "model.args.class_token=false",
             "--set", "model.args.global_pool=avg"]  # fmt: skip
    assert cli.main(["check", "tiny.yaml", *wrong]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "this stands in the way of building tiny:"
    assert len(lines) == 4
    assert "CUDAExecutionProvider" in lines[1]
    assert any("cow" in line or "dog" in line for line in lines)
    assert any("prune.tokens.method: evit scores patches by the class token" in line for line in lines)


def test_check_refuses_a_floor_of_top_1_where_an_image_lies_in_no_class_folder(capsys):
    tiny_profile()
    shutil.copy("images/cat/0.png", "images/stray.png")
    assert cli.main(["check", "tiny.yaml"]) == 2
    assert "accuracy.max_drop needs classes, and the images of" in (out := capsys.readouterr().out)
    assert "stray.png lies in no class folder" in out
    assert cli.main(["check", "tiny.yaml", "--set", "accuracy={max_drop: null, min_agreement: 97}"]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"levels"', "table.json is cut off or no JSON"), ("[]", "table.json: this is not a latency table")],
)
def test_check_refuses_a_damaged_latency_table(text, said, capsys):
    tiny_profile()
    Path("table.json").write_text(text)
    assert cli.main(["check", "tiny.yaml", "--set", "measure.table=table.json"]) == 2
    assert said in capsys.readouterr().out


def images_and_model(*overrides):
    """What the first two stages depend on."""
    profile = load_profile("tiny.yaml", overrides)
    bench = Bench(profile, Console(quiet=True), Path("work"), {"model": Path("work")})
    Path("work").mkdir(exist_ok=True)
    prepare.prepare_model(bench, Path("work"))
    return prepare.images_settings(bench), prepare.model_settings(bench)


def test_another_class_map_or_other_class_names_in_the_same_file_are_another_input():
    tiny_profile()
    given = ["model.classes=names.txt", "data.class_map=map.yaml"]
    Path("names.txt").write_text("a\nb\nc")
    Path("map.yaml").write_text("{bird: 0, cat: 1, dog: 2}")
    images, model = images_and_model(*given)
    assert (images, model) == images_and_model(*given)
    Path("map.yaml").write_text("{bird: 0, cat: 2, dog: 1}")
    assert images_and_model(*given)[0] != images
    Path("names.txt").write_text("a\nb\nd")
    assert images_and_model(*given)[1] != model


def test_a_file_of_classes_that_is_no_text_is_refused():
    tiny_profile()
    Path("names.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match=r"model\.classes: .*names\.txt cannot be read"):
        images_and_model("model.classes=names.txt")


def test_a_link_to_nothing_is_an_unreadable_image_and_no_crash():
    tiny_profile()
    Path("images/cat/gone.png").symlink_to("nowhere.png")
    images, _ = images_and_model("data.max_unreadable=0.5")
    assert sum(part["images"] for part in images["parts"].values()) == 181


def test_an_output_folder_that_is_a_file_is_refused(capsys):
    tiny_profile()
    Path("taken").write_text("mine")
    for out in ("taken", "taken/below"):
        assert cli.main(["build", "tiny.yaml", "--out", out, "-q"]) == 2
        assert f"error: {out} cannot be written to" in capsys.readouterr().err


def test_check_looks_at_the_images_even_if_the_model_is_wrong(capsys):
    tiny_profile()
    assert cli.main(["check", "tiny.yaml", "--set", "model.name=vit_tinny", "--set", "data.test.images=9999"]) == 2
    text = capsys.readouterr().out
    assert "has no model 'vit_tinny'" in text
    assert "too few for" in text


def test_check_refuses_gpus_that_the_installed_tensorrt_rtx_does_not_serve(monkeypatch, capsys):
    tiny_profile(device={"compute_capability": "9.0"}, runtime={"also_build": [{"name": "tensorrt-rtx"}]})
    served = {"builds": True, "runs": False, "why": "no GPU", "compute_capabilities": ["7.5", "8.6"]}
    monkeypatch.setattr("vitprune_deploy.verbs.check.capabilities", lambda: {"tensorrt_rtx": served})
    assert cli.main(["check", "tiny.yaml"]) == 2
    assert "builds for compute capabilities 7.5, 8.6, not for 9.0" in capsys.readouterr().out


def test_check_knows_that_tensorrt_rtx_needs_a_driver_to_build_engines_that_can_be_refitted(monkeypatch, capsys):
    tiny_profile(runtime={"also_build": [{"name": "tensorrt-rtx"}], "refit": True})
    found = {"builds": True, "runs": False, "gpu": None, "why": "no driver", "compute_capabilities": ["8.6"]}
    monkeypatch.setattr("vitprune_deploy.verbs.check.capabilities", lambda: {"tensorrt_rtx": found})
    assert cli.main(["check", "tiny.yaml"]) == 3
    assert "runtime.refit: TensorRT-RTX builds engines that can be refitted only where" in capsys.readouterr().out


def test_check_of_a_machine_that_lacks_something_ends_with_3(monkeypatch, capsys):
    def missing():
        raise MissingError("torch cannot be imported; run `pip install 'vitprune[prune,cpu]'`")

    tiny_profile()
    monkeypatch.setattr("vitprune_deploy.verbs.check._check_packages", missing)
    assert cli.main(["check", "tiny.yaml"]) == 3
    assert "pip install 'vitprune[prune,cpu]'" in capsys.readouterr().out


def test_durations_are_told_in_one_unit():
    assert [duration(s) for s in (0.2, 40, 420, 9000)] == ["1 s", "40 s", "7 min", "2.5 h"]


def test_check_begins_without_torch_so_that_it_can_say_that_there_is_none():
    code = "import sys, vitprune_deploy.verbs.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
