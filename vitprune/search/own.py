"""The searches of counts that token methods' authors made, behind one name: ``own-0.65`` in a profile."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ..errors import InputError
from ..macs import macs
from ..model.vit import Vit
from ..recover import Batch, Progress
from ..schedules import Found
from . import diffrate, psvit

NAME = re.compile(r"own-(\d+(?:\.\d+)?)")
# Less than a tenth of the authors' steps, with ten times their learning rate: theirs see ImageNet three times
SHORT = diffrate.RateSettings(steps=300, lr=0.1, last_lr=0.01)
BATCH = 32


class OwnSearch(NamedTuple):
    """A search as a profile asks for it.

    Attributes:
        number: what the number behind ``own-`` is, above 0 and below 1.
        run: from a dense model, calibration images [M, channels, height, width] and the number to what it finds.
    """

    number: str
    run: Callable[[Vit, Tensor, float, Progress | None], Found]


def own_number(schedule: object) -> float | None:
    """The number of ``own-NUMBER``; None: ``schedule`` is something else."""
    found = NAME.fullmatch(schedule) if isinstance(schedule, str) else None
    return float(found[1]) if found else None


def check_own(method: str, number: float) -> None:
    """Raise InputError where the token method ``method`` has no search of its own, or none that takes ``number``."""
    if method not in SEARCHES:
        known = " and ".join(f"{name} (own-NUMBER: {search.number})" for name, search in SEARCHES.items())
        raise InputError(f"{method} has no search of its own, only {known}; leave the schedule out for ours")
    if not 0 < number < 1:
        raise InputError(
            f"own-{number:g}: the number of {method}'s own search is {SEARCHES[method].number}, above 0 and below 1"
        )


def search_own(method: str, model: Vit, images: Tensor, number: float, progress: Progress | None = None) -> Found:
    """What the search of its authors finds for the token method ``method``.

    Args:
        model: a dense model, on the device to search on; it stays as it is.
        images: calibration images [M, channels, height, width].
        number: for diffrate the share of the model's multiply-accumulates that is to be left, for psvit the error that
            each block may have.

    Raises:
        InputError: as ``check_own``.
        NotSupported: the method cannot act on the model.
    """
    check_own(method, number)
    return SEARCHES[method].run(model, images, number, progress)


def _diffrate(model: Vit, images: Tensor, share: float, progress: Progress | None) -> Found:
    dense_macs = macs(model.config)
    # the authors' unit is a quarter of DeiT-S; operations of a smaller model would weigh nothing in it
    settings = replace(SHORT, unit_macs=min(SHORT.unit_macs, dense_macs / 4))
    return diffrate.search_counts(
        model, lambda epoch: map(Batch, images.split(BATCH)), share * dense_macs, settings, progress=progress
    )


def _psvit(model: Vit, images: Tensor, tolerance: float, progress: Progress | None) -> Found:
    return psvit.search_counts(model, images, tolerance, progress=progress)


SEARCHES = {
    "diffrate": OwnSearch("the share of the operations that is to be left", _diffrate),
    "psvit": OwnSearch("the error that each block may have, such as 0.01", _psvit),
}
