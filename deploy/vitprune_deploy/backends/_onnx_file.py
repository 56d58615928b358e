"""What an ONNX file says of itself, read without the package onnx, which a device need not have.

Of a protobuf message only the lengths of its fields have to be known to step over them: the weights are never read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..artifact import sha256_file

PREFIX = "vitprune."
METADATA_PROPS = 14  # the field's number in ModelProto
KEY, VALUE = 1, 2  # in StringStringEntryProto
# what two files have in common that differ in their weights alone
STRUCTURE = ("precision", "tokens", "heads", "mlp", "plan_sha256", "weights")


def metadata(path: Path) -> dict[str, str]:
    """The metadata that our exporter wrote, their keys without its prefix; none where the file is no ONNX file."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        for entry in _fields(file, METADATA_PROPS):
            parts = [next(_fields(io.BytesIO(entry), part), b"").decode(errors="replace") for part in (KEY, VALUE)]
            if parts[0].startswith(PREFIX):
                found[parts[0].removeprefix(PREFIX)] = parts[1]
    return found


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
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    while (key := _varint(file)) is not None:
        kind = key & 7
        length = {0: 0, 1: 8, 5: 4}.get(kind) if kind != 2 else _varint(file)
        if length is None or length > size - file.tell():
            return
        if kind == 0:
            _varint(file)
        elif key == wanted << 3 | 2:
            yield file.read(length)
        else:
            file.seek(length, io.SEEK_CUR)


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
