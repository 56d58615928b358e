"""Which number formats are in an engine: counted, so that fp32 is never handed out as fp16 or bf16.

Three looks, each at what the one before cannot see. The network that was parsed: strongly typed, so what it holds is
what the builder must do. The engine, by the inspector, where there is a GPU to load it on. The size of the plan where
there is none: weights in fp32 take twice the room.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ._trt_common import TYPES, Refused

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# as inspectors write them: TensorRT 8 'Row major linear FP16 format', 10 and later 'Half'; BFloat16 before Float
WORDS = (("bfloat16", r"BFloat16|BF16"), ("float16", r"FP16|Half"), ("float32", r"FP32|Float\b"))
SLACK = 0.05  # of a share of weights: scales and constants that parsers add or fold
KERNELS_BYTES = 16_000_000  # of a plan; TensorRT-RTX 1.7 had 4 to 11 MB beside the weights of ViTs of twelve blocks


def of_network(trt: Any, network: Any) -> dict[str, dict[str, int]]:
    """How many tensors that layers give, and how many numbers among the constants, are of each float format."""
    tensors: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        for place in range(layer.num_outputs):
            tensor = layer.get_output(place)
            kind = TYPES.get(tensor.dtype.name, "")
            if kind in BYTES:
                tensors[kind] += 1
                if layer.type == trt.LayerType.CONSTANT:
                    weights[kind] += math.prod(tensor.shape)
    return {"tensors": dict(tensors), "weights": dict(weights)}


def inspect(trt: Any, log: Any, plan: Any, request: Mapping[str, Any]) -> str | None:
    """An inspector's JSON of a plan, at the shapes that its first profile is tuned for; None: it does not load."""
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = request["version_compatible"]  # such a plan holds code, this one is our own
    engine = runtime.deserialize_cuda_engine(plan)
    context = None if engine is None else engine.create_execution_context()
    if context is None:
        return None
    for name, (_, best, _) in request["profiles"][0].items():
        context.set_input_shape(name, best)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context  # without it, tensors of free sizes have no formats
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return text


def of_inspection(text: str) -> dict[str, Any]:
    """What an engine inspector's JSON says: how many layers, and outputs and weights of each float format.

    Layers of which it names no format count as ``unknown``; so do all where it gives names alone.
    """
    try:
        layers = json.loads(text, strict=False)["Layers"]  # names hold control characters
    except (ValueError, KeyError, TypeError):
        layers = []
    tensors: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    unknown = 0
    for layer in layers:
        found = list(_formats(layer))
        tensors.update(found)
        unknown += not found
        for part in ("Weights", "Bias"):
            held = layer.get(part) if isinstance(layer, dict) else None
            if isinstance(held, dict) and "Count" in held:
                weights[_format(held.get("Type", "")) or "other"] += int(held["Count"])
    return {"layers": len(layers), "tensors": dict(tensors), "weights": dict(weights), "unknown": unknown}


def _formats(layer: Any) -> Iterator[str]:
    """The float formats of what a layer gives."""
    for output in layer.get("Outputs", []) if isinstance(layer, dict) else []:
        found = _format(output.get("Format/Datatype", ""))
        if found:
            yield found


def _format(text: str) -> str | None:
    """The float format that a description names; None for another or none."""
    return next((name for name, pattern in WORDS if re.search(pattern, text)), None)


def check_network(found: Mapping[str, Mapping[str, int]], wanted: str | None, typed: Mapping[str, int]) -> None:
    """Refuse a network whose weights are not in the format ``wanted``.

    Args:
        typed: numbers of each format among the weights of the ONNX file; islands in fp32 are among them. Empty: not
            known, and more than half are to be as wanted.
    """
    weights = found["weights"]
    if wanted is None or not sum(weights.values()):
        return
    least = _share(typed, wanted) - SLACK if typed else 0.5
    if wanted == "float32":
        least = 1.0
    has = _share(weights, wanted)
    if not (has >= least and has > 0):
        raise Refused(
            "refused",
            f"was asked for {wanted}, and of the weights in the network {100 * has:.0f}% are ({_counted(weights)}): "
            "export the ONNX file in that precision",
        )


def tells(found: Mapping[str, Any]) -> bool:
    """Whether an inspection names the formats of enough layers to judge by; some layers, such as waits, have none."""
    return bool(found["tensors"]) and found["unknown"] <= found["layers"] / 2


def check_engine(found: Mapping[str, Any], network: Mapping[str, Mapping[str, int]], wanted: str | None) -> None:
    """Refuse an engine whose layers give far fewer tensors in the format ``wanted`` than the network asked for."""
    asked, built = network["tensors"], found["tensors"]
    if wanted is None:
        return
    has, due = _share(built, wanted), _share(asked, wanted)
    if has < due / 2 or has == 0:
        raise Refused(
            "refused",
            f"was asked for {wanted}, and built an engine in which {100 * has:.0f}% of what layers give is "
            f"({_counted(built)}), where the network has {100 * due:.0f}%: do not use it as {wanted}",
        )


def check_size(plan_bytes: int, network: Mapping[str, Mapping[str, int]], wanted: str | None) -> bool:
    """Refuse a plan that has the size of one whose weights are in fp32, where they should be narrower.

    False: the weights are too few, or in fp32 anyway, for the size to tell.
    """
    weights = network["weights"]
    narrow = sum(BYTES[kind] * count for kind, count in weights.items())
    wide = sum(weights.values()) * BYTES["float32"]
    most = (narrow + wide) / 2 + KERNELS_BYTES
    if wanted not in (None, "float32") and most < plan_bytes:
        raise Refused(
            "refused",
            f"was asked for {wanted}, and built a plan of {plan_bytes / 1e6:.0f} MB, where its weights take "
            f"{narrow / 1e6:.0f} MB and would take {wide / 1e6:.0f} MB in float32: do not use it as {wanted}",
        )
    return wanted is not None and most < wide


def _share(counts: Mapping[str, int], kind: str) -> float:
    total = sum(counts.values())
    return counts.get(kind, 0) / total if total else 0.0


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
