"""The last stages: what the engine is worth, through the runtime that services import, and the verdict on it."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import vitprune

from .. import validate as checks
from ..artifact import Manifest
from ..data import batches, picked
from ..latency.protocol import Distribution
from ..remote.watch import watched
from ..runtime import Model
from . import runtimes, soundness, sparse
from .account import collect
from .bench import INT8, Bench, write_json
from .make import COMPILED, PLAIN, onnx_name

PACKAGES = ("numpy", "pillow", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
            "openvino", "nncf", "tensorrt", "tensorrt-rtx")  # fmt: skip
PARITY_BATCH = 64


def validation_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``validate`` depends on besides earlier stages."""
    profile = bench.profile
    return {
        "budget": profile.budget.model_dump(mode="json"),
        "accuracy": profile.accuracy.model_dump(mode="json"),
        "validation": profile.validation.model_dump(mode="json"),
        "input": profile.input.model_dump(mode="json"),
        "device": runtimes.device(profile),
        "seed": profile.seed,
    }


def validate(bench: Bench, folder: Path) -> None:
    """Accuracy on the test images and latency, dense and pruned engine side by side, and the verdict."""
    profile, show = bench.profile, bench.shows.progress
    tested, wanted = bench.images.test, profile.validation
    copies = {"reference": 1}  # it is not timed
    with ExitStack() as stack:
        sessions = {
            name: [
                stack.enter_context(open_engine(bench, path, "fp32" if name == "reference" else None))
                for _ in range(copies.get(name, checks.SESSIONS))
            ]
            for name, path in engine_files(bench).items()
        }
        models = {name: opened[0] for name, opened in sessions.items()}
        outputs = checks.run_models(models, tested, batch=profile.batch, threads=2, progress=show)
        inputs = checks.one_batch(tested, bench.preprocess, profile.batch)
        _write_golden(bench, models["pruned"], folder)
        with watched(runtimes.on(profile), bench.shows.say) as machine:
            dense, pruned = checks.compare_latency(
                sessions["dense"],
                sessions["pruned"],
                inputs,
                percentile=profile.budget.percentile,
                runs=wanted.runs,
                max_seconds=wanted.max_seconds,
                seed=profile.seed,
                progress=show,
            )
        price = compatibility_price(bench, sessions["pruned"], inputs)
        fused = soundness.fusions(bench, models, engine_files(bench))
    consistency = soundness.consistency(bench, _backend_name(bench), engine_files(bench)["pruned"])
    names = tuple(bench.class_names) if bench.class_names else None
    accuracy = checks.compare_accuracy(
        outputs.logits["dense"],
        outputs.logits["pruned"],
        outputs.labels,
        names=names,
        unreadable=len(tested.unreadable),
        seed=profile.seed,
    )
    budget_ms = checks.budget_ms(profile.budget.latency_ms, profile.budget.speedup, dense, profile.budget.percentile)
    memory_mb = runtimes.on(profile).memory_mb(
        _backend_name(bench), engine_files(bench)["pruned"], inputs,
        threads=profile.budget.threads, options=runtimes.load_options(profile),
    )  # fmt: skip
    found = checks.Figures(
        latency=pruned.percentiles.get(profile.budget.percentile),
        samples=pruned.samples,
        dense_latency=dense.percentiles.get(profile.budget.percentile),
        top1=accuracy.pruned.percent if accuracy.pruned else None,
        reference_top1=_reference_top1(outputs.logits.get("reference"), outputs.labels, accuracy),
        agreement=accuracy.agreement.percent,
        memory_mb=memory_mb,
        non_finite=accuracy.non_finite,
        slowdown=_slowdown(bench, dense),
        drift=dense.reference_drift,
        inconsistent=consistency.reasons(),
    )
    figures = {
        "verdict": asdict(checks.judge(checks.Limits.of(profile, budget_ms), found)),
        "budget_ms": budget_ms,
        "accuracy": accuracy.to_dict(),
        "reference_top1": found.reference_top1,
        "dense_latency": checks.latency_dict(dense),
        "pruned_latency": checks.latency_dict(pruned),
        "dense_runs_ms": [round(ms, 4) for ms in dense.runs_ms],
        "pruned_runs_ms": [round(ms, 4) for ms in pruned.runs_ms],
        "parity": _engine_parity(bench, outputs.logits["pruned"]),
        "compatibility": price,
        "consistency": consistency.to_dict(),
        "fusion": fused,
        "memory_mb": memory_mb,
        "size_bytes": {name: checks.size_bytes(path) for name, path in engine_files(bench).items()},
        "machine": machine,
    }
    write_json(folder / "figures.json", figures)


