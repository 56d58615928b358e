from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from scipy import stats

from vitprune.errors import InputError
from vitprune_deploy.backends.onnxruntime import OnnxRuntime
from vitprune_deploy.data import Preprocess, open_images
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.latency.protocol import Distribution, Percentile
from vitprune_deploy.remote.device import Here
from vitprune_deploy.runtime import Model
from vitprune_deploy.validate import (
    Figures,
    Limits,
    Paired,
    Share,
    budget_ms,
    compare_accuracy,
    compare_latency,
    compare_with_torch,
    judge,
    latency_dict,
    run_models,
    size_bytes,
)
from vitprune_deploy.validate.accuracy import mcnemar

# --- the verdict

LIMITS = Limits(latency_ms=10.0, percentile=90)
GOOD = Figures(latency=Percentile(9.8, 9.7, 9.9), samples=1000, top1=91.5, reference_top1=92.0, agreement=97.0,
               memory_mb=40.0)  # fmt: skip


def test_a_model_within_all_limits_passes_without_a_reason():
    limits = replace(LIMITS, max_drop=1.0, min_top1=91.0, min_agreement=95.0, memory_mb=50.0)
    verdict = judge(limits, GOOD)
    assert (verdict.verdict, verdict.reasons) == ("pass", [])


@pytest.mark.parametrize(
    ("limits", "figures", "verdict", "words"),
    [
        ({}, {"latency": Percentile(10.1, 9.9, 10.3)}, "fail", "latency p90 10.1 ms (9.9 to 10.3) is over the budget"),
        ({}, {"latency": Percentile(10.0, 9.9, 10.1)}, "pass", ""),
        ({}, {"latency": Percentile(9.0, 8.0, 9.9)}, "unstable", "known to 8..9.9 ms only, too wide"),
        ({}, {"latency": Percentile(12.0, 11.9, 12.1), "slowdown": 1.5}, "unstable", "took 1.50 times as long as when"),
        ({}, {"latency": Percentile(9.0, 8.9, 9.1), "slowdown": 1.5}, "pass", ""),  # even so
        ({}, {"latency": Percentile(12.0, 11.9, 12.1), "drift": 0.54}, "unstable", "own time varied by 54% while"),
        ({}, {"latency": Percentile(12.0, 11.9, 12.1), "drift": 0.1}, "fail", "is over the budget"),
        (
            {},
            {"latency": Percentile(12.0, 11.9, 12.1), "slowdown": 0.8},
            "fail",
            "1.25 times as long as now, so let --fr",
        ),
        ({}, {"latency": Percentile(9.0, 8.9, 9.1), "slowdown": 0.8}, "pass", ""),
        ({}, {"latency": Percentile(12.0, 11.0, 13.0)}, "unstable", "repeat on a quiet machine"),
        ({}, {"latency": None, "samples": 80}, "unstable", "80 runs are too few for latency p90"),
        ({"max_drop": 0.4}, {}, "fail", "top-1 fell by 0.50 points, from 92.00 to 91.50; accuracy.max_drop is 0.4"),
        ({"max_drop": 0.5}, {}, "pass", ""),
        ({"max_drop": 1.0}, {"reference_top1": 90.1, "top1": 89.1}, "pass", ""),
        ({"max_drop": 0.0}, {"top1": 93.0}, "pass", ""),
        ({"max_drop": 1.0}, {"top1": None}, "unstable", "top-1 is not known"),
        ({"max_drop": 1.0}, {"reference_top1": None}, "unstable", "top-1 is not known"),
        ({"min_top1": 91.6}, {}, "fail", "top-1 91.50% is under accuracy.min_top1 91.6"),
        ({"min_top1": 91.5}, {"reference_top1": None}, "pass", ""),
        ({"min_agreement": 98.0}, {}, "fail", "agreement with the dense model 97.00% is under"),
        ({"min_agreement": 97.0}, {"top1": None, "reference_top1": None}, "pass", ""),
        ({"min_agreement": 97.0}, {"agreement": None}, "unstable", "agreement with the dense model was not measured"),
        ({"memory_mb": 39.0}, {}, "fail", "memory 40 MB is over budget.memory_mb 39"),
        ({"memory_mb": 39.0}, {"memory_mb": None}, "unstable", "memory was not measured"),
        ({}, {"non_finite": 3}, "fail", "NaN or infinity for 3 test images"),
    ],
)
def test_each_limit_is_judged_by_itself(limits, figures, verdict, words):
    found = judge(replace(LIMITS, **limits), replace(GOOD, **figures))
    assert found.verdict == verdict
    assert len(found.reasons) == (verdict != "pass")
    assert words in " ".join(found.reasons)


