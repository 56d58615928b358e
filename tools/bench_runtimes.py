"""One model in every runtime of this processor, interleaved: ours, plain OpenVINO and torch, dense and pruned.

    python tools/bench_runtimes.py --batch 1
    python tools/bench_runtimes.py --model quickstart --batch 8

The weights of DeiT-S are random: they play no part. *Pruned* is a plan made up for this: two thirds of the heads and of
the hidden units, EViT's schedule that keeps 0.7, the last block for the class token alone. What is not installed is
left out. Times are compared as ratios to a reference timed between visits (see ``latency/protocol.py``).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _common import noise
from vitprune.errors import VitpruneError
from vitprune.model.timm import from_timm
from vitprune.model.vit import Vit
from vitprune.schedules import counts
from vitprune.surgery import dense_plan, prune
from vitprune_deploy.backends import _ort_plugins
from vitprune_deploy.backends.onnxruntime import OnnxRuntime
from vitprune_deploy.backends.openvino import OpenVino
from vitprune_deploy.export.int8 import quantize, quantize_dynamic
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.latency.fingerprint import device_fingerprint
from vitprune_deploy.latency.protocol import Measurement, measure
from vitprune_deploy.latency.visits import Subject, quickest
from vitprune_deploy.profile import load_profile

THREADS = 2
COMPILES = "torch compile"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm's name, or quickstart")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=240.0, help="measure no longer than this")
    parser.add_argument("--without", nargs="*", default=[], help="runtimes to leave out, such as 'torch compile'")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        dense = opened(options.model)
        subjects = [
            subject
            for state, model in (("dense", dense), ("pruned", shortened(dense)))
            for subject in subjects_of(model, state, options, Path(folder))
        ]
        times = measure(subjects, quickest(subjects), max_rounds=options.rounds, max_seconds=options.seconds)
    report(options, times)


def opened(name: str) -> Vit:
    if name != "quickstart":
        return from_timm(name).model.eval()
    profile = load_profile("quickstart").model
    checkpoint = Path(profile.checkpoint or "")
    return from_timm(profile.name, checkpoint=checkpoint, **profile.args).model.eval()


def shortened(dense: Vit) -> Vit:
    """The pruned model."""
    config, plan = dense.config, dense_plan(dense)
    depth = len(config.blocks)
    left = list(counts("evit", "published-0.7", depth, config.patches, config.prefix))
    entering = [config.patches, *left]
    blocks = [
        replace(
            kept,
            heads=kept.heads[: max(1, 2 * len(kept.heads) // 3)],
            mlp=kept.mlp[: 2 * len(kept.mlp) // 3 // 8 * 8],
            patches=0 if number == depth - 1 else after if after < before else None,
        )
        for number, (kept, before, after) in enumerate(zip(plan.blocks, entering, left, strict=False))
    ]
    return prune(dense, replace(plan, reducer="evit", blocks=tuple(blocks)))


def subjects_of(model: Vit, state: str, options: argparse.Namespace, folder: Path) -> Iterator[Subject]:
    """The model in every runtime that is here."""
    images = np.random.default_rng(0).standard_normal(
        (options.batch, model.config.channels, *model.config.image_size), np.float32
    )
    path, int8 = folder / f"{state}.onnx", folder / f"{state}.int8.onnx"
    export_onnx(model, path)
    quantize_dynamic(path, int8)
    for name, make in runtimes(model, path, int8, images).items():
        if name in options.without:
            continue
        try:
            yield make(f"{state}, {name}")
        except VitpruneError as error:
            print(f"left out: {name}: {error}")


def runtimes(model: Vit, path: Path, int8: Path, images: np.ndarray) -> dict[str, Callable[[str], Subject]]:
    """What makes a subject of the model, by the runtime's name."""

    def by_onnxruntime(path: Path, provider: str, precision: str = "fp32") -> Callable[[str], Subject]:
        more = _ort_plugins.precision_options(precision) if provider == "openvino" else {}
        given = {"provider": provider, "provider_options": more}
        return lambda name: Subject.of(name, OnnxRuntime.load(path, threads=THREADS, options=given), {"images": images})

    made = {
        "ours, CPU provider": by_onnxruntime(path, "cpu"),
        "ours, CPU provider, int8": by_onnxruntime(int8, "cpu"),
    }
    if _ort_plugins.is_installed(_ort_plugins.OPENVINO):
        made["ours, OpenVINO's plugin fp32"] = by_onnxruntime(path, "openvino")
        made["ours, OpenVINO's plugin bf16"] = by_onnxruntime(path, "openvino", "bf16")
    if find_spec("openvino"):
        for precision in ("fp32", "bf16"):
            made[f"ours, OpenVINO {precision}"] = by_our_openvino(path, images, precision)
        if find_spec("nncf"):
            made["ours, OpenVINO int8"] = lambda name: by_our_openvino(by_nncf(path, images), images, "fp32")(name)
        made["OpenVINO itself, fp32"] = lambda name: Subject(name, by_openvino(path, images, "f32"))
        made["OpenVINO itself, bf16"] = lambda name: Subject(name, by_openvino(path, images, "bf16"))
    made["torch eager"] = lambda name: Subject(name, by_torch(model, images))
    made[COMPILES] = lambda name: Subject(name, by_torch(torch.compile(model), images))
    return made


def by_our_openvino(path: Path, images: np.ndarray, precision: str) -> Callable[[str], Subject]:
    options = {"precision": precision}
    return lambda name: Subject.of(name, OpenVino.load(path, threads=THREADS, options=options), {"images": images})


def by_nncf(path: Path, images: np.ndarray) -> Path:
    """The model in int8 by the recipe for OpenVINO; what is not in int8 stays in fp32."""
    target = path.with_suffix(".nncf.onnx")
    quantize(path, target, "nncf", images)
    return target


def by_openvino(path: Path, images: np.ndarray, hint: str) -> Callable[[], float]:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"
    }  # fmt: skip
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(images))
    return clocked(request.infer)


def by_torch(model: Any, images: np.ndarray) -> Callable[[], float]:
    pixels = torch.from_numpy(images)
    model(pixels)  # compiles
    return clocked(lambda: model(pixels))


def clocked(run: Callable[[], Any]) -> Callable[[], float]:
    """``run``, made to return the milliseconds that it takes."""

    def timed() -> float:
        start = time.perf_counter_ns()
        run()
        return (time.perf_counter_ns() - start) / 1e6

    return timed


def report(options: argparse.Namespace, times: list[Measurement]) -> None:
    device = device_fingerprint("onnxruntime", "cpu", THREADS)
    print(f"{options.model}, batch {options.batch}, {THREADS} threads, {device['cpu']}; {noise(times)}\n")
    print("| model, runtime | ms | 95% interval | times the fastest of its kind |\n| --- | --- | --- | --- |")
    for state in ("dense", "pruned"):
        mine = sorted((one for one in times if one.name.startswith(state)), key=lambda one: one.value_ms)
        for one in mine:
            cells = (
                f"{one.value_ms:.2f} | {one.low_ms:.2f} to {one.high_ms:.2f} | {one.value_ms / mine[0].value_ms:.2f}"
            )
            print(f"| {one.name} | {cells} |")


if __name__ == "__main__":
    main()