def compatibility_price(bench: Bench, pruned: Sequence[Model], inputs: np.ndarray) -> dict[str, Any] | None:
    """Median latency of the product, and without what makes it serve other GPUs or versions; None: nothing does."""
    if not runtimes.asks_compatibility(bench.profile):
        return None
    wanted = bench.profile.validation
    (file,) = (e["file"] for e in bench.json("engines", "engines.json") if e["model"] == PLAIN)
    with ExitStack() as stack:
        path = bench.folders["engines"] / file
        plain = [stack.enter_context(open_engine(bench, path)) for _ in range(checks.SESSIONS)]
        found = checks.compare_latency(
            plain, pruned, inputs, runs=wanted.runs, max_seconds=wanted.max_seconds, seed=bench.profile.seed,
            progress=bench.shows.progress,
        )  # fmt: skip
    without, with_it = (float(np.median(one.runs_ms)) for one in found)
    return {"without_ms": without, "with_ms": with_it, "times": with_it / without, "runs": found[0].samples}


def _write_golden(bench: Bench, model: Model, folder: Path) -> None:
    """One of the test images with what the engine says of it, for whoever embeds the engine elsewhere."""
    tested = bench.images.test
    _, (first,) = picked(tested, bench.preprocess, [0])
    precision = "int8" if bench.int8_file() else bench.profile.runtime.precision
    checks.write_golden(folder, model, tested.image(first), precision)


def _slowdown(bench: Bench, dense: Distribution) -> float:
    """The dense model's median time as a multiple of what it was in the search; 1 where either is not known."""
    searched, median = bench.json("search", "search.json"), dense.percentiles.get(50)
    return float(median.value_ms / searched["dense_ms"]) if median and searched["measured"] else 1.0


def engine_files(bench: Bench) -> dict[str, Path]:
    """The engines that are run: dense and pruned, and the dense model in fp32 where these are in another precision.

    From the stage ``int8`` on, the pruned one is that in int8 if it was kept.
    """
    runtime, exported = bench.profile.runtime, bench.folders["export"]
    files = {}
    if not runtimes.is_tensorrt(runtime.name):
        files = {"dense": exported / "dense.onnx", "pruned": exported / "model.onnx"}
        if runtime.precision != "fp32":
            files["reference"] = exported / ("dense.onnx" if bench.profile.tells_precision else "reference.onnx")
    names = {"dense": "dense", "model": "pruned", "reference": "reference"}
    built = (engine for engine in product_engines(bench) if engine["model"] in names)
    files |= {names[engine["model"]]: bench.folders["engines"] / engine["file"] for engine in built}
    int8 = bench.int8_file()
    return files | ({"pruned": int8} if int8 else {})


def product_engines(bench: Bench) -> list[dict[str, Any]]:
    """The engines that were built in the runtime and precision of the product, and the fp32 reference."""
    wanted, precision = bench.profile.runtime.name, bench.profile.runtime.precision
    built = [e for e in bench.json("engines", "engines.json") if e["runtime"] == wanted]
    return [e for e in built if e["precision"] == precision or e["model"] == "reference"]


def open_engine(bench: Bench, path: Path, precision: str | None = None) -> Model:
    """An engine as a service would have it; in another precision than the product's where one is named."""
    profile = bench.profile
    options = runtimes.load_options(profile, precision)
    backend = runtimes.on(profile).load(_backend_name(bench), path, threads=profile.budget.threads, options=options)
    least = profile.input.batch.min if runtimes.is_tensorrt(profile.runtime.name) else 1
    return Model(backend, bench.preprocess, bench.class_names, profile.input.batch.max, least)


def _backend_name(bench: Bench) -> str:
    return bench.profile.runtime.name.removesuffix("-rtx")


def _engine_parity(bench: Bench, logits: np.ndarray) -> dict[str, Any] | None:
    """How far the engine is from torch; None where it is ONNX Runtime on this CPU, in which the export was compared."""
    import torch

    runtime = bench.profile.runtime
    on_cpu = runtime.name == "onnxruntime" and runtime.provider.lower() in ("cpu", "cpuexecutionprovider")
    if on_cpu and bench.profile.device.host is None and not bench.int8_file():
        return None
    # in the order in which the engine had them, unreadable ones left out
    rounds = math.ceil(min(bench.profile.validation.parity_images, len(logits)) / PARITY_BATCH)
    fed = islice(batches(bench.images.test, bench.preprocess, PARITY_BATCH), rounds)
    with torch.no_grad():
        by_torch = torch.cat([bench.pruned(torch.from_numpy(pixels)) for pixels, _ in fed])
    return checks.compare_with_torch(logits, by_torch.numpy()).to_dict()


