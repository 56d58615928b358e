from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vitprune.errors import DamagedFile
from vitprune_deploy.artifact import Manifest, hash_files
from vitprune_deploy.backends.base import TensorSpec
from vitprune_deploy.data import Preprocess
from vitprune_deploy.runtime import Model
from vitprune_deploy.validate import compare_golden, write_golden
from vitprune_deploy.verbs import validate as verb

SOME = {"params": 1, "macs": 1, "top1": None, "latency_ms": {"p50": 1.0, "samples": 100}}


class Means:
    """An engine whose logits are the mean of each channel, times ``factor``."""

    runtime, provider = "means 1.0", "cpu"
    inputs = (TensorSpec("images", ("batch", 3, 8, 8), "float32"),)

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def run(self, images):
        return self.factor * images.mean(axis=(2, 3))


def model(factor: float = 1.0, channels: int = 3) -> Model:
    mean = (0.5,) * channels
    return Model(Means(factor), Preprocess((channels, 8, 8), mean=mean, std=(0.01,) * channels))


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def written(folder) -> Manifest:
    return Manifest(
        schema=1, verdict="pass", reasons=(), device={}, versions={}, dense=SOME, pruned=SOME,
        budget={"latency_ms": 1.0, "percentile": 50, "batch": 1, "image_size": (8, 8)},
        parity={"max_abs": 0.0, "top1_agreement": 100.0}, engines=(),
        files=hash_files(folder, [path.name for path in folder.iterdir()]),
    )  # fmt: skip


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("RGBA", 3), ("L", 3), ("RGB", 1), ("P", 1)])
def test_the_golden_image_gives_its_logits_again(tmp_path, mode, channels):
    assert write_golden(tmp_path, model(channels=channels), picture(30, 40, mode), "fp32")
    with Image.open(tmp_path / "golden.png") as image:
        assert (image.mode, image.size) == ("RGB" if channels == 3 else "L", (40, 30))
    found = compare_golden(tmp_path, written(tmp_path), model(channels=channels))
    assert found.max_abs == 0
    assert found.small


def test_a_large_image_is_made_small_and_tells_nothing_but_its_pixels(tmp_path):
    large = picture(900, 1500)
    large.info["comment"] = "taken at home"
    large.info["icc_profile"] = b"profile"
    assert write_golden(tmp_path, model(), large, "fp32")
    with Image.open(tmp_path / "golden.png") as image:
        assert image.size == (512, 307)
        assert not {"comment", "icc_profile"} & image.info.keys()


@pytest.mark.parametrize(("precision", "factor", "small"), [("fp32", 1.0005, True), ("fp32", 1.01, False),
                                                             ("fp16", 1.01, True), ("fp16", 1.1, False)])  # fmt: skip
def test_rounding_is_told_from_another_engine(tmp_path, precision, factor, small):
    write_golden(tmp_path, model(), picture(20, 20), precision)
    found = compare_golden(tmp_path, written(tmp_path), model(factor))
    assert found.small == small
    assert 0 < found.max_abs < 0.2 * np.abs(json.loads((tmp_path / "golden.json").read_text())["logits"]).max()


def test_logits_that_are_no_numbers_are_never_golden(tmp_path):
    assert not write_golden(tmp_path, model(np.nan), picture(20, 20), "fp32")
    assert not list(tmp_path.iterdir())
    assert compare_golden(tmp_path, written(tmp_path), model()) is None
    write_golden(tmp_path, model(), picture(20, 20), "fp32")
    found = compare_golden(tmp_path, written(tmp_path), model(np.inf))
    assert found.max_abs is None
    assert not found.small


def test_golden_files_that_were_changed_are_refused(tmp_path):
    write_golden(tmp_path, model(), picture(20, 20), "fp32")
    manifest = written(tmp_path)
    picture(20, 21).save(tmp_path / "golden.png")
    with pytest.raises(DamagedFile, match=r"golden.png is cut off or changed"):
        compare_golden(tmp_path, manifest, model())
    (tmp_path / "golden.json").write_text("{}")
    with pytest.raises(DamagedFile, match=r"golden.json is damaged \('logits'\)"):
        compare_golden(tmp_path, written(tmp_path), model())


def test_the_verdict_fails_on_other_golden_logits_alone():
    checks = verb.checks
    passed = checks.Verdict("pass")
    assert verb._with_golden(passed, None) == passed
    assert verb._with_golden(passed, checks.Difference(1e-4, 1e-3)) == passed
    failed = verb._with_golden(checks.Verdict("unstable", ["slow"]), checks.Difference(0.5, 1e-3))
    assert failed.verdict == "fail"
    assert failed.reasons == [
        "the golden image's logits differ by up to 0.5 from what the build gave, 0.001 may be rounding: "
        "this runtime does not compute what was validated",
        "slow",
    ]
    assert "are not of the kind that the build gave" in verb._with_golden(passed, checks.Difference(None, 1)).reasons[0]
