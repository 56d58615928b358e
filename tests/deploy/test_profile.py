"""Profiles: what is read, what is refused, and the sentence that its author reads."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from vitprune import parts
from vitprune.criteria.base import Criterion
from vitprune.errors import InputError
from vitprune_deploy import processor
from vitprune_deploy.backends import onnxruntime
from vitprune_deploy.profile import commented_yaml, json_schema, list_profiles, load_fleet, load_profile, patch_size
from vitprune_deploy.profile.checks import BLOCK_CRITERIA, NO_DIMS, PROVIDERS

SMALL = """\
model: {name: vit_tiny_patch16_224}
data: {source: images}
budget: {latency_ms: 5}
accuracy: {max_drop: 1}
"""
BUILDS = [listed for listed in list_profiles() if not listed.is_device]
DEVICES = [listed for listed in list_profiles() if listed.is_device]


@pytest.fixture
def write(tmp_path):
    def _write(text: str, name: str = "p.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def refused(path: Path | str, overrides=(), **options) -> list[str]:
    """The lines of the error, without the folder of the file."""
    with pytest.raises(InputError) as caught:
        load_profile(path, overrides, **options)
    return [line.replace(f"{Path(path).parent}/", "") for line in str(caught.value).split("\n")]


def test_four_keys_are_a_profile_and_the_rest_has_defaults(write):
    profile = load_profile(write(SMALL))
    assert (profile.name, profile.budget.latency_ms, profile.budget.percentile) == ("p", 5.0, 50)
    assert (profile.batch, profile.image_size, profile.head_multiple, profile.mlp_multiple) == (1, None, 1, 8)


@pytest.mark.parametrize("listed", BUILDS, ids=lambda listed: listed.name)
def test_shipped_profiles_load_and_come_back_the_same_from_their_resolved_form(listed, write):
    profile = load_profile(listed.path)
    assert listed.description
    assert load_profile(write(profile.to_yaml(), "resolved.yaml")) == profile


@pytest.mark.parametrize("listed", DEVICES, ids=lambda listed: listed.name)
def test_device_files_are_facts_that_a_profile_builds_on(listed, write):
    profile = load_profile(write(f"extends: {listed.name}\n{SMALL}"))
    assert profile.device.name
    assert profile.runtime.name in profile.device.runtimes
    assert "ms" not in yaml.safe_load(listed.path.read_text())["device"]


def test_jetsons_and_the_h100_ask_for_classic_tensorrt():
    for name in ("orin-nano", "orin-nx", "agx-orin", "h100"):
        device = yaml.safe_load(next(d.path for d in DEVICES if d.name == f"devices/{name}").read_text())
        assert device["runtime"]["name"] == "tensorrt"
        assert "tensorrt-rtx" not in device["device"]["runtimes"]


CRITERIA = "attn_taylor, bi, fisher, magnitude, minitron, nvit, obs, random, savit, taylor, xpruner"


def test_profiles_know_what_criteria_cannot_do():
    kinds = {name: parts.load("vitprune.criteria", name, Criterion) for name in CRITERIA.split(", ")}
    assert {name for name, kind in kinds.items() if kind.whole_blocks} == set(BLOCK_CRITERIA)
    assert {name for name, kind in kinds.items() if not kind.ranks_dims} == set(NO_DIMS)


def test_all_errors_come_at_once_in_the_order_of_the_file(write):
    text = """\
model:
  name: deit_small_patch16_224
  chekpoint: x
data: {source: imgs, workers: 1.5}
input: {batch: {min: 4, opt: 2, max: 8}, image_size: 225}
budget:
  latency: 3
  latency_ms: -1
  percentile: 200