def _reference_top1(logits: np.ndarray | None, labels: np.ndarray, accuracy: checks.Accuracy) -> float | None:
    """Percent of the test images that the dense model in fp32 has right."""
    known = labels >= 0
    if accuracy.dense is None or not known.any():
        return None
    if logits is None:
        return accuracy.dense.percent
    return 100 * float((logits.argmax(axis=1) == labels)[known].mean())


def report_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``report`` depends on besides earlier stages."""
    return {"profile": bench.profile.model_dump(mode="json"), "packages": package_versions()}


def report(bench: Bench, folder: Path) -> None:
    """Write the report for people and the manifest for programs."""
    from ..report.page import render

    manifest = make_manifest(bench)
    (folder / "report.html").write_text(render(collect(bench, manifest)), encoding="utf-8")
    manifest.write(folder)


def make_manifest(bench: Bench) -> Manifest:
    """The manifest, its list of files still empty: they are hashed when they are in their place."""
    profile, found = bench.profile, bench.json("validate", "figures.json")
    exported, searched = bench.json("export", "export.json"), bench.json("search", "search.json")
    # figures.json has a parity where the engine is not the very thing that the export was compared in
    parity = found["parity"] or exported["parity"][profile.graph_precision]
    plain = {
        "verdict": found["verdict"]["verdict"],
        "reasons": reasons(found, searched),
        "device": runtimes.device(profile),
        "versions": package_versions(),
        "dense": _figures(bench, found, "dense"),
        "pruned": _figures(bench, found, "pruned") | {"predicted_latency_ms": searched["chosen"]["predicted_ms"]},
        "budget": {
            "latency_ms": found["budget_ms"],
            "percentile": profile.budget.percentile,
            "batch": profile.batch,
            "image_size": bench.dense.config.image_size,
        },
        "parity": {
            "max_abs": parity["max_abs"],
            "top1_agreement": parity["top1_agreement"],
            "images": parity["images"],
            **({"ties": parity["ties"]} if "ties" in parity else {}),
        },
        "consistency": found["consistency"],
        "fusion": found["fusion"],
        "engines": _engines(bench),
        "compatibility": found.get("compatibility"),
        "files": {},
        "name": profile.name,
        "preprocess": bench.preprocess.to_dict(),
        "classes": bench.class_names,
        "search": {name: searched[name] for name in ("status", "reason", "method")},
        "int8": bench.json("int8", INT8),
        "weights": sparse.account(bench),
    }
    return Manifest.model_validate(plain)


def package_versions() -> dict[str, str]:
    """Versions of what has a say in the figures."""
    found = {"vitprune": vitprune.__version__, "python": platform.python_version(), "platform": sys.platform}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def reasons(found: Mapping[str, Any], searched: Mapping[str, Any]) -> tuple[str, ...]:
    """Why the verdict is what it is; with what the search says, where no plan met the budget in it nor at last."""
    verdict, why = found["verdict"]["verdict"], tuple(found["verdict"]["reasons"])
    missed = verdict != "pass" and searched["status"] in ("over", "unreachable")
    return (*why, searched["reason"]) if missed else why


def _figures(bench: Bench, found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the manifest says of the dense or the pruned model."""
    from vitprune.macs import macs, params

    config = bench.dense.config if name == "dense" else bench.pruned.config
    share = found["accuracy"][name]
    more = {"memory_mb": found["memory_mb"]} if name == "pruned" else {"reference_top1": found["reference_top1"]}
    return {
        "params": params(config),
        "macs": macs(config),
        "top1": share["percent"] if share else None,
        "latency_ms": found[f"{name}_latency"],
        "size_bytes": found["size_bytes"][name],
        **more,
    }


def _engines(bench: Bench) -> list[dict[str, Any]]:
    """The engine that was validated, then those that were only built."""
    profile = bench.profile
    product = {"runtime": profile.runtime.name, "precision": profile.runtime.precision}
    plans = {"min_batch": profile.input.batch.min, "max_batch": profile.input.batch.max}
    files = {"options": runtimes.load_options(profile), "max_batch": profile.input.batch.max}
    ours = plans if runtimes.is_tensorrt(profile.runtime.name) else files
    entries = []
    if int8 := bench.int8_file():
        entries.append({**product, "precision": "int8", "status": "run", "file": f"engine/{int8.name}", **ours})
    for engine in bench.json("engines", "engines.json"):
        if engine["model"] == "model":
            built = {name: engine[name] for name in ("runtime", "precision")}
            served = {"status": "run", **ours} if built == product else {"status": "built", **plans}
            compiled = {"compiled": True} if engine["file"] == COMPILED else {}
            entries.append({**built, "file": f"engine/{engine['file']}", **served, **compiled})
    if not runtimes.is_tensorrt(profile.runtime.name):
        entries.append({**product, "status": "run", "file": onnx_name(profile, profile.graph_precision), **files})
    return sorted(entries, key=lambda entry: entry["status"] != "run")