@pytest.mark.parametrize(
    ("dense", "verdict", "words"),
    [
        (Percentile(20.0, 19.5, 20.5), "pass", ""),
        (
            Percentile(20.0, 18.0, 22.0),
            "unstable",
            "dense model's latency p90 20 ms, which the budget comes of, is known",
        ),
        (None, "unstable", "too few runs are behind the dense model's latency p90"),
    ],
)
def test_a_relative_budget_is_as_well_known_as_the_dense_models_latency(dense, verdict, words):
    for figures in (GOOD, replace(GOOD, latency=Percentile(10.1, 9.9, 10.3))):
        found = judge(replace(LIMITS, relative=True), replace(figures, dense_latency=dense))
        assert found.verdict == ("fail" if verdict == "pass" and figures is not GOOD else verdict)
        assert words in " ".join(found.reasons)
        assert judge(LIMITS, replace(figures, dense_latency=dense)) == judge(LIMITS, figures)


def test_all_that_is_wrong_is_said_and_a_miss_weighs_more_than_a_doubt():
    limits = replace(LIMITS, max_drop=0.1, min_agreement=99.0, memory_mb=1.0)
    found = judge(limits, replace(GOOD, latency=Percentile(9.0, 8.0, 12.0), non_finite=1))
    assert found.verdict == "fail"
    assert [reason.split()[0] for reason in found.reasons] == ["top-1", "agreement", "memory", "the", "latency"]


# --- shares and pairs


@pytest.mark.parametrize(("right", "images"), [(0, 7), (7, 7), (1, 10), (9251, 10000), (500, 1000)])
def test_wilsons_interval_is_scipys(right, images):
    share = Share.of(right, images)
    want = stats.binomtest(right, images).proportion_ci(0.95, method="wilson")
    assert share.percent == pytest.approx(100 * right / images)
    # scipy's normal quantile and ours agree to double precision
    assert (share.low, share.high) == pytest.approx((100 * want.low, 100 * want.high), abs=1e-10)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (3, 9), (40, 40), (123, 80), (2000, 1900)])
def test_mcnemars_test_is_the_exact_sign_test(lost, gained):
    want = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(want, rel=1e-9)


def test_a_paired_comparison_counts_what_was_lost_and_gained():
    first = np.array([True] * 60 + [False] * 40)
    second = np.array([True] * 50 + [False] * 10 + [True] * 4 + [False] * 36)
    paired = Paired.of(first, second)
    assert (paired.lost, paired.gained, paired.drop) == (10, 4, pytest.approx(6.0))
    # the standard error of the difference is sqrt(b + c - (b - c)^2 / n) / n = 3.69 points
    assert paired.low == pytest.approx(6 - 1.96 * 3.69, abs=1.0)  # counts come in whole points
    assert paired.high == pytest.approx(6 + 1.96 * 3.69, abs=1.0)
    assert Paired.of(first, first) == Paired(0.0, 0.0, 0.0, 0, 0, 1.0)


def one_hot(classes: list[int], count: int = 3) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


def test_accuracy_agreement_and_the_worst_classes_are_counted_on_the_same_images():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    dense = one_hot([0, 0, 0, 1, 1, 1, 2, 0])
    pruned = one_hot([0, 1, 2, 1, 1, 0, 2, 2])
    found = compare_accuracy(dense, pruned, labels, names=("cat", "dog", "owl"), unreadable=2)
    assert (found.dense.percent, found.pruned.percent) == (75.0, 50.0)
    assert found.agreement.percent == 50.0
    assert [(c.name, c.images, c.dense, c.pruned) for c in found.worst] == [("cat", 4, 75, 25), ("dog", 2, 100, 50)]
    assert (found.paired.lost, found.paired.gained) == (3, 1)
    assert (found.non_finite, found.unreadable) == (0, 2)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["pruned"]["percent"] == 50.0
    assert plain["worst"][0]["name"] == "cat"


def test_without_labels_only_agreement_is_known():
    found = compare_accuracy(one_hot([0, 1, 2]), one_hot([0, 1, 1]), np.full(3, -1))
    assert (found.dense, found.pruned, found.paired, found.worst) == (None, None, None, ())
    assert found.agreement.percent == pytest.approx(200 / 3)


def test_images_without_a_class_count_for_the_agreement_alone():
    found = compare_accuracy(one_hot([0, 1, 2]), one_hot([0, 1, 1]), np.array([0, 1, -1]))
    assert (found.pruned.percent, found.pruned.images, found.agreement.images) == (100.0, 2, 3)


def test_outputs_that_are_no_numbers_are_counted_and_are_never_right():
    broken = one_hot([0, 1, 2, 0])
    broken[0, 2], broken[1, 0] = np.nan, np.inf
    found = compare_accuracy(one_hot([0, 1, 2, 0]), broken, np.array([0, 1, 2, 0]))
    assert found.non_finite == 2
    assert found.pruned.percent == 50.0
    assert compare_accuracy(broken, broken, np.array([0, 1, 2, 0])).agreement.percent == 50.0
    parity = compare_with_torch(broken, one_hot([0, 1, 2, 0]))
    assert parity.top1_agreement == 50.0
    json.dumps(parity.to_dict(), allow_nan=False)
    assert parity.max_abs > 1e300


