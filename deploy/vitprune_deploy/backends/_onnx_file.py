"""What an ONNX file says of itself, read without the package onnx, which a device need not have.

Of a protobuf message only the lengths of its fields have to be known to step over them: the weights are never read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..files import sha256_file

PREFIX = "vitprune."
GRAPH, METADATA_PROPS = 7, 14  # numbers of fields in ModelProto
INPUT = 11  # in GraphProto
KEY, VALUE = 1, 2  # in StringStringEntryProto
NAME, TO_SHAPE = 1, (2, 1, 2)  # of ValueInfoProto: its name, and the way to its shape
DIM, DIM_VALUE, DIM_PARAM = 1, 1, 2  # in TensorShapeProto and in its dimensions
# what two files have in common that differ in their weights alone
STRUCTURE = ("precision", "tokens", "heads", "mlp", "plan_sha256", "weights")


def metadata(path: Path) -> dict[str, str]:
    """The metadata that our exporter wrote, their keys without its prefix; none where the file is no ONNX file."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        for entry in _fields(file, METADATA_PROPS):
            parts = [next(_fields(io.BytesIO(entry), part), b"").decode(errors="replace") for part in (KEY, VALUE)]
            if parts[0].startswith(PREFIX):
                found[parts[0][len(PREFIX) :]] = parts[1]
    return found


def axes(path: Path) -> dict[str, tuple[int | str, ...]]:
    """The shape of each input by its name; a name stands for a size that is free. Empty where it is no ONNX file."""
    found: dict[str, tuple[int | str, ...]] = {}
    with path.open("rb") as file:
        for start, length in _spans(file, GRAPH):
            for place, size in list(_spans(file, INPUT, start, start + length)):
                file.seek(place)
                value = file.read(size)
                found[_first(value, NAME).decode(errors="replace")] = _shape(value)
    return found


def _shape(value: bytes) -> tuple[int | str, ...]:
    """The sizes in a ValueInfoProto."""
    for step in TO_SHAPE:
        value = _first(value, step)
    dims = [_part(value, place, size) for place, size in _spans(io.BytesIO(value), DIM)]
    return tuple(_first(dim, DIM_PARAM).decode(errors="replace") or _number(dim) for dim in dims)


def _part(message: bytes, start: int, length: int) -> bytes:
    return message[start : start + length]


def _first(message: bytes, wanted: int) -> bytes:
    """The first field of that number which holds bytes; empty where there is none."""
    return next((_part(message, *span) for span in _spans(io.BytesIO(message), wanted)), b"")


def _number(dim: bytes) -> int:
    """``dim_value`` of a dimension; 0 where it has none."""
    file = io.BytesIO(dim)
    return (_varint(file) or 0) if _varint(file) == DIM_VALUE << 3 else 0


def structure(path: Path) -> dict[str, Any]:
    """The metadata that another file must share for its weights to fit an engine made from this one."""
    return {key: value for key, value in metadata(path).items() if key in STRUCTURE}


def weights(path: Path) -> dict[str, int]:
    """How many of the weights are in which number format, as the exporter counted them; empty where it did not."""
    try:
        return dict(json.loads(metadata(path).get("weights", "{}")))
    except (ValueError, TypeError):  # of another exporter that uses our prefix
        return {}


def identity(path: Path) -> dict[str, Any]:
    """Name and SHA-256 of the file, and of those beside it that hold its weights."""
    beside = sorted(file for file in path.parent.glob(f"{path.name}.data*") if file.is_file())
    return {
        "name": path.name,
        "sha256": sha256_file(path),
        "external_data": {file.name: sha256_file(file) for file in beside},
    }


def _fields(file: BinaryIO, wanted: int) -> Iterator[bytes]:
    """The fields of number ``wanted`` that hold bytes; a file that is cut off or no message just ends."""
    for start, length in _spans(file, wanted):
        file.seek(start)
        yield file.read(length)


def _spans(file: BinaryIO, wanted: int, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Where the fields of number ``wanted`` that hold bytes begin in a message, and how long they are."""
    end, place = file.seek(0, io.SEEK_END) if end is None else end, start
    while place < end:
        file.seek(place)
        key = _varint(file)
        kind = -1 if key is None else key & 7
        length = {0: 0, 1: 8, 5: 4}.get(kind) if kind != 2 else _varint(file)
        if length is None or length > end - file.tell():
            return
        if kind == 0:
            _varint(file)
        elif key == wanted << 3 | 2:
            yield file.tell(), length
            file.seek(place)  # whoever reads it has moved on
            _varint(file), _varint(file)
        place = file.tell() + length


def _varint(file: BinaryIO) -> int | None:
    """A number of seven bits a byte, the lowest first; None where there is none."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
