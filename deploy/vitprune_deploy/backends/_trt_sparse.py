"""2:4 weights in an engine: which layers may use them, and in which the builder took a sparse kernel.

TensorRT may compute a product on two of every four weights along its inputs, if the builder is allowed to, and does so
where that was the faster when it timed both. So three things are told apart: the layers of the network whose weights
have the pattern, those that the builder's log calls eligible, and those with a sparse kernel, by the log or by the
inspector. A speed-up is believed of the last alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ._trt_common import Refused

GROUP, MOST = 4, 2  # of four neighbours along the inputs, at most two are not zero
FLAG = "SPARSE_WEIGHTS"
# TensorRT 8 'Layers eligible for sparse math: a, b', later ones 'Found 2 layer(s) eligible to use sparse tactics: a, b'
LINES = {
    "eligible": r"Layers eligible for sparse math:?(?P<names>.*)|"
    r"Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics:?(?P<later>.*)",
    "used": r"picked sparse implementation for layers:?(?P<names>.*)|"
    r"Chose (?P<count>\d+) layer\(s\) using sparse tactics:?(?P<later>.*)",
}
KERNEL = re.compile(r"sparse|spmma", re.IGNORECASE)  # in the names of kernels
THROUGH = ("QUANTIZE", "DEQUANTIZE", "CAST", "IDENTITY")  # what leaves a zero a zero, and in its place


def allow(trt: Any, config: Any) -> str:
    """Let the builder use sparse kernels; the name of the flag."""
    if FLAG not in trt.BuilderFlag.__members__:
        raise Refused("input", f"{trt.__version__} has no {FLAG}; leave the pattern 2:4 out, or use another TensorRT")
    config.set_flag(trt.BuilderFlag.__members__[FLAG])
    return FLAG


def account(
    lines: Iterable[str], fitting: Sequence[str] | None = None, inspection: str | None = None
) -> dict[str, Any]:
    """What the sidecar says of an engine that was allowed sparse kernels.

    Keys: ``fitting``, names of the layers whose weights have the pattern, None where nobody looked; ``eligible`` and
    ``used``, how many layers the builder says are so, None where it says nothing; ``names`` of those that are used, as
    far as they are known; ``proof`` of their number: 'log', 'inspector', or None.

    Args:
        lines: of the builder's log.
        fitting: see ``fitting_layers``.
        inspection: an engine inspector's JSON, where there is one.
    """
    said = of_log(lines)
    seen = None if inspection is None else of_inspection(inspection)
    found = {"fitting": None if fitting is None else list(fitting), "eligible": said["eligible"]}
    if seen:  # a log counts for each pass of the builder; what the engine holds is beyond doubt
        return {**found, "used": len(seen), "names": seen, "proof": "inspector"}
    if seen is not None and said["used"] is None:
        return {**found, "used": 0, "names": [], "proof": "inspector"}
    proof = None if said["used"] is None else "log"
    return {**found, "used": said["used"], "names": said["used_names"], "proof": proof}


def of_log(lines: Iterable[str]) -> dict[str, Any]:
    """How many layers a builder's log calls eligible, and used, with the names that it gives; None: it is silent.

    Several passes of the builder leave several such lines: the last of each kind is about the engine.
    """
    found: dict[str, Any] = {"eligible": None, "used": None, "eligible_names": [], "used_names": []}
    for line in lines:
        for kind, pattern in LINES.items():
            said = re.search(pattern, line)
            if said:
                text = said["names"] if said["count"] is None else said["later"]
                names = [name.strip() for name in text.split(",") if name.strip()]
                found[kind] = len(names) if said["count"] is None else int(said["count"])
                found[f"{kind}_names"] = names
    return found


def of_inspection(text: str) -> list[str] | None:
    """Names of the layers of an engine inspector's JSON whose kernel's name says that it is sparse.

    None: it names no kernel at all.
    """
    try:
        layers = json.loads(text, strict=False)["Layers"]  # names hold control characters
    except (ValueError, KeyError, TypeError):
        return None
    named = [layer for layer in layers if isinstance(layer, dict) and layer.get("TacticName")]
    return [one["Name"] for one in named if KERNEL.search(str(one["TacticName"]))] if named else None


def fitting_layers(trt: Any, network: Any) -> list[str]:
    """Names of the products in a network whose constant weights are 2:4 along their inputs.

    Weights in bf16, which Python cannot read here, are not among them.
    """
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    made = {layer.get_output(place).name: layer for layer in layers for place in range(layer.num_outputs)}
    found = []
    for layer in layers:
        if layer.type != trt.LayerType.MATRIX_MULTIPLY:
            continue
        layer.__class__ = trt.IMatrixMultiplyLayer  # Python gets every layer as a plain ILayer
        weights = _constant(trt, made, layer.get_input(1))
        if weights is not None and fits(weights.T if layer.op1 == trt.MatrixOperation.TRANSPOSE else weights):
            found.append(layer.name)
    return found


def fits(weights: np.ndarray) -> bool:
    """Whether of each four neighbours along the first axis of ``weights`` [inputs, outputs] two at least are zero."""
    inputs, outputs = weights.shape
    if inputs % GROUP:
        return False
    groups = (weights != 0).reshape(inputs // GROUP, GROUP, outputs)
    return bool((groups.sum(axis=1) <= MOST).all())


def _constant(trt: Any, made: Mapping[str, Any], tensor: Any) -> np.ndarray | None:
    """The matrix that a tensor is, zeros in their places; None: it is no constant, or it was turned on the way."""
    last: tuple[int, ...] = tuple(tensor.shape)[-2:]
    while tensor is not None and tensor.name in made:
        layer = made[tensor.name]
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            weights = layer.weights
            same = isinstance(weights, np.ndarray) and tuple(layer.shape)[-2:] == last
            return weights.reshape(last) if same and weights.size == last[0] * last[1] else None
        if layer.type == trt.LayerType.SHUFFLE:
            layer.__class__ = trt.IShuffleLayer
            if not _keeps_order(layer):
                return None
        elif layer.type.name not in THROUGH:
            return None
        tensor = layer.get_input(0)
    return None


def _keeps_order(shuffle: Any) -> bool:
    """Whether a layer only puts axes of size 1 in front, as parsers do for a product with a batch."""
    ranks = len(tuple(shuffle.get_input(0).shape)), len(tuple(shuffle.get_output(0).shape))
    orders = zip((shuffle.first_transpose, shuffle.second_transpose), ranks)
    return all(list(order)[:rank] in (list(range(rank)), [0] * rank) for order, rank in orders)  # zeros: not set
