"""What the benchmarks of whole searches share: rows kept between runs, engines, their times and answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from vitprune_deploy.build import judge, pipeline, runtimes
from vitprune_deploy.build.bench import Bench
from vitprune_deploy.build.make import served_dialect
from vitprune_deploy.console import Console
from vitprune_deploy.export.onnx import export_module, symbolic_axis
from vitprune_deploy.export.precision import in_precision
from vitprune_deploy.files import canonical_sha256, sha256_file
from vitprune_deploy.latency.protocol import Measurement
from vitprune_deploy.latency.wholes import measure_models
from vitprune_deploy.profile import Profile, load_profile
from vitprune_deploy.validate import run_models
from vitprune_deploy.verbs.building import budget_overrides

WINDOW = (0.97, 1.0)  # of the budget: where a landed engine lies


class Rows:
    """Results as JSON lines: those of the same settings are not computed again."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.key = path, canonical_sha256(settings)[:16]
        self.rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            row = json.loads(line)
            if row["key"] == self.key:
                self.rows[row["row"]] = row

    def get(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        if name not in self.rows:
            self.rows[name] = row = {"row": name, "key": self.key, **make()}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return self.rows[name]


class Ratio(NamedTuple):
    """A ratio of two latencies with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Measurement, below: Measurement, factor: float = 1.0) -> Ratio:
        value = factor * above.value_ms / below.value_ms
        half = value * math.hypot(above.half_width, below.half_width)
        return cls(value, value - half, value + half)


def open_profile(name: str, overrides: Sequence[str], speedup: float) -> Profile:
    return load_profile(name, [*overrides, *budget_overrides(f"{speedup:g}x")], files_exist=True)


def settings_of(profile: Profile, **further: Any) -> dict[str, Any]:
    """What results depend on besides the budget."""
    plain = profile.model_dump(mode="json", exclude={"budget": {"speedup", "latency_ms"}, "name": True})
    weights = profile.model.checkpoint
    return {"profile": plain, "weights": sha256_file(Path(weights)) if weights else None, **further}


def searched(profile: Profile, folder: Path, until: str = "search") -> Bench:
    """The product's own pipeline up to a stage; measuring and losses are done once for all budgets of a folder."""
    return pipeline.run(profile, folder, Console(), until=until)


def export(model: nn.Module, path: Path, profile: Profile, image: Sequence[int]) -> Path:
    """Any model, ours or timm's, by the exporter of our engines (torch.onnx, dynamo), for the profile's batches."""
    precision, batch = profile.runtime.precision, profile.input.batch
    example, axis = symbolic_axis("batch", (batch.min, batch.max), 1)
    export_module(
        in_precision(model.eval(), precision),
        (torch.zeros(example, *image),),
        path,
        dynamic=[{0: axis} if axis else {}],
        names=(["images"], ["logits"]),
        **served_dialect(profile, precision),
    )
    return path


def timed(paths: Mapping[str, Path], profile: Profile, seed: int, seconds: float) -> list[Measurement]:
    """The engines' times, interleaved; the first path is the dense model's."""
    return measure_models(
        paths,
        runtimes.loader(profile),
        batch=profile.batch,
        relative_half_width=profile.measure.relative_half_width,
        max_seconds=seconds,
        seed=seed,
    )


def right(bench: Bench, path: Path) -> np.ndarray:
    """Which of the test images the engine gets right, bool [N], through the runtime that services import."""
    with judge.open_engine(bench, path) as model:
        found = run_models({"it": model}, bench.images.test, batch=bench.profile.batch, threads=2)
    return found.logits["it"].argmax(axis=1) == found.labels


def noise(times: Sequence[Measurement]) -> str:
    """What the machine did to a measurement, in words."""
    widest, reference = max(times, key=lambda one: one.half_width), times[0]
    rejected = sum(one.rejected for one in times) / max(1, sum(one.rejected + one.accepted for one in times))
    gate = "gated" if all(one.gated for one in times) else "not gated"
    return (
        f"{gate}, {100 * rejected:.0f}% of samples rejected, reference drifted {100 * reference.reference_drift:.1f}%, "
        f"widest interval +-{100 * widest.half_width:.1f}%, {sum(one.unstable for one in times)} unstable"
    )
