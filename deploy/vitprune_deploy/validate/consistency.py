"""Does an engine give an image the same answer whatever is beside it, before it or around it? What is asked and found.

A build that succeeds may leave an engine that is right at batch 1 and wrong at batch 8, or wrong where its kernels are
fused. So a few images go through the engine itself, see ``examine``, at the smallest, the usual and the largest batch
that the profile serves, and at odd ones between them.

Two runs of one network may differ in the last bits, see ``LIMITS``. Where tokens are selected, one such bit may decide
between two scores that are nearly equal, and then other tokens stay. An engine does not show its scores, so how far
such ties can move the answer to an image is measured with the ONNX file, see ``shaken``; an image that differs is
allowed twice as much on top, since both of its runs may have decided otherwise. Such an image is counted as tied.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..profile import Profile

BEYOND = sys.float_info.max  # stands for a difference that is no number, which JSON does not have
# What each check finds, in the order in which they are told
CHECKS = {
    "finite": "images get NaN, infinity or no answer",
    "alone": "an image gets another answer among others than alone",
    "identical rows": "rows with the same image get different answers",
    "permuted rows": "an image gets another answer when the rows change places",
    "poisoned rows": "NaN or infinity in one row reaches other rows",
    "second session": "a second session of the engine gives other answers",
    "second process": "another process gives other answers",
    "unfused": "the graph as it is written, with nothing fused, gives other answers",
    "repeated": "the same batch gets other answers after other batches",
}


DYNAMIC = "dynamic int8"  # of ONNX Runtime's CPU provider, see export.int8


class Limit(NamedTuple):
    """How far two answers to one image may lie apart.

    Attributes:
        output: largest difference, as a share of the largest answer (at least 1).
        score: how far two scores may lie apart and change places all the same, as a share of the range of scores.
    """

    output: float
    score: float


# By the arithmetic inside. fp32: as between ONNX Runtime and torch, see export.parity. tf32 and fp16 keep 11 bits of a
# number instead of 24 at every step, and bf16 keeps 8. int8 rounds to steps that may depend on all rows of a batch.
# Seen on two x86 cores with DeiT-S shapes and random weights, dense and with EViT or ToMe, as shares of the largest
# answer: up to 7e-7 in fp32 and 5e-3 in fp16 (ONNX Runtime), 3e-2 in bf16 (OpenVINO), 5e-2 in int8 (dynamic).
LIMITS = {
    "fp32": Limit(1e-4, 1e-4),
    "tf32": Limit(2e-2, 2e-2),
    "fp16": Limit(2e-2, 2e-2),
    "bf16": Limit(1e-1, 1e-1),
    "int8": Limit(2e-1, 2e-1),
    DYNAMIC: Limit(2e-1, 2e-1),
}


def arithmetic(precision: str, runtime: str, options: Mapping[str, Any]) -> str:
    """The key of ``LIMITS`` for an engine of ``precision``: some devices compute fp32 with fewer bits.

    Args:
        precision: of the file.
        runtime: as a profile names it.
        options: as ``Backend.load`` takes them.
    """
    provider = "tensorrt" if runtime.startswith("tensorrt") else str(options.get("provider", "cpu")).lower()
    if precision == "int8" and runtime == "onnxruntime" and provider.startswith("cpu"):
        return DYNAMIC
    if precision != "fp32" or provider.startswith(("cpu", "openvino")):  # OpenVINO is told what to compute in
        return precision
    return "fp32" if str(options.get("provider_options", {}).get("use_tf32")) in ("0", "False") else "tf32"


class Shape(NamedTuple):
    """Images of a batch, and their height and width in pixels."""

    batch: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Served:
    """The shapes that an engine must take.

    Attributes:
        least, usual, most: batch sizes.
        sizes: heights and widths in pixels: the model's own, then the smallest and the largest where they are free.
    """

    least: int
    usual: int
    most: int
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, profile: Profile, image_size: tuple[int, int]) -> Served:
        """What ``profile`` serves with a model whose own size is ``image_size``."""
        batch, sizes = profile.input.batch, [image_size]
        sides = [profile.input.dynamic_height, profile.input.dynamic_width]
        for end in ("min", "max") if any(sides) else ():
            height, width = (getattr(side, end) if side else own for side, own in zip(sides, image_size, strict=True))
            sizes.append((height, width))
        return cls(batch.min, batch.opt, batch.max, tuple(sizes))

    def shapes(self) -> list[Shape]:
        """The ends of what is served, the usual batch, and an odd one in each gap between these."""
        ends, own = [self.least, self.usual, self.most], self.sizes[0]
        gaps = [(ends[0], ends[1]), (ends[1], ends[2])]
        odd = [(math.isqrt(low * high) | 1, low, high) for low, high in gaps]
        found = [Shape(n, own) for n in sorted({*ends, *(n for n, low, high in odd if low < n < high)})]
        if len(self.sizes) > 1:
            found += [Shape(self.least, self.sizes[1]), Shape(self.most, self.sizes[-1])]
        return found


@dataclass(frozen=True)
class Case:
    """What a check saw at one shape.

    Attributes:
        shape: the batch.
        rows: rows that were looked at.
        wrong: those of them that are wrong.
        max_abs: largest difference of a row, ties left out; None where nothing was compared.
        limit: largest difference that is allowed without a tie.
        ties: rows that differ by more, and by no more than nearly equal scores explain.
        error: what the engine said in place of an answer.
    """

    shape: Shape
    rows: int
    wrong: int
    max_abs: float | None = None
    limit: float | None = None
    ties: int = 0
    error: str = ""


@dataclass(frozen=True)
class Check:
    """One of ``CHECKS`` at all shapes, or in ``skipped`` why it could not be made."""

    name: str
    cases: tuple[Case, ...]
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """No row was wrong at any shape."""
        return not any(case.wrong for case in self.cases)

    def reason(self) -> str:
        """What is wrong, at which batches, and how far at worst."""
        failed = [case for case in self.cases if case.wrong]
        worst = max(failed, key=lambda case: (case.max_abs or 0.0, case.wrong / case.rows))
        several = len({case.shape.size for case in self.cases}) > 1
        batches = ", ".join(dict.fromkeys(_words(case.shape, several) for case in failed))
        how = f", in {worst.wrong} of {worst.rows} rows"
        if worst.max_abs is not None:
            most = f"up to {worst.max_abs:.3g}" if worst.max_abs < BEYOND else "NaN or infinity"
            how += f" by {most} where {worst.limit:.3g} is allowed"
        if worst.error:
            how = f": {worst.error}"
        return f"check '{self.name}' at batch {batches}: {CHECKS[self.name]}{how}; do not use this engine"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; differences are the worst over all shapes."""
        apart = [case.max_abs for case in self.cases if case.max_abs is not None]
        limits = [case.limit for case in self.cases if case.limit is not None]
        return {
            "name": self.name,
            "passed": self.passed,
            "batches": sorted({case.shape.batch for case in self.cases}),
            "max_abs": max(apart) if apart else None,
            "limit": min(limits) if limits else None,
            "rows": sum(case.rows for case in self.cases),
            "wrong": sum(case.wrong for case in self.cases),
            "ties": sum(case.ties for case in self.cases),
            "skipped": self.skipped or None,
        }


