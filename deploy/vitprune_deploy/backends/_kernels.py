"""What a runtime made of a graph, as a list of kernels: read from ONNX Runtime, OpenVINO and TensorRT alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# what TensorRT's parser notes of a layer: '[ONNX Layer: blocks.0.attn/Softmax_7 | ...]', as often as nodes are in it
_NOTED = re.compile(r"\[ONNX Layer: ([^|\]]+?)\s*[|\]]")


class Kernel(NamedTuple):
    """What runs as one piece.

    Attributes:
        name: the runtime's own.
        kind: what it does, as the runtime calls it.
        origins: names of the ONNX nodes whose work it does.
        inputs, outputs: names of the values between kernels.
    """

    name: str
    kind: str
    origins: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def of_onnx(graph: Any) -> list[Kernel]:
    """The nodes of an ``onnx.GraphProto``, such as ONNX Runtime writes after it has fused what it can."""
    return [Kernel(named(n), n.op_type, (named(n),), tuple(n.input), tuple(n.output)) for n in graph.node]


def named(node: Any) -> str:
    """The name of an ``onnx.NodeProto``; that of its first output where it has none."""
    return node.name or node.output[0]


def of_openvino(model: Any) -> list[Kernel]:
    """The nodes of OpenVINO's ``CompiledModel.get_runtime_model()``, which name the nodes that they were made of."""
    found = []
    for node in model.get_ordered_ops():
        info, name = node.get_rt_info(), node.get_friendly_name()
        kind, origins = (_text(info, key) for key in ("layerType", "originalLayersNames"))
        sources = [node.input_value(i) for i in range(node.get_input_size())]
        inputs = tuple(f"{source.get_node().get_friendly_name()}:{source.get_index()}" for source in sources)
        outputs = tuple(f"{name}:{i}" for i in range(node.get_output_size()))
        found.append(Kernel(name, kind, tuple(filter(None, origins.split(","))), inputs, outputs))
    return found


def of_tensorrt(information: Mapping[str, Any]) -> list[Kernel]:
    """The layers of TensorRT's engine inspector, ``get_engine_information(LayerInformationFormat.JSON)``, parsed.

    Left out is what tells nothing of kernels: layers that are known by name alone, as all are where an engine was not
    built with detailed profiling verbosity, and those that are a whole part of the graph (``{ForeignNode[...]}``).
    """
    found = []
    for layer in information.get("Layers", ()):
        if not isinstance(layer, Mapping) or layer["Name"].startswith("{ForeignNode"):
            continue
        ends = [tuple(tensor["Name"] for tensor in layer.get(key, ())) for key in ("Inputs", "Outputs")]
        origins = tuple(_NOTED.findall(layer.get("Metadata", "")))
        found.append(Kernel(layer["Name"], layer.get("LayerType", ""), origins, *ends))
    return found


def _text(info: Any, key: str) -> str:
    """An entry of OpenVINO's run-time information, which may come wrapped; empty where it is not there."""
    if key not in info:
        return ""
    value = info[key]
    return str(getattr(value, "value", value))