accuracy: {max_drop: true}
prune: {tokens: {levels: foo}, criterion: obss}
sead: 3
"""
    assert refused(write(text), ["recover.steps=x"]) == [
        "--set recover.steps: is no key of a profile; did you mean recover.max_steps?",
        "p.yaml:3: model.chekpoint: is no key of a profile; did you mean model.checkpoint?",
        "p.yaml:4: data.workers: must be a whole number, got 1.5",
        "p.yaml:5: input.batch: must ascend, got min 4, opt 2, max 8",
        "p.yaml:5: input.image_size: must be whole patches of 16 x 16 pixels, got 225 x 225",
        "p.yaml:7: budget.latency: is no key of a profile; did you mean budget.latency_ms?",
        "p.yaml:8: budget.latency_ms: must be > 0, got -1",
        "p.yaml:9: budget.percentile: must be <= 99, got 200",
        "p.yaml:10: accuracy.max_drop: must be a number, got true",
        "p.yaml:11: prune.tokens.levels: must be a whole number or a list, got 'foo'",
        f"p.yaml:11: prune.criterion: must be one of {CRITERIA}, got 'obss'; did you mean obs?",
        "p.yaml:12: sead: is no key of a profile; did you mean seed?",
    ]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("budget: {speedup: 2}", "budget.speedup: excludes budget.latency_ms"),
        ("budget: {latency_ms: null}", "budget: needs latency_ms or speedup"),
        ("accuracy: {max_drop: null}", "accuracy: needs max_drop, min_top1 or min_agreement"),
        ("accuracy: {min_agreement: 0.98}", "accuracy.min_agreement: must be > 1, got 0.98"),
        ("data: {labelled: false}", "accuracy.max_drop: needs labels"),
        ("data: {source: null, recovery: {source: x}, test: {source: x}}", "data.calibration: has no source"),
        ("data: {source: 'timm:'}", "data.source: names no reader"),
        ("data: {root: x}", "data.root: belongs to a timm: reader"),
        ("data: {calibration: {images: 100}}", "data.calibration.images: must be at least"),
        ("data: {preprocess: {mean: [0.5], std: [1, 1]}}", "data.preprocess.std: must have as many values as mean"),
        ("input: {batch: {min: 3, opt: 2, max: 8}}", "input.batch: must ascend"),
        ("input: {batch: 0}", "input.batch: must be >= 1, got 0"),
        ("budget: {batch: 4}", "budget.batch: must lie in input.batch, 1..1, got 4"),
        ("input: {image_size: [224, 224, 3]}", "input.image_size: must have 2 values"),
        ("input: {image_size: [224]}", "input.image_size: must have more values"),
        ("input: {image_size: 200}", "input.image_size: must be whole patches of 16 x 16 pixels, got 200 x 200"),
        ("model: {args: {patch_size: 9, img_size: 30}}", "model.args: must be whole patches of 9 x 9"),
        ("input: {dynamic_height: {min: 320, max: 160, step: 16}}", "input.dynamic_height: must ascend"),
        ("input: {dynamic_height: {min: 120, max: 240, step: 24}}", "input.dynamic_height.step: must be a multiple"),
        ("input: {dynamic_width: {min: 100, max: 320, step: 16}}", "input.dynamic_width.min: must be a multiple"),
        ("input: {dynamic_width: {min: 160, step: 16}}", "input.dynamic_width.max: is missing"),
        ("runtime: {precision: fp16}", "runtime.precision: fp16 is slower than fp32"),
        ("runtime: {precision: int3}", "runtime.precision: must be 'fp32', 'fp16' or 'bf16', got 'int3'"),
        ("runtime: {precision: bf16}", "runtime.precision: bf16 does not run on onnxruntime's CPU provider"),
        (
            "runtime: {name: tensorrt, precision: bf16}\ndevice: {compute_capability: 7.5}",
            "runtime.precision: bf16 needs compute capability 8.0 or later, the profile has 7.5; use fp16",
        ),
        (
            "runtime: {also_build: [{name: tensorrt-rtx, precision: bf16}], compute_capabilities: [7.5, 8.9]}",
            "runtime.also_build.0.precision: bf16 needs compute capability 8.0",
        ),
        (
            "runtime: {name: tensorrt, precision: bf16}\nexport: {opset: 20}",
            "export.opset: must be at least 22 for bf16, got 20",
        ),
        ("input: {batch_ranges: [1]}", "input.batch_ranges: belongs to TensorRT"),
        (
            "runtime: {name: tensorrt}\n"
            "input: {batch: {min: 1, opt: 8, max: 32}, batch_ranges: [1, {min: 3, opt: 8, max: 32}]}",
            "input.batch_ranges: must make up input.batch, 1..32, without a gap",
        ),
        (
            "runtime: {name: tensorrt}\n"
            "input: {batch: {min: 2, opt: 8, max: 32}, batch_ranges: [{min: 1, opt: 8, max: 32}]}",
            "input.batch_ranges: must make up input.batch, 2..32, without a gap",
        ),
        (
            "runtime: {name: tensorrt}\n"
            "input: {batch: {min: 1, opt: 8, max: 32}, batch_ranges: [{min: 1, opt: 64, max: 32}]}",
            "input.batch_ranges.0: must ascend",
        ),
        ("runtime: {refit: true}", "runtime.refit: belongs to TensorRT; other runtimes read new weights"),
        ("runtime: {version_compatible: true}", "runtime.version_compatible: belongs to tensorrt"),
        (
            "runtime: {name: tensorrt-rtx, version_compatible: true}",
            "runtime.version_compatible: belongs to tensorrt; TensorRT-RTX has no version compatibility: build the",
        ),
        (
            "runtime: {name: tensorrt-rtx, hardware_compatibility: ampere_plus}",
            "runtime.hardware_compatibility: belongs to tensorrt; TensorRT-RTX serves the GPUs of runtime.compute_cap",
        ),
        (
            "runtime: {name: tensorrt, hardware_compatibility: all}",
            "runtime.hardware_compatibility: must be 'none', 'ampere_plus' or 'same_compute_capability', got 'all'",
        ),
        ("runtime: {provider: gpu}", "runtime.provider: must be one of cpu"),
        ("runtime: {cuda: pycuda}", "runtime.cuda: belongs to TensorRT"),
        ("runtime: {name: tensorrt-rtx, provider: cuda}", "runtime.provider: belongs to onnxruntime"),
        ("runtime: {also_build: [{precision: fp32}]}", "runtime.also_build.0.name: is missing"),
        ("runtime: {also_build: [{name: openvino}]}", "runtime.also_build.0.name: openvino runs model.onnx as it is"),
        ("runtime: {compiled: true}", "runtime.compiled: belongs to onnxruntime's providers openvino and tensorrt-rtx"),
        ("runtime: {provider: openvino, compiled: true, try_int8: true}", "runtime.compiled: is not for int8"),
        ("runtime: {provider: cuda, try_int8: true}", "runtime.try_int8: belongs to processors and to TensorRT"),
        ("runtime: {compute_capabilities: ['8.9']}", "runtime.compute_capabilities: only TensorRT-RTX builds"),
        ("device: {compute_capability: '87'}", "device.compute_capability: must be a compute capability such as 8.7"),
        ("device: {runtimes: {tensorrt: '10'}}", "device.runtimes.tensorrt: must be versions such as"),
        ("device: {runtimes: {tensorrt: '>=10'}}", "runtime.name: the device has tensorrt, got onnxruntime"),
        ("device: {memory_mb: 100}\nbudget: {memory_mb: 200}", "budget.memory_mb: exceeds device.memory_mb"),
        ("budget: {percentile: 99}\nvalidation: {runs: 100}", "validation.runs: must be at least 1000 for the 99th"),
        (
            "model: {checkpoint_format: evit}\nprune: {tokens: {method: evit}}",
            "model.checkpoint_format: describes model.checkpoint, which is not given",
        ),
        (
            "model: {checkpoint: w.pth, checkpoint_format: dynamicvit}\nprune: {tokens: {method: evit}}",
            "prune.tokens.method: must be dynamicvit, of which model.checkpoint holds the weights (checkpoint_format)",
        ),
        ("recover: {recipe: theirs}", "recover.recipe: must be 'distil' or 'published', got 'theirs'"),
        ("prune: {tokens: {levels: [0.5, 1.5]}}", "prune.tokens.levels.1: must be <= 1, got 1.5"),
        ("prune: {tokens: {method: [evit, tomee]}}", "prune.tokens.method.1: must be one of ats_fixed, "),
        ("prune: {allocation: best}", "prune.allocation: must be 'exact', 'global', 'per_kind', 'uniform', 'greedy', "),
        ("prune: {allocation: global}", "prune.allocation: global knows of no tokens; use exact, or prune.tokens"),
        (
            "prune: {tokens: {method: none}, allocation: savit}",
            "prune.allocation: savit needs prune.criterion savit, and that is obs",
        ),
        (
            "prune: {tokens: {method: none}, allocation: global, head_dims: {enabled: true}}",
            "prune.head_dims.enabled: must be false with prune.allocation global; use exact",
        ),
        (
            "prune: {criterion: minitron, head_dims: {enabled: true}}",
            "prune.head_dims.enabled: must be false with prune.criterion minitron, which ranks no dims",
        ),
        ("prune: {criterion: bi}", "prune.criterion: bi ranks whole blocks; use it with heads.enabled and mlp.enabled"),
        (
            "prune: {criterion: bi, heads: {enabled: false}, mlp: {enabled: false}}",
            "prune.allocation: must be global for bi, got exact",
        ),
        ("prune: {tokens: {schedule: published-0.7}}", "prune.tokens.schedule: belongs to one token method"),
        ("prune: {tokens: {method: evit, schedule: {3: 0}}}", "prune.tokens.schedule.3: must be >= 1, got 0"),
        ("prune: {tokens: {method: evitt}}", "prune.tokens.method: must be one of auto, none, "),
        (
            "prune: {tokens: {method: none}, heads: {enabled: false}, mlp: {enabled: false}, depth: {enabled: false}}",
            "prune: allows nothing",
        ),
        ("prune: {embedding: 8}\nrecover: {recipe: published}", "prune.embedding: cannot go with recover.recipe"),
        ("prune: {head_dims: {minimum: 0}}", "prune.head_dims.minimum: must be >= 1, got 0"),
        ("prune: {learned: {method: uvcc}}", "prune.learned.method: must be one of cait_cdcp, "),
        ("prune: {learned: {method: uvc}}", "prune.tokens.method: must be none beside prune.learned: uvc prunes"),
        (
            "prune: {learned: {method: vitslim}, tokens: {method: none}}",
            "prune.head_dims.enabled: must be true, since vitslim prunes them",
        ),
        (
            "prune: {learned: {method: uvc}, tokens: {method: none}, depth: {enabled: false}}",
            "prune.depth.enabled: must be true, since uvc skips blocks",
        ),
        (
            "prune: {learned: {method: xpruner}, tokens: {method: none}, mlp: {enabled: false}}",
            "prune.mlp.enabled: must be true, since xpruner prunes them",
        ),
        ("latency_ms: 5", "latency_ms: is no key of a profile; did you mean budget.latency_ms?"),
        ("name: a/b", "name: must be letters"),
        ("model: [a]", "model: must be a mapping, got ['a']"),
        ("budget: 5", "budget: must be a mapping, got 5"),
        ("export: {opset: 3}", "export.opset: must be 'auto' or >= 17, got 3"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(write, line, sentence):
    write(SMALL, "base.yaml")
    found = refused(write(f"extends: base\n{line}\n"))
    assert len(found) == 1
    assert sentence in found[0]
    assert found[0].startswith(("p.yaml:", "base.yaml:"))


@pytest.mark.parametrize("capability", ["8.7", "9.0", "10.0"])
def test_tensorrt_rtx_is_refused_for_gpus_that_it_does_not_serve(write, capability):
    path = write(f"{SMALL}device: {{compute_capability: {capability}}}\nruntime: {{name: tensorrt-rtx}}\n")
    (line,) = refused(path)
    assert line.startswith("p.yaml:6: runtime.name: TensorRT-RTX serves compute capabilities 7.5, 8.0, 8.6, 8.9")
    assert f"the device has {capability}; use tensorrt" in line


def test_a_missing_section_is_missing_and_nothing_else_is_said_of_it(write):
    lines = refused(write("model: {name: x}\n"))
    assert lines == [
        "p.yaml:1: data: is missing",
        "p.yaml:1: budget: is missing",
        "p.yaml:1: accuracy: is missing",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "p.yaml:1: a profile is a mapping of keys to values, got nothing"),
        (b"- a\n- b\n", "p.yaml:1: a profile is a mapping of keys to values, got ['a', 'b']"),
        (b"a: 1\nb: [1,\n", "p.yaml:3: is no YAML: expected the node content"),
        (b"a: 1\nb: 2\na: 3\n", "p.yaml:3: 'a' is given twice, first at"),
        (b"a: \xff\n", "p.yaml: a profile is UTF-8 text, byte 3 is not"),
        (b"\x00\x01\x02", "p.yaml: is no YAML: special characters are not allowed"),
        (b"a: !!python/object/apply:os.system [ls]\n", "p.yaml:1: a: is no key"),
        (b"a: !secret x\n", "p.yaml:1: the tag '!secret' has no place in a profile"),
        (b"[" * 100, "p.yaml:1: a profile nests at most 30 levels deep"),
        (b"a: &a [*a]\n", "p.yaml:1: a profile holds at most"),
        (b"a: .nan\n", "p.yaml:1: '.nan' is no float that can be read"),
        (b"? [a]\n: 1\n", "p.yaml:1: a key is text, got a sequence"),
        (b"a: " + b"x" * 300_000, "p.yaml: a profile has at most 256 KiB, got 292 KiB"),
        (b"seed: " + b"9" * 5000, "p.yaml:1: '99"),
    ],
    ids=range(14),
)
def test_files_that_are_no_profile_are_refused_with_their_line(tmp_path, text, sentence):
    (tmp_path / "p.yaml").write_bytes(text)
    assert refused(tmp_path / "p.yaml")[0].startswith(sentence)


def test_aliases_that_multiply_are_stopped(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 20)]
    assert "a profile holds at most 20000 values" in refused(write("\n".join(lines)))[0]


def test_a_file_that_is_not_there_points_at_those_that_are(tmp_path):
    assert refused(tmp_path / "no.yaml") == [
        "no.yaml: there is no such file; 'vitprune-deploy profiles' lists what is shipped"
    ]
    assert "this is a folder" in refused(tmp_path)[0]


def test_extending_merges_mappings_and_replaces_all_else(write):
    write(f"{SMALL}prune: {{tokens: {{levels: [1.0, 0.5], method: none}}}}\nseed: 1\n", "base.yaml")
    write("seed: 2\nsearch: {evaluations: 5}\n", "more.yaml")
    profile = load_profile(write("extends: [base.yaml, more]\nprune: {tokens: {levels: [0.25]}}\nsearch:\n"))
    assert profile.prune.tokens.levels == (0.25,)
    assert (profile.prune.tokens.method, profile.seed, profile.search.evaluations) == ("none", 2, 5)


def test_an_error_names_the_file_in_which_its_key_stands(write):
    write(SMALL.replace("5", "fast"), "base.yaml")
    assert refused(write("extends: base\n")) == ["base.yaml:3: budget.latency_ms: must be a number, got 'fast'"]


def test_profiles_that_extend_each_other_are_refused(write):
    write("extends: p\n", "q.yaml")
    assert refused(write("extends: q\n")) == ["q.yaml:1: extends: 'p' leads back to itself"]


def test_a_profile_that_extends_nothing_there_is_told_the_nearest(write):
    lines = refused(write(f"extends: devices/orin-nix\n{SMALL}"))
    assert lines == ["p.yaml:1: extends: there is no such file, got 'devices/orin-nix'; did you mean devices/orin-nx?"]
    assert "must be a file or a list of files" in refused(write("extends: [{a: 1}]\n"))[0]


def test_many_files_that_extend_many_are_stopped(write):
    for number in range(12):
        write(f"extends: [f{number + 1}, f{number + 1}]\n", f"f{number}.yaml")
    write(SMALL, "f12.yaml")
    assert "may extend at most 50 files" in refused(write("extends: f0\n"))[0]


def test_overrides_win_and_are_read_as_yaml(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["budget.latency_ms=null", "budget.speedup=1.5", "prune.tokens.blocks=[3, 6]", "data.source=here"]
    profile = load_profile(write(SMALL), [*overrides, "recover.lr=1e-3", "input.batch=4"])
    assert (profile.budget.latency_ms, profile.budget.speedup, profile.prune.tokens.blocks) == (None, 1.5, (3, 6))
    assert (profile.data.source, profile.recover.lr, profile.batch) == (str(tmp_path / "here"), 1e-3, 4)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed", "--set 'seed': must be key=value, such as budget.latency_ms=5"),
        ("a..b=1", "--set 'a..b=1': must be key=value, such as budget.latency_ms=5"),
        ("seed=[", "--set seed: is no YAML: expected the node content, but found '<stream end>'"),
        ("seed=-1", "--set seed: must be >= 0, got -1"),
        ("budget.latencyms=1", "--set budget.latencyms: is no key of a profile; did you mean budget.latency_ms?"),
        ("budget.speedup=2", "--set budget.speedup: excludes budget.latency_ms: give one of them, and null for an"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_typed(write, override, sentence):
    (line,) = refused(write(SMALL), [override])
    assert line.startswith(sentence)


def test_paths_are_relative_to_the_file_in_which_they_stand(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write(SMALL, "sub/base.yaml")
    profile = load_profile(write("extends: sub/base\nmodel: {checkpoint: w.safetensors, classes: [a, b]}\n"))
    assert profile.data.source == str(tmp_path / "sub" / "images")
    assert profile.model.checkpoint == str(tmp_path / "w.safetensors")
    assert profile.model.classes == ("a", "b")
    assert load_profile(write(SMALL.replace("images", "timm:torch/cifar10"))).data.source == "timm:torch/cifar10"


def test_files_that_are_not_there_are_named_where_they_are_asked_for(write, tmp_path):
    path = write(SMALL)
    assert refused(path, files_exist=True) == ["p.yaml:2: data.source: there is no such file or folder, got 'images'"]
    (tmp_path / "images").mkdir()
    assert load_profile(path, files_exist=True)


def test_a_path_of_an_override_is_named_once_and_a_folder_is_no_checkpoint(write):
    path = write(SMALL)
    overrides = ["data.source=nowhere", "model.checkpoint=."]
    assert refused(path, overrides, files_exist=True) == [
        "--set data.source: there is no such file or folder, got 'nowhere'",
        "--set model.checkpoint: must be a file, got the folder '.'",
    ]


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("name: vit_tiny_patch16_224", (16, 16)),
        ("{name: vit_tiny_patch16_224, args: {patch_size: 3}}", (3, 3)),
        ("{name: vit_tiny_patch16_224, args: {patch_size: [4, 8]}}", (4, 8)),
        ("name: vit_base_unknown", None),
    ],
)
def test_the_patch_size_is_read_from_arguments_or_name(write, model, size):
    text = SMALL.replace("{name: vit_tiny_patch16_224}", model if model.startswith("{") else f"{{{model}}}")
    assert patch_size(load_profile(write(text)).model) == size


def test_the_providers_that_a_profile_knows_are_those_that_the_runtime_knows():
    assert set(PROVIDERS) == set(onnxruntime.PROVIDERS)


def test_numbers_are_not_taken_for_text_nor_text_for_numbers(write):
    profile = load_profile(write(f"{SMALL}device: {{compute_capability: 12.0}}\n"))
    assert profile.device.compute_capability == "12.0"
    assert refused(write(SMALL.replace("5", "'5'"))) == ["p.yaml:3: budget.latency_ms: must be a number, got '5'"]


def test_the_schema_accepts_the_shipped_profiles_and_refuses_an_unknown_key():
    validator = jsonschema.Draft202012Validator(json_schema())
    for listed in list_profiles():
        validator.validate(yaml.safe_load(listed.path.read_text()))
    assert not validator.is_valid({"budget": {"latency": 3}})
    json.dumps(json_schema())


def test_the_commented_profile_loads_as_if_only_its_values_stood_there(write):
    values = {"extends": "devices/x86-cpu", "model": {"name": "vit_tiny_patch16_224", "args": {"depth": 3}}}
    values |= {"data": {"source": "imgs"}, "budget": {"speedup": 2.0}, "accuracy": {"max_drop": 1.0}}
    values |= {"input": {"batch": {"min": 1, "opt": 2, "max": 4}, "image_size": [32, 64]}}
    text = commented_yaml(values)
    assert load_profile(write(text)) == load_profile(write(yaml.safe_dump(values)))
    assert "  # latency_ms: null" in text.split("\n")


def test_every_key_that_the_commented_profile_offers_is_a_key_with_a_sentence(write):
    values = {"model": {"name": "vit_tiny_patch16_224"}, "data": {"source": "x"}, "accuracy": {"max_drop": 1.0}}
    lines = commented_yaml(values | {"budget": {"speedup": 2.0}}).split("\n")
    offered = [line for line in lines if line.lstrip().startswith("# ") and line.rstrip().endswith(": null")]
    sentences = [lines[lines.index(line) - 1].strip() for line in offered]
    assert len(offered) > 20
    assert all(len(sentence) > 10 and sentence.startswith("# ") for sentence in sentences)


@pytest.mark.parametrize(
    ("flags", "installed", "meant"),
    [
        ("fma avx2 avx512_bf16", True, "openvino"),
        ("amx_bf16", True, "openvino"),
        ("amx_bf16", False, "onnxruntime"),
        ("avx2 avx512_vnni", True, "onnxruntime"),
        (None, True, "onnxruntime"),
    ],
)
def test_devices_x86_is_the_one_that_the_machine_is_quickest_as(write, tmp_path, monkeypatch, flags, installed, meant):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor, "find_spec", lambda name: installed or None)
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"model name\t: A\nflags\t\t: {flags}\n\nmodel name\t: A\nflags\t\t: fma\n")
    found = load_profile(write(f"extends: devices/x86\n{SMALL}"))
    assert found.runtime.name == meant
    assert load_profile(write(found.to_yaml())) == found


def test_the_profiles_in_the_readme_load(write):
    readme = (Path(__file__).parents[2] / "profiles" / "README.md").read_text()
    profile, zeros, fleet, device = (block.split("```")[0] for block in readme.split("```yaml\n")[1:])
    assert load_profile(write(profile)).runtime.name == "tensorrt"
    assert load_profile(write(f"{SMALL}{zeros}")).asks_2_4
    assert list(load_fleet(write(f"{SMALL}{fleet}"))) == ["nx", "nano"]
    write(device, "board.yaml")
    assert load_profile(write(f"extends: [devices/orin-nx, board]\n{SMALL}")).device.name == "my board"