@dataclass(frozen=True)
class Consistency:
    """All checks of one engine; ``arithmetic`` is the key of ``LIMITS`` that they went by."""

    arithmetic: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Every check that could be made has passed."""
        return all(check.passed for check in self.checks)

    def reasons(self) -> tuple[str, ...]:
        """A sentence for each check that failed."""
        return tuple(check.reason() for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest and the report."""
        checks = [check.to_dict() for check in self.checks]
        return {"arithmetic": self.arithmetic, "passed": self.passed, "checks": checks}


def check_row(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Name, batches, largest difference, largest allowed, and result of a check, from what ``Check.to_dict`` gives."""
    if found["skipped"]:
        return (found["name"], "-", "-", "-", f"not made: {found['skipped']}")
    far, limit = ("-" if found[key] is None else f"{found[key]:.3g}" for key in ("max_abs", "limit"))
    result = "passed" if found["passed"] else f"failed in {found['wrong']:,} of {found['rows']:,} rows"
    ties = f", {found['ties']:,} tied" if found["ties"] else ""
    return (found["name"], ", ".join(map(str, found["batches"])), far, limit, result + ties)


def _words(shape: Shape, several: bool) -> str:
    """The batch, with the image size where there are several."""
    return f"{shape.batch} of {shape.size[0]} x {shape.size[1]} pixels" if several else str(shape.batch)
