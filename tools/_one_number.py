"""Baselines that have one number to tune: the share that they remove. Tuned on calibration images, landed by time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from _common import WINDOW, export, timed
from vitprune.search.probes import distance
from vitprune_deploy.build.bench import Bench

AIM = sum(WINDOW) / 2  # of the budget
FINALISTS = 2  # of each baseline: landed, and compared again on calibration images
ATTEMPTS = 6  # to land one


@dataclass(frozen=True)
class Family:
    """Models that are the faster, the larger the share is; at share 0 as slow as ``slowest`` of the dense one."""

    name: str
    make: Callable[[float], nn.Module]
    shares: tuple[float, ...]
    whole_at_zero: bool = True


class Landed(NamedTuple):
    """A tuned model: its share of the dense model's time, as landing measured it, and its calibration loss."""

    family: str
    share: float
    time: float
    loss: float
    path: Path


Curve = list[tuple[float, float]]  # share removed -> time as a share of the dense model's


class Tuner:
    """Tunes families for one budget after another."""

    def __init__(self, bench: Bench, dense: Path, folder: Path, images: int | None, seconds: float) -> None:
        self.bench, self.dense, self.folder, self.seconds = bench, dense, folder, seconds
        self.image = (bench.dense.config.channels, *bench.dense.config.image_size)
        self.images = bench.calibration[:images]

    def survey(self, families: Sequence[Family]) -> dict[str, Curve]:
        """Times of every family at a few shares, all interleaved."""
        cases = [(family, share) for family in families for share in family.shares]
        paths = {"dense": self.dense}
        for family, share in cases:
            print(f"export {family.name} {share:.2f}", flush=True)
            name = f"{family.name} {share:.2f}"
            paths[name] = self._export(family, share, self.folder / f"survey {name}.onnx")
        found = timed(paths, self.bench.profile, self.bench.profile.seed, self.seconds)
        curves: dict[str, Curve] = {f.name: [(0.0, 1.0)] if f.whole_at_zero else [] for f in families}
        for (family, share), one in zip(cases, found[1:], strict=True):
            curves[family.name].append((share, one.value_ms / found[0].value_ms))
        for path in list(paths.values())[1:]:
            path.unlink()
        return curves

    def land(self, families: Sequence[Family], curves: Mapping[str, Curve], budget: float, stem: str) -> Landed | None:
        """The family's model of least calibration loss within ``budget``, a share of the dense time; None: too slow."""
        shares = {family.name: share_at(curves[family.name], AIM * budget) for family in families}
        able = [family for family in families if shares[family.name] is not None]
        losses = {family.name: self.loss(family.make(shares[family.name] or 0.0)) for family in able}
        for name, loss in losses.items():
            print(f"  {name}: share {shares[name]:.3f}, calibration loss {loss:.4f}", flush=True)
        best = sorted(able, key=lambda family: losses[family.name])[:FINALISTS]
        landed = [
            self._land(family, curves[family.name], budget, self.folder / f"{stem} {number}.onnx")
            for number, family in enumerate(best)
        ]
        return min((one for one in landed if one), key=lambda one: one.loss, default=None)

    def _land(self, family: Family, curve: Curve, budget: float, path: Path) -> Landed | None:
        """Bisection between measured shares until the time lies in the window; else the slowest within the budget."""
        tried: Curve = []
        curve = list(curve)
        for number in range(ATTEMPTS):
            share = share_at(curve, AIM * budget)
            if share is None or any(abs(share - other) < 1e-3 for other, _ in tried):
                break
            paths = {"dense": self.dense, "it": self._export(family, share, path)}
            dense, one = timed(paths, self.bench.profile, self.bench.profile.seed + number, self.seconds)
            tried.append((share, one.value_ms / dense.value_ms))
            print(f"  {family.name}: share {share:.3f} takes {100 * tried[-1][1] / budget:.1f}% of the budget")
            if WINDOW[0] * budget <= tried[-1][1] <= WINDOW[1] * budget:
                break
            curve = [point for point in curve if abs(point[0] - share) > 1e-3] + tried[-1:]
        within = [(time, share) for share, time in tried if time <= budget]
        if not within:
            return None
        time, share = max(within)
        self._export(family, share, path)
        return Landed(family.name, share, time, self.loss(family.make(share)), path)

    def _export(self, family: Family, share: float, path: Path) -> Path:
        return export(family.make(share), path, self.bench.profile, self.image)

    @cached_property
    def _dense_logits(self) -> Tensor:
        return self._logits(self.bench.dense)

    def loss(self, model: nn.Module) -> float:
        """Mean distance to the dense model's output on calibration images: KL in nats."""
        return float(distance(self.bench.dense)(self._dense_logits, self._logits(model)).mean())

    @torch.no_grad()
    def _logits(self, model: Any) -> Tensor:
        return torch.cat([model.eval()(batch) for batch in self.images.split(64)])


def share_at(curve: Curve, time: float) -> float | None:
    """The share at which the curve, made monotone, comes down to ``time``; None where it never does."""
    shares, times = np.array(sorted(curve)).T
    times = np.minimum.accumulate(times)
    if not times[-1] <= time <= times[0]:
        return None
    return float(np.interp(time, times[::-1], shares[::-1]))
