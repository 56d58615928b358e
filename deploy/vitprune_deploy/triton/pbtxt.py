"""Protocol buffers' text format, as far as a model configuration needs it; written without the package protobuf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class Word(str):
    """A value that is written without quotes: a name of an enumeration."""

    __slots__ = ()


def to_text(message: Mapping[str, Any], indent: str = "") -> str:
    """``message`` in the text format: mappings are messages, lists are repeated fields."""
    return "".join(line for key, value in message.items() for line in _field(key, value, indent))


def entries(mapping: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A map field, which the text format writes as repeated messages."""
    return [{"key": key, "value": value} for key, value in mapping.items()]


def _field(key: str, value: Any, indent: str) -> Iterable[str]:
    """Lines of one field."""
    if isinstance(value, Mapping):
        yield f"{indent}{key} {{\n{to_text(value, indent + '  ')}{indent}}}\n"
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for one in value:
            yield from _field(key, one, indent)
    elif isinstance(value, list):
        yield f"{indent}{key}: [{', '.join(map(_scalar, value))}]\n"
    else:
        yield f"{indent}{key}: {_scalar(value)}\n"


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Word | int):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
