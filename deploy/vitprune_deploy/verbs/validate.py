"""An output folder, validated again on this machine against its own profile."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import validate as checks
from ..artifact import EngineEntry, Manifest, verify
from ..build import runtimes
from ..console import Console
from ..data import ImageSet, open_split, picked
from ..files import sha256_file
from ..latency.fingerprint import compare
from ..latency.protocol import Distribution
from ..profile import Profile, load_profile
from ..remote.state import read_state
from ..runtime import Model, load
from . import soundness
from .answer import Answer, milliseconds, table

DENSE_FILES = (".work/export-*/dense.onnx", ".work/engines-*/dense.*.plan")  # what a build keeps for its next run


@dataclass(frozen=True)
class Found:
    """What was found here.

    Attributes:
        dense: latency of the dense engine; None: the folder does not hold that engine any more.
        accuracy: of the pruned engine beside the dense one, or beside itself where there is none.
        memory_mb: of the pruned engine.
        consistency: of each engine that runs here, by its name.
    """

    dense: Distribution | None
    pruned: Distribution
    accuracy: checks.Accuracy
    memory_mb: float | None
    consistency: Mapping[str, checks.Consistency]


def validate(console: Console, folder: Path, overrides: Sequence[str]) -> Answer:
    """Files, accuracy, latency and consistency of the engine in ``folder``; code 1 unless the verdict is 'pass'.

    The dense engine is run beside it if the build's work folder still has it. Without it, the budget in milliseconds
    and the dense top-1 are those that the build found.

    Raises:
        DamagedFile: a file is not what the manifest says.
        InputError: there is no such folder, or its images are not where they were.
        MissingError: the engine's runtime is not here.
    """
    manifest = verify(folder)
    profile = load_profile(folder / "profile.yaml", overrides, files_exist=True)
    with ExitStack() as stack:
        sessions = _open(folder, manifest, profile, stack)
        pruned = sessions["pruned"][0]
        classes = json.loads((folder / "model.json").read_bytes())["classes"] or None
        images = open_split(profile.data, class_names=pruned.classes, num_classes=classes, seed=profile.seed).test
        few, _ = picked(images, pruned.preprocess, range(min(checks.FEW, len(images))))
        golden = checks.compare_golden(folder, manifest, pruned)
        with console.stage("validate", 1, 1):
            sound = soundness.consistency(folder, manifest, profile, few, console.say)
            found = _find(console, profile, sessions, images, sound, _memory(folder, manifest, profile))
        device = runtimes.on(profile)
        here = device.fingerprint(pruned.backend.runtime, pruned.backend.provider, profile.budget.threads)
    verdict, budget_ms = _judge(profile, manifest, found)
    verdict = _with_golden(verdict, golden)
    differences = compare(manifest.device, here)
    for line in (*differences[0], *differences[1]):
        console.say(f"note: {line}")
    data = {
        "folder": str(folder),
        **asdict(verdict),
        "budget_ms": budget_ms,
        "accuracy": found.accuracy.to_dict(),
        "consistency": {name: one.to_dict() for name, one in found.consistency.items()},
        "golden": golden._asdict() if golden else None,
        "latency": {name: checks.latency_dict(one) for name, one in _latencies(found).items()},
        "device": here,
        "device_differences": [*differences[0], *differences[1]],
        "machine": read_state(device.state()).to_dict(),
    }
    text = _text(folder, manifest, found, verdict, budget_ms)
    return Answer(text, data, 0 if verdict.verdict == "pass" else 1)


def _open(folder: Path, manifest: Manifest, profile: Profile, stack: ExitStack) -> dict[str, list[Model]]:
    """Sessions of the pruned engine, and of the dense one where it is still there; all are closed by ``stack``."""
    threads, device = profile.budget.threads, runtimes.on(profile)
    # every file of the folder has been compared with its sum
    pruned = [
        stack.enter_context(load(folder, threads=threads, verify=False, device=device)) for _ in range(checks.SESSIONS)
    ]
    file = _dense_file(folder, pruned[0])
    if file is None:
        return {"pruned": pruned}
    engine, extra = _run_engine(manifest)
    kind, options = engine.runtime.removesuffix("-rtx"), extra.get("options")
    served = extra.get("max_batch"), extra.get("min_batch", 1)
    backends = [device.load(kind, file, threads=threads, options=options) for _ in pruned]
    dense = [Model(backend, pruned[0].preprocess, pruned[0].classes, *served) for backend in backends]
    return {"pruned": pruned, "dense": [stack.enter_context(model) for model in dense]}


def _run_engine(manifest: Manifest) -> tuple[EngineEntry, Mapping[str, Any]]:
    """The engine that the build ran, and what the manifest says of it beyond the usual; ``load`` found it there."""
    engine = next(engine for engine in manifest.engines if engine.status == "run")
    return engine, engine.model_extra or {}


def _dense_file(folder: Path, pruned: Model) -> Path | None:
    """The dense engine that the build made, if it is there and whole."""
    pattern = DENSE_FILES[1] if pruned.backend.runtime.startswith("tensorrt") else DENSE_FILES[0]
    for file in folder.glob(pattern):
        try:
            sums = json.loads((file.parent / "stage.json").read_bytes())["files"]
        except (OSError, ValueError, KeyError):
            continue
        beside = [name for name in sums if name.startswith(file.name)]
        if beside and all(sha256_file(file.parent / name) == sums[name] for name in beside):
            return file
    return None


def _memory(folder: Path, manifest: Manifest, profile: Profile) -> Callable[[np.ndarray], float | None]:
    """From one batch to the memory that the engine takes, in MB."""
    engine, extra = _run_engine(manifest)
    return partial(
        runtimes.on(profile).memory_mb,
        engine.runtime.removesuffix("-rtx"),
        folder / extra.get("file", "model.onnx"),
        threads=profile.budget.threads,
        options=extra.get("options"),
    )


def _find(
    console: Console,
    profile: Profile,
    sessions: Mapping[str, Sequence[Model]],
    images: ImageSet,
    sound: Mapping[str, checks.Consistency],
    memory_mb: Callable[[np.ndarray], float | None],
) -> Found:
    """What the engines, each loaded once or several times, are worth on ``images``."""
    wanted, models = profile.validation, {name: opened[0] for name, opened in sessions.items()}
    pruned = models["pruned"]
    outputs = checks.run_models(models, images, batch=profile.batch, threads=2, progress=console.progress)
    inputs = checks.one_batch(images, pruned.preprocess, profile.batch)
    first, second = checks.compare_latency(
        sessions.get("dense", sessions["pruned"]),
        sessions["pruned"],
        inputs,
        percentile=profile.budget.percentile,
        runs=wanted.runs,
        max_seconds=wanted.max_seconds,
        seed=profile.seed,
        progress=console.progress,
    )
    accuracy = checks.compare_accuracy(
        outputs.logits.get("dense", outputs.logits["pruned"]),
        outputs.logits["pruned"],
        outputs.labels,
        names=pruned.classes,
        unreadable=len(images.unreadable),
        seed=profile.seed,
    )
    return Found(first if "dense" in models else None, second, accuracy, memory_mb(inputs), sound)


def _judge(profile: Profile, manifest: Manifest, found: Found) -> tuple[checks.Verdict, float]:
    """The verdict, and the budget in milliseconds that it was judged by."""
    budget, accuracy = profile.budget, found.accuracy
    budget_ms, relative = manifest.budget.latency_ms, False
    if found.dense is not None:
        budget_ms = checks.budget_ms(budget.latency_ms, budget.speedup, found.dense, budget.percentile)
        relative = budget.speedup is not None
    beside_fp32 = found.dense is not None and profile.runtime.precision == "fp32" and accuracy.dense is not None
    figures = checks.Figures(
        latency=found.pruned.percentiles.get(budget.percentile),
        samples=found.pruned.samples,
        dense_latency=found.dense.percentiles.get(budget.percentile) if found.dense else None,
        top1=accuracy.pruned.percent if accuracy.pruned else None,
        reference_top1=accuracy.dense.percent if beside_fp32 and accuracy.dense else _reference_top1(manifest),
        agreement=None if found.dense is None else accuracy.agreement.percent,
        memory_mb=found.memory_mb,
        non_finite=accuracy.non_finite,
        drift=found.dense.reference_drift if found.dense else 0.0,
        inconsistent=_inconsistent(found.consistency),
    )
    return checks.judge(replace(checks.Limits.of(profile, budget_ms), relative=relative), figures), budget_ms


def _inconsistent(found: Mapping[str, checks.Consistency]) -> tuple[str, ...]:
    """A sentence for each check that failed, with the engine where there are several."""
    several = len(found) > 1
    return tuple(f"{name}: {why}" if several else why for name, one in found.items() for why in one.reasons())


def _with_golden(verdict: checks.Verdict, golden: checks.Difference | None) -> checks.Verdict:
    """The verdict, which fails where the golden image does not give its golden logits."""
    if golden is None or golden.small:
        return verdict
    found = "are not of the kind that" if golden.max_abs is None else f"differ by up to {golden.max_abs:.3g} from what"
    reason = (
        f"the golden image's logits {found} the build gave, {golden.tolerance:.3g} may be rounding: "
        "this runtime does not compute what was validated"
    )
    return checks.Verdict("fail", [reason, *verdict.reasons])


def _reference_top1(manifest: Manifest) -> float | None:
    """Percent that the dense model in fp32 had right when the folder was built."""
    extra = manifest.dense.model_extra or {}
    return extra.get("reference_top1", manifest.dense.top1)


def _latencies(found: Found) -> dict[str, Distribution]:
    return {"pruned": found.pruned} | ({"dense": found.dense} if found.dense is not None else {})


def _text(folder: Path, manifest: Manifest, found: Found, verdict: checks.Verdict, budget_ms: float) -> str:
    """The verdict with its reasons, and what was found beside what the build had found."""
    percentile, top1 = manifest.budget.percentile, found.accuracy.pruned
    rows = []
    for name, one in _latencies(found).items():
        for number, value in one.percentiles.items():
            built = getattr(getattr(manifest, name).latency_ms, f"p{number}", None)
            limit = f"<= {milliseconds(budget_ms)}" if (name, number) == ("pruned", percentile) else ""
            rows.append([f"{name} p{number} (ms)", milliseconds(built), milliseconds(value.value_ms), limit])
    if top1 is not None:
        interval = f"{top1.percent:.2f} ({top1.low:.2f} to {top1.high:.2f})"
        built_top1 = manifest.pruned.top1
        rows.append(["pruned top-1 (%)", "-" if built_top1 is None else f"{built_top1:.2f}", interval, ""])
    if found.dense is not None:
        rows.append(["agreement (%)", "", f"{found.accuracy.agreement.percent:.2f}", ""])
    figures = table(rows, head=["", "when built", "now", "budget"], right=[1, 2, 3])
    sound = soundness.consistency_text({name: one.to_dict() for name, one in found.consistency.items()})
    whole = f"all {len(manifest.files)} files of {folder} are what its manifest says"
    reasons = [f"  {reason}" for reason in verdict.reasons]
    return "\n".join([verdict.verdict, *reasons, "", figures, "", sound, "", whole])
