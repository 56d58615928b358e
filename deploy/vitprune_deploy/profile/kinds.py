"""Kinds of values that several keys of a profile share, with their ranges."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from vitprune import parts

from .tree import show

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]
Seconds = Annotated[float, Field(gt=0, le=1e8)]
Percent = Annotated[float, Field(gt=1, le=100)]
Precision = Literal["fp32", "fp16", "bf16"]

# A path in a profile is relative to the file in which it stands; the reader makes it absolute.
ProfilePath = Annotated[str, Field(min_length=1, json_schema_extra={"format": "path"})]


def _part(package: str, *others: str) -> Any:
    """A validator: the value is the name of a file in ``package``, or one of ``others``."""

    def check(name: str) -> str:
        known = [*others, *parts.names(package)]
        if name in known:
            return name
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"must be one of {', '.join(known)}, got {show(name)}{hint}")

    return AfterValidator(check)


def one_shape(pattern: str, wish: str) -> Any:
    """A validator: the text fits ``pattern`` as a whole."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text, re.ASCII) is None:
            raise ValueError(f"must be {wish}, got {show(text)}")
        return text

    return AfterValidator(check)


def _compute_capability(value: object) -> object:
    """YAML reads an unquoted 8.7 as a number."""
    return str(value) if isinstance(value, float) else value


_VERSION = r"(>=|<=|==|!=|~=|<|>)\d+(\.\d+)*(\.\*)?"
ComputeCapability = Annotated[
    str,
    one_shape(r"\d{1,2}\.\d", "a compute capability such as 8.7"),
    BeforeValidator(_compute_capability, json_schema_input_type=str | float),
]
VersionRange = Annotated[str, one_shape(rf"{_VERSION}(, ?{_VERSION})*", "versions such as '>=10.3,<10.4'")]
TokenMethod = Annotated[str, _part("vitprune.tokens", "auto", "none")]
OneTokenMethod = Annotated[str, _part("vitprune.tokens")]
StructureMethod = Annotated[str, _part("vitprune.structure")]
WeightMethod = Annotated[str, _part("vitprune.weights", "none")]
Criterion = Annotated[str, _part("vitprune.criteria")]
# one file serves both: TensorRT-RTX is TensorRT under another package name
RuntimeName = Annotated[str, _part("vitprune_deploy.backends", "tensorrt-rtx")]


def _square(value: object) -> object:
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list) else value


ImageSize = Annotated[
    tuple[Pixels, Pixels], BeforeValidator(_square, json_schema_input_type=Pixels | tuple[Pixels, Pixels])
]
