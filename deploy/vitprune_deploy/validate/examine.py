"""Puts an engine to the checks of ``consistency``: each image alone and among others, the rows of a batch all alike and
in reverse order, beside rows of NaN and of infinity, in a second session, in a second process, in the graph as it is
written, and once more after all that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np

from vitprune.errors import VitpruneError

from ..backends.base import Backend
from .consistency import BEYOND, CHECKS, DYNAMIC, LIMITS, Case, Check, Consistency, Limit, Served, Shape

FEW = 8  # images that the rows of all batches are taken from
MOST_TEXT = 300  # characters of what a runtime says in place of an answer

Answers = Callable[[np.ndarray], np.ndarray]  # from batches [n, B, C, H, W] to what they get, [n, B, ...]


@dataclass(frozen=True)
class Subject:
    """An engine, by what can be done with it; ``subjects.subject`` makes it of a file.

    Attributes:
        open: loads it anew; whoever calls closes it.
        apart: begins to run batches [n, B, C, H, W] in another process, which ends with the context; its value waits
            for the answers, [n, B, ...], and raises RuntimeError if none come.
        unfused: loads the same network with nothing fused; or a sentence why that cannot be.
        moves: how far noise on all scores, a share of their range, moves the answers to images [M, C, H, W]: [M].
    """

    open: Callable[[], Backend]
    apart: Callable[[np.ndarray], AbstractContextManager[Callable[[], np.ndarray]]]
    unfused: Callable[[], Backend] | str
    moves: Callable[[np.ndarray, float], np.ndarray]


def check_consistency(subject: Subject, images: np.ndarray, served: Served, computes: str = "fp32") -> Consistency:
    """Run all checks on an engine.

    Args:
        subject: the engine.
        images: a few, as the model wants them: float32 [M, C, H, W].
        served: the shapes to check at.
        computes: the key of ``LIMITS`` to go by.

    Raises:
        MissingError: the engine does not load; or answers differ, and what it takes to tell a tie from a fault is not
            installed.
    """
    fitted = {size: _fitted(images, size) for size in served.sizes}
    record = _Record(LIMITS[computes], subject.moves, fitted, shares_scales=computes == DYNAMIC)
    usual = Shape(served.usual, served.sizes[0])
    which = np.arange(usual.batch * math.ceil(len(images) / usual.batch)) % len(images)
    batches = record.images[usual.size][which.reshape(-1, usual.batch)]
    with subject.open() as engine, ExitStack() as stack:
        answers = _of(engine)
        before = record.ask("finite", usual, answers, batches)
        waits = None if before is None else stack.enter_context(subject.apart(batches))  # it works while we do
        for size in served.sizes:
            _ask_alone(answers, record, Shape(served.least, size))
        for shape in served.shapes():
            _check_shape(answers, record, shape)
        _check_flat(answers, record, Shape(served.least, usual.size))
        if waits is not None:
            found = {"second process": record.ask("second process", usual, lambda _: waits(), batches)}
            found["second session"] = _ask_anew(subject.open, "second session", record, usual, batches)
            found["unfused"] = _ask_anew(subject.unfused, "unfused", record, usual, batches)
            found["repeated"] = record.ask("repeated", usual, answers, batches)
            for name, after in found.items():
                record.compare(name, usual, after, before, which)
    nothing = "one image is served at a time" if served.most == 1 else "there was no answer to compare"
    return Consistency(computes, record.checks(nothing))


class _Record:
    """What the checks have seen.

    Attributes:
        images: [M, C, H, W] by height and width.
        alone: the answer to each of these with nothing beside it but copies, [M, outputs]; None: it got none.
        shares_scales: the engine finds scales from whole batches, by design.
    """

    def __init__(
        self,
        limit: Limit,
        moves: Callable[[np.ndarray, float], np.ndarray],
        images: Mapping[tuple[int, int], np.ndarray],
        shares_scales: bool,
    ) -> None:
        self.images, self.shares_scales = images, shares_scales
        self.alone: dict[tuple[int, int], np.ndarray | None] = {}
        self._limit, self._moves = limit, moves
        self._moved: dict[tuple[int, int], np.ndarray] = {}
        self._cases: dict[str, list[Case]] = {name: [] for name in CHECKS}
        self._skipped: dict[str, str] = {}

    def ask(self, name: str, shape: Shape, answers: Answers, batches: np.ndarray) -> np.ndarray | None:
        """What ``batches`` [n, B, C, H, W] get, [n * B, outputs]; None, and a case of the check, if that is nothing."""
        try:
            found = np.asarray(answers(batches))
        except Exception as error:  # those of the runtimes share no base
            self._refused(name, shape, " ".join(str(error).split())[:MOST_TEXT] or type(error).__name__)
            return None
        if found.shape[:2] != batches.shape[:2]:
            self._refused(name, shape, f"a batch of {shape.batch} gets an answer of shape {list(found.shape[1:])}")
            return None
        return found.astype(np.float32).reshape(found.shape[0] * found.shape[1], -1)

    def finite(self, shape: Shape, answers: np.ndarray) -> bool:
        """Count those of ``answers`` [B, outputs] that are no numbers; whether there are none."""
        broken = ~np.isfinite(answers).all(axis=1)
        self._cases["finite"].append(Case(shape, len(answers), int(broken.sum())))
        return not broken.any()

    def compare(
        self, name: str, shape: Shape, got: np.ndarray | None, want: np.ndarray | None, which: np.ndarray
    ) -> None:
        """Count those of the answers ``got`` [B, outputs] that are not ``want``; they are to the images ``which`` [B].

        Where either is None nothing is counted: that there was no answer has been noted.
        """
        if got is None or want is None:
            return
        apart, limit = _apart(got, want), self._limit.output * max(1.0, _largest(want))
        over = apart > limit
        tied = over & (apart <= limit + 2 * self._ties(shape.size)[which]) if over.any() else over
        worst = min(float(apart[~tied].max(initial=0.0)), BEYOND)
        self._cases[name].append(Case(shape, len(apart), int((over & ~tied).sum()), worst, limit, int(tied.sum())))

    def skip(self, name: str, why: str) -> None:
        """A check that cannot be made."""
        self._skipped[name] = why

    def checks(self, nothing: str) -> tuple[Check, ...]:
        """All of them, in the order of ``CHECKS``; ``nothing`` says why one has seen nothing."""
        skipped = {name: "" if cases else self._skipped.get(name, nothing) for name, cases in self._cases.items()}
        return tuple(Check(name, tuple(cases), skipped[name]) for name, cases in self._cases.items())

    def _refused(self, name: str, shape: Shape, error: str) -> None:
        self._cases[name].append(Case(shape, shape.batch, shape.batch, error=error))

    def _ties(self, size: tuple[int, int]) -> np.ndarray:
        """How far nearly equal scores can move the answer to each image, [M]; found out when first asked for."""
        if size not in self._moved:
            self._moved[size] = self._moves(self.images[size], self._limit.score)
        return self._moved[size]


def _ask_alone(answers: Answers, record: _Record, shape: Shape) -> None:
    """Note the answer to each image alone: in the least batch, which copies of it fill."""
    batches = np.repeat(record.images[shape.size][:, None], shape.batch, axis=1)
    found = record.ask("finite", shape, answers, batches)
    record.alone[shape.size] = None if found is None else found[:: shape.batch]
    if found is not None:
        record.finite(shape, found)


def _check_shape(answers: Answers, record: _Record, shape: Shape) -> None:
    """The checks that one session can be put to, at one shape."""
    pool, alone = record.images[shape.size], record.alone[shape.size]
    which = np.arange(shape.batch) % len(pool)
    mixed = record.ask("finite", shape, answers, pool[which][None])
    if mixed is None or not record.finite(shape, mixed) or shape.batch == 1:
        return
    record.compare("alone", shape, mixed, None if alone is None else alone[which], which)
    alike = record.ask("identical rows", shape, answers, np.repeat(pool[None, :1], shape.batch, axis=1))
    record.compare("identical rows", shape, alike, None if alike is None else alike[:1], np.zeros_like(which))
    turned = record.ask("permuted rows", shape, answers, pool[which[::-1]][None])
    record.compare("permuted rows", shape, turned, mixed[::-1], which[::-1])

    if record.shares_scales:
        record.skip("poisoned rows", "one scale serves a whole batch in dynamic int8, so NaN in an image reaches all")
        return
    rows, clean = pool[which], np.arange(1, shape.batch - (shape.batch > 2))
    rows[0] = np.nan
    if shape.batch > 2:
        rows[-1] = np.inf
    beside = record.ask("poisoned rows", shape, answers, rows[None])
    record.compare("poisoned rows", shape, None if beside is None else beside[clean], mixed[clean], which[clean])


def _check_flat(answers: Answers, record: _Record, shape: Shape) -> None:
    """Images of one colour get numbers too: of the least and the largest value that occurs, and of one between."""
    pool = record.images[shape.size]
    values = np.linspace(pool.min(), pool.max(), 3, dtype=pool.dtype)
    flat = np.ones_like(pool[:1, None]) * values[:, None, None, None, None]
    found = record.ask("finite", shape, answers, np.repeat(flat, shape.batch, axis=1))
    if found is not None:
        record.finite(shape, found)


def _ask_anew(
    opens: Callable[[], Backend] | str, name: str, record: _Record, shape: Shape, batches: np.ndarray
) -> np.ndarray | None:
    """What ``batches`` get in a session that ``opens``; None where there is none."""
    if isinstance(opens, str):
        record.skip(name, opens)
        return None
    try:
        with opens() as engine:
            return record.ask(name, shape, _of(engine), batches)
    except VitpruneError as error:  # the runtime does not take the graph so, or has no memory for a second one
        record.skip(name, str(error))
        return None


def _of(engine: Backend) -> Answers:
    """The answers of a loaded engine."""
    dtype = np.dtype(engine.inputs[0].dtype)
    return lambda batches: np.stack([engine.run(np.ascontiguousarray(batch.astype(dtype))) for batch in batches])


def _fitted(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``images`` [M, C, H, W] cut to ``size``, or repeated up to it: any content serves."""
    height, width = size
    tiles = (1, 1, math.ceil(height / images.shape[2]), math.ceil(width / images.shape[3]))
    return np.tile(images, tiles)[:, :, :height, :width]


def _apart(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Largest difference of each row, [B]; NaN and infinity are equal to themselves and infinitely far from others."""
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(same, 0.0, np.abs(got - want))
    return np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(axis=1)


def _largest(answers: np.ndarray) -> float:
    """Largest magnitude among those that are numbers; 0 if none is."""
    return float(np.abs(answers[np.isfinite(answers)]).max(initial=0.0))
