"""Checkpoints as the authors of token methods publish them: the model, and the method's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from . import parts
from .model.timm import Converted, from_timm
from .tokens.base import Reducer


class Official(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        converted: the model without the token method, and what timm knows of its images.
        method_weights: those of the token method, as ``surgery.prune`` and ``reduce_tokens`` take them.
    """

    converted: Converted
    method_weights: dict[str, Tensor]


def from_official(method: str, name: str, checkpoint: Path, **model_args: Any) -> Official:
    """The model of ``checkpoint``, a file of the authors of ``method``; timm calls its architecture ``name``.

    Raises:
        InputError: there is no such method, or the checkpoint is none of it, or of another architecture.
        DamagedFile: the checkpoint is cut off.
    """
    kind = parts.load("vitprune.tokens", method, Reducer)  # type: ignore[type-abstract]
    own: dict[str, Tensor] = {}

    def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        backbone, found = kind.official(weights)
        own.update(found)
        return backbone

    arguments = {**kind.official_args, **model_args}
    return Official(from_timm(name, checkpoint=checkpoint, to_timm=to_timm, **arguments), own)
