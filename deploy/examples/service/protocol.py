"""The messages of KServe's v2 inference protocol, with its extensions for binary tensors and for classification.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and, for the extensions,
https://github.com/triton-inference-server/server/tree/main/docs/protocol. One input and one output.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

HEADER = "inference-header-content-length"  # bytes of JSON in front of binary tensors


class Refused(Exception):
    """A request that is answered with an error: an HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Parameters(BaseModel):
    """Parameters that are known here, of a request, an input or an output; others are let be."""

    binary_data_size: Annotated[int, Field(ge=0)] | None = None
    binary_data: bool | None = None
    binary_data_output: bool = False
    classification: Annotated[int, Field(ge=1)] | None = None


class Input(BaseModel):
    """A tensor, whose numbers stand in ``data`` or behind the JSON."""

    name: str
    datatype: str
    shape: list[Annotated[int, Field(ge=0)]]
    parameters: Parameters = Parameters()
    data: list[Any] | None = None


class Output(BaseModel):
    """An output that is asked for, and in which form."""

    name: str
    parameters: Parameters = Parameters()


class Request(BaseModel):
    """What a client asks for."""

    id: str | None = None
    inputs: Annotated[list[Input], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[Output], Field(max_length=1)] = []
    parameters: Parameters = Parameters()


def read(body: bytes, header: str | None) -> tuple[Request, memoryview]:
    """The request in ``body``, and the binary data behind it.

    Args:
        header: value of the HTTP header ``HEADER``, if there is one.

    Raises:
        Refused: it is no such request.
    """
    if header is not None and not (re.fullmatch("[0-9]{1,15}", header) and int(header) <= len(body)):
        raise Refused(400, f"{HEADER} must be a number of bytes up to the body's {len(body)}, got {header!r}")
    end = len(body) if header is None else int(header)
    try:
        return Request.model_validate_json(body[:end]), memoryview(body)[end:]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise Refused(400, f"the request is wrong at {place or 'its start'}: {first['msg']}") from None


def tensor(given: Input, binary: memoryview, shape: Sequence[int]) -> np.ndarray:
    """The input as float32 [B, *shape].

    Raises:
        Refused: it has another shape, is cut off, or is not made of numbers.
    """
    if given.shape[1:] != list(shape):
        raise Refused(400, f"input {given.name} must have the shape {['images', *shape]}, got {given.shape}")
    if given.parameters.binary_data_size is not None:
        _check_size(given, binary, 4 * math.prod(given.shape))
        values = np.frombuffer(binary, "<f4").astype(np.float32)
    else:
        values = _numbers(given)
    if not np.isfinite(values).all():
        raise Refused(400, f"input {given.name} holds NaN or numbers beyond float32")
    return values.reshape(given.shape)


def blobs(given: Input, binary: memoryview) -> list[bytes]:
    """The input as B pieces of bytes, which come as binary data alone: JSON holds no bytes.

    Raises:
        Refused: it is not of that form, or is cut off.
    """
    if len(given.shape) != 1 or given.parameters.binary_data_size is None:
        raise Refused(400, f"input {given.name} as BYTES must have the shape ['images'] and come as binary data")
    _check_size(given, binary, len(binary))
    found, start = [], 0
    for _ in range(given.shape[0]):
        if start + 4 > len(binary):
            raise Refused(400, f"input {given.name} is cut off: fewer than {given.shape[0]} pieces came")
        (size,) = struct.unpack_from("<I", binary, start)
        found.append(bytes(binary[start + 4 : start + 4 + size]))
        start += 4 + size
    if start != len(binary):
        raise Refused(400, f"input {given.name}: its pieces end at byte {start}, and {len(binary)} came")
    return found


def answer(
    request: Request, model: str, version: str, name: str, outputs: np.ndarray, classes: Sequence[str] | None
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the answer, in the form that the request asks for.

    Args:
        name: of the output.
        outputs: float32 [B, classes].
        classes: names of the classes, if they are known.
    """
    wanted = request.outputs[0].parameters if request.outputs else Parameters()
    binary = request.parameters.binary_data_output if wanted.binary_data is None else wanted.binary_data
    values: Any = outputs
    if wanted.classification is not None:
        values = [_ranked(row, wanted.classification, classes) for row in outputs]
    shape = [len(values), len(values[0])]
    described: dict[str, Any] = {"name": name, "datatype": "FP32" if values is outputs else "BYTES", "shape": shape}
    whole = {"model_name": model, "model_version": version, "outputs": [described]}
    whole |= {} if request.id is None else {"id": request.id}
    if not binary:
        described["data"] = np.ravel(values).tolist()
        return json.dumps(whole, allow_nan=False).encode(), {"content-type": "application/json"}
    raw = outputs.astype("<f4").tobytes() if values is outputs else b"".join(map(_blob, np.ravel(values).tolist()))
    described["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps(whole).encode()
    return head + raw, {"content-type": "application/octet-stream", HEADER: str(len(head))}


def _check_size(given: Input, binary: memoryview, wanted: int) -> None:
    said = given.parameters.binary_data_size
    if not said == wanted == len(binary):
        raise Refused(
            400, f"input {given.name} takes {wanted} bytes, its binary_data_size is {said}, and {len(binary)} came"
        )


def _numbers(given: Input) -> np.ndarray:
    """The input's ``data``, which may be nested, as float32 [values]."""
    try:
        found = np.asarray(given.data)
    except ValueError:  # lists of different lengths
        found = np.empty(0, object)
    if found.dtype.kind not in "iuf" or found.size != math.prod(given.shape):
        raise Refused(400, f"input {given.name} needs {math.prod(given.shape)} numbers in data")
    with np.errstate(over="ignore"):
        return found.astype(np.float32).ravel()


def _ranked(row: np.ndarray, count: int, classes: Sequence[str] | None) -> list[str]:
    """The ``count`` largest values of ``row`` as 'value:index:label'."""
    best = np.argsort(-row, kind="stable")[:count]
    return [":".join([f"{row[i]:f}", str(i), *([] if classes is None else [classes[i]])]) for i in best]


def _blob(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw
