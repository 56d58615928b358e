"""Figures and limits in, a verdict out: a pure function, with one sentence for each limit that is not met."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vitprune.search.landing import SLOW

from ..latency.protocol import Percentile
from ..profile import Profile

UNSTEADY = 0.3  # the dense time varies by so large a share: the machine has phases, which change ratios as well


@dataclass(frozen=True)
class Limits:
    """What a profile asks for, the budget in milliseconds; None: nothing is asked."""

    latency_ms: float
    percentile: int = 50
    max_drop: float | None = None  # points of top-1, against the fp32 dense model
    min_top1: float | None = None  # percent
    min_agreement: float | None = None  # percent
    memory_mb: float | None = None
    relative: bool = False  # the budget comes of the dense model's same percentile, over a speed-up

    @classmethod
    def of(cls, profile: Profile, budget_ms: float) -> Limits:
        """What ``profile`` asks for, with its budget resolved to milliseconds."""
        budget, floors = profile.budget, profile.accuracy
        return cls(
            latency_ms=budget_ms,
            percentile=budget.percentile,
            max_drop=floors.max_drop,
            min_top1=floors.min_top1,
            min_agreement=floors.min_agreement,
            memory_mb=budget.memory_mb,
            relative=budget.speedup is not None,
        )


@dataclass(frozen=True)
class Figures:
    """What was found; None: not known.

    Attributes:
        latency: the budget's percentile of single runs; None where too few runs are behind it.
        samples: those runs.
        dense_latency: the dense model's, where the budget is relative to it.
        top1, agreement: percent.
        reference_top1: percent, of the dense model in fp32.
        memory_mb: peak of the process's memory that the loaded model added.
        non_finite: images for which the engine gave NaN or infinity.
        inconsistent: a sentence for each check of ``consistency`` that failed.
        slowdown: the dense model's median time, as a multiple of what it was when the plan was measured.
        drift: by how much the dense model's time varied meanwhile, its 90th minus its 10th percentile over the median.
    """

    latency: Percentile | None
    samples: int
    top1: float | None = None
    reference_top1: float | None = None
    agreement: float | None = None
    memory_mb: float | None = None
    non_finite: int = 0
    dense_latency: Percentile | None = None
    slowdown: float = 1.0
    drift: float = 0.0
    inconsistent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Pass, or why not: ``unstable`` if nothing was missed but something could not be decided."""

    verdict: Literal["pass", "fail", "unstable"]
    reasons: list[str] = field(default_factory=list)


def judge(limits: Limits, figures: Figures) -> Verdict:
    """The verdict, with a sentence for each limit that was missed or could not be decided."""
    missed = [*_missed_latency(limits, figures), *missed_floors(limits, figures)]
    undecided = _undecided(limits, figures)
    if limits.memory_mb is not None and figures.memory_mb is not None and figures.memory_mb > limits.memory_mb:
        missed.append(f"memory {figures.memory_mb:.0f} MB is over budget.memory_mb {limits.memory_mb:g}")
    if figures.non_finite:
        missed.append(f"the engine gave NaN or infinity for {figures.non_finite} test images")
    missed += figures.inconsistent
    return Verdict("fail" if missed else "unstable" if undecided else "pass", missed + undecided)


def _missed_latency(limits: Limits, figures: Figures) -> list[str]:
    found = figures.latency
    if found is None or found.unstable or _undecided_budget(limits, figures) or found.value_ms <= limits.latency_ms:
        return []
    then = ""
    if figures.slowdown < 1 / SLOW:
        times = 1 / figures.slowdown
        then = (
            f"; the machine was slow when the plan was measured, the dense model took {times:.2f} times as "
            "long as now, so let --fresh search again"
        )
    return [
        f"latency p{limits.percentile} {found.value_ms:.3g} ms ({found.low_ms:.3g} to {found.high_ms:.3g}) is over "
        f"the budget of {limits.latency_ms:.3g} ms{then}"
    ]


def missed_floors(limits: Limits, figures: Figures) -> list[str]:
    """Each floor that the figures lie under; a figure that is not known is no miss, see ``_undecided``."""
    missed = []
    if limits.max_drop is not None and figures.top1 is not None and figures.reference_top1 is not None:
        drop = round(figures.reference_top1 - figures.top1, 9)  # 90.1 - 89.1 is a hair over 1
        if drop > limits.max_drop:
            missed.append(
                f"top-1 fell by {drop:.2f} points, from {figures.reference_top1:.2f} to {figures.top1:.2f}; "
                f"accuracy.max_drop is {limits.max_drop:g}"
            )
    for name, value, floor in (
        ("top-1", figures.top1, limits.min_top1),
        ("agreement with the dense model", figures.agreement, limits.min_agreement),
    ):
        if floor is not None and value is not None and value < floor:
            key = "accuracy.min_top1" if name == "top-1" else "accuracy.min_agreement"
            missed.append(f"{name} {value:.2f}% is under {key} {floor:g}")
    return missed


def _undecided_budget(limits: Limits, figures: Figures) -> list[str]:
    """Why a latency over the budget says nothing, or a budget that is relative to the dense model is not known."""
    over = figures.latency is not None and figures.latency.value_ms > limits.latency_ms
    if figures.slowdown > SLOW and (over or limits.relative):
        return [
            f"the dense model took {figures.slowdown:.2f} times as long as when the plan was measured: the machine is "
            "slow now, and speed-ups are not what they are otherwise; repeat on a quiet machine"
        ]
    if figures.drift > UNSTEADY and over:
        return [
            f"the dense model's own time varied by {100 * figures.drift:.0f}% while latency was measured, and with it "
            "how much faster the pruned one is; repeat on a quiet machine"
        ]
    if not limits.relative:
        return []
    dense = figures.dense_latency
    if dense is None:
        return [f"too few runs are behind the dense model's latency p{limits.percentile}, and so behind the budget"]
    if dense.unstable:
        return [
            f"the dense model's latency p{limits.percentile} {dense.value_ms:.3g} ms, which the budget comes of, is "
            f"known to {dense.low_ms:.3g}..{dense.high_ms:.3g} ms only; repeat on a quiet machine"
        ]
    return []


def _undecided(limits: Limits, figures: Figures) -> list[str]:
    """What the figures cannot say."""
    reasons = _undecided_budget(limits, figures)
    found = figures.latency
    if found is None:
        reasons.append(f"{figures.samples} runs are too few for latency p{limits.percentile}; raise validation.runs")
    elif found.unstable:
        reasons.append(
            f"latency p{limits.percentile} {found.value_ms:.3g} ms is known to {found.low_ms:.3g}..{found.high_ms:.3g}"
            f" ms only, too wide to judge against {limits.latency_ms:.3g} ms; repeat on a quiet machine"
        )
    floors = limits.max_drop is not None or limits.min_top1 is not None
    if floors and (figures.top1 is None or (limits.max_drop is not None and figures.reference_top1 is None)):
        reasons.append("top-1 is not known, since the test images carry no classes; accuracy.min_agreement needs none")
    if limits.min_agreement is not None and figures.agreement is None:
        reasons.append("agreement with the dense model was not measured")
    if limits.memory_mb is not None and figures.memory_mb is None:
        reasons.append("memory was not measured, since this system does not tell it")
    return reasons