def test_parity_is_taken_over_the_images_that_torch_saw():
    logits = one_hot([0, 1, 2, 0])
    theirs = one_hot([0, 1, 1])
    theirs[0, 0] = 1.25
    parity = compare_with_torch(logits, theirs)
    assert parity.to_dict() == {"max_abs": 1.0, "top1_agreement": pytest.approx(200 / 3), "images": 3}


# --- engines


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    export_onnx(tiny.tiny_vit(depth=3), folder / "dense.onnx", batch=(1, 8))
    export_onnx(tiny.tiny_vit(depth=1), folder / "pruned.onnx", batch=(1, 8))
    return folder / "dense.onnx", folder / "pruned.onnx"


@pytest.fixture
def models(files) -> dict[str, Model]:
    preprocess = Preprocess((3, 28, 28), crop_pct=1.0)
    return {file.stem: Model(OnnxRuntime.load(file, threads=1), preprocess) for file in files}


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name, i in itertools.product(("cat", "dog"), range(6)):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "cat" / "2.png").write_bytes(b"no image")
    return open_images(tmp_path, class_names=[*map(str, range(8)), "cat", "dog"], max_unreadable=0.1)


@torch.no_grad()
def test_engines_see_the_same_images_and_say_what_torch_says(models, images):
    seen = []
    outputs = run_models(models, images, batch=4, threads=2, progress=lambda done, of, what: seen.append((done, of)))
    assert outputs.labels.tolist() == [8] * 5 + [9] * 6
    assert seen == [(4, 12), (8, 12), (11, 12)]
    preprocess = models["dense"].preprocess
    inputs = np.stack([preprocess(images.image(i)) for i in range(12) if i != 2])
    for name, depth in (("dense", 3), ("pruned", 1)):
        by_torch = tiny.tiny_vit(depth=depth)(torch.from_numpy(inputs)).numpy()
        parity = compare_with_torch(outputs.logits[name], by_torch)
        assert parity.max_abs < 1e-4  # fp32 through three blocks; logits are of size 1
        assert parity.top1_agreement == 100.0
    found = compare_accuracy(*outputs.logits.values(), outputs.labels, unreadable=len(images.unreadable))
    assert found.unreadable == 1
    assert found.pruned.images == 11


def test_both_engines_are_timed_in_one_session(models):
    batch = np.zeros((2, 3, 28, 28), np.float32)
    dense, pruned = compare_latency(
        [models["dense"]], [models["pruned"]], batch, percentile=75, runs=200, max_seconds=20
    )
    assert (dense.name, pruned.name) == ("dense", "pruned")
    assert dense.reference_ms == pruned.reference_ms
    assert {50, 75, 90} <= set(pruned.percentiles)
    assert pruned.percentiles[50].value_ms > 0
    plain = json.loads(json.dumps(latency_dict(pruned), allow_nan=False))
    assert plain["p50"] <= plain["p90"]
    assert plain["p99"] is None  # 200 runs: two beyond it
    assert plain["samples"] == pruned.samples >= 50
    assert plain["intervals_ms"]["p75"][0] <= plain["intervals_ms"]["p75"][1]


def test_a_speedup_is_resolved_against_the_dense_engine_of_the_same_session():
    runs = (*[8.0] * 58, *[10.0] * 2)
    dense = Distribution("dense", {50: Percentile(8.0, 7.9, 8.1)}, {50: 8.0}, 60, runs, 0, True, 8.0, 0.0)
    assert budget_ms(None, 2.0, dense, 50) == 4.0
    assert budget_ms(5.0, None, dense, 99) == 5.0
    assert budget_ms(None, 2.0, dense, 99) == pytest.approx(5.0)  # an estimate, see the verdict on a relative budget
    with pytest.raises(InputError, match="wanted latency_ms or speedup"):
        budget_ms(None, None, dense, 50)


def test_the_size_counts_weights_beside_the_file(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x" * 10)
    (tmp_path / "model.onnx.data").write_bytes(b"x" * 1000)
    (tmp_path / "model.onnx.json").write_bytes(b"x" * 7)
    (tmp_path / "other.onnx").write_bytes(b"x" * 5)
    assert size_bytes(tmp_path / "model.onnx") == 1010


def test_memory_is_that_of_a_fresh_process_and_grows_with_the_batch(files):
    small, large = (
        Here().memory_mb("onnxruntime", files[0], np.ones((n, 3, 28, 28), np.float32), threads=1) for n in (1, 512)
    )
    assert small is not None
    assert 0 < small < large
    # attention weights and hidden units of 512 images of 50 tokens, at least one block's at a time
    assert large - small > 512 * 50 * (4 * 50 + 64) * 4 / 1e6
