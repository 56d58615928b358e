"""A bf16 graph written out in fp32, for runtimes that have no bf16 kernels, such as ONNX Runtime's on a CPU.

Every operation computes in fp32, and two Casts round its result to bf16: what the types of the graph ask for, of a
runtime that sums up in fp32. So a comparison tells what the exported operations give at that precision; how a runtime
with kernels of its own fuses and sums, it does not tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def write_in_fp32(path: Path, folder: Path, *, rounded: bool) -> Path:
    """The bf16 file at ``path`` as one of the same name in ``folder``, its weights beside it.

    ``rounded``: results are rounded as in bf16; otherwise the weights alone have been, which shows the graph as such.
    """
    import onnx_ir as ir

    program = ir.load(path)
    for value in program.graph.initializers.values():
        if value.dtype == ir.DataType.BFLOAT16:
            value.const_value = _in_fp32(value.const_value)
            value.dtype = ir.DataType.FLOAT
    for node in list(program.graph):
        for attribute in list(node.attributes.values()):
            _widen_attribute(node, attribute)
        for output in node.outputs:
            if output.dtype == ir.DataType.BFLOAT16:
                output.dtype = ir.DataType.FLOAT
                if rounded:
                    _round(program.graph, node, output)
    written = folder / path.name
    ir.save(program, written, external_data=f"{path.name}.data")
    return written


def _in_fp32(tensor: Any) -> Any:
    """The same numbers, in fp32."""
    import onnx_ir as ir

    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen_attribute(node: Any, attribute: Any) -> None:
    """An attribute that names bf16 names fp32; a constant in bf16 is one in fp32."""
    import onnx_ir as ir

    if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
        node.attributes.add(ir.AttrTensor(attribute.name, _in_fp32(attribute.value)))
    elif attribute.name in ("to", "dtype") and attribute.value == ir.DataType.BFLOAT16:
        node.attributes.add(ir.AttrInt64(attribute.name, ir.DataType.FLOAT))


def _round(graph: Any, node: Any, output: Any) -> None:
    """Have those that read ``output`` read it rounded to bf16."""
    import onnx_ir as ir

    readers = tuple(output.uses())
    narrow = ir.node("Cast", [output], attributes={"to": ir.DataType.BFLOAT16})
    wide = ir.node("Cast", narrow.outputs, attributes={"to": ir.DataType.FLOAT})
    for reader, place in readers:
        reader.replace_input_with(place, wide.outputs[0])
    graph.insert_after(node, [narrow, wide])
