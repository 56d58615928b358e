"""Sparse weights in an exported file: whether the pattern 2:4 reached it, and how many zeros there are.

A kernel that skips zeros reads the weights of a product along its inputs, so the pattern must hold there, in what the
file gives the product after everything that exporting and quantising does: turning the matrix over, cutting it,
narrowing it, putting QuantizeLinear and DequantizeLinear around it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitprune.errors import NotSupported

from ..backends._trt_sparse import GROUP, MOST

PRODUCTS = ("MatMul", "Gemm")
CHUNK = 1 << 20  # bytes that are compressed at a time


class SparseLayer(NamedTuple):
    """A product in a file, with constant weights.

    Attributes:
        node: its name, which begins with that of the module that it comes from.
        inputs, outputs: numbers that go in and come out, for each token.
        zeros: share of its weights.
        crowded: groups of four neighbours along the inputs with more than two weights that are not zero.
        groups: of which there are so many, each output counted; 0 where the inputs are no multiple of four.
    """

    node: str
    inputs: int
    outputs: int
    zeros: float
    crowded: int
    groups: int

    @property
    def fits(self) -> bool:
        """Whether its weights are 2:4."""
        return self.groups > 0 and self.crowded == 0


def check_pattern(path: Path, layers: Iterable[str]) -> list[SparseLayer]:
    """The products of the modules ``layers`` in an ONNX file, whose weights are all 2:4 along their inputs.

    Args:
        layers: names of the modules, such as 'blocks.3.mlp.fc1'; a product of attention's that was cut out of a larger
            one counts for the module that it was cut from.

    Raises:
        NotSupported: in one of them the pattern does not hold, or there is no such product.
    """
    found = [(owner(layer.node), layer) for layer in products(path)]
    held: list[SparseLayer] = []
    for wanted in layers:
        mine = [layer for module, layer in found if module == wanted]
        if not mine:
            raise NotSupported(f"{path.name} has no product with constant weights for {wanted}, which was to be 2:4")
        for layer in mine:
            if not layer.fits:
                raise NotSupported(f"{path.name}: {wanted} was to be 2:4, and {_lack(layer)}")
        held += mine
    return held


def products(path: Path) -> list[SparseLayer]:
    """All products of an ONNX file whose second factor is constant."""
    import onnx

    graph = onnx.load(str(path)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type in PRODUCTS:
            weights = _constant(node.input[1], constants, makers)
            if weights is not None and weights.ndim == 2:
                turned = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
                found.append(_layer(node.name, weights.T if turned else weights))
    return found


def owner(node: str) -> str:
    """The module whose weights a node multiplies by.

    Of attention's the exporter names parts that were cut out of ``qkv`` by the block: 'blocks.5/MatMul_70'.
    """
    module = node.rpartition("/")[0]
    parts = module.split(".")
    if len(parts) == 2 and parts[0] == "blocks":
        return f"{module}.attn.qkv"
    return f"{module}.qkv" if parts[-1] == "attn" else module


def compressed_bytes(paths: Iterable[Path]) -> int:
    """Bytes that the files take compressed (zlib, level 6)."""
    total = 0
    for path in paths:
        squeeze = zlib.compressobj(6)
        with path.open("rb") as file:
            while part := file.read(CHUNK):
                total += len(squeeze.compress(part))
        total += len(squeeze.flush())
    return total


def _layer(node: str, weights: np.ndarray) -> SparseLayer:
    """What is to be known of ``weights`` [inputs, outputs]."""
    inputs, outputs = weights.shape
    share = float((weights == 0).mean()) if weights.size else 0.0
    if inputs % GROUP:
        return SparseLayer(node, inputs, outputs, share, 0, 0)
    filled = (weights != 0).reshape(inputs // GROUP, GROUP, outputs).sum(axis=1)
    return SparseLayer(node, inputs, outputs, share, int((filled > MOST).sum()), filled.size)


def _lack(layer: SparseLayer) -> str:
    if not layer.groups:
        return f"its {layer.inputs} inputs are no multiple of {GROUP}; leave such layers out of prune.weights"
    return (
        f"in {layer.crowded} of {layer.groups} groups of four weights along its inputs more than two are not zero "
        f"(node {layer.node}); prune the weights again, or leave prune.weights out"
    )


def _constant(name: str, constants: Mapping[str, Any], makers: Mapping[str, Any]) -> np.ndarray | None:
    """The value ``name`` as a matrix with its zeros in place; None: it depends on the images."""
    from onnx import numpy_helper

    if name in constants:
        return _readable(numpy_helper.to_array(constants[name]))
    node = makers.get(name)
    if node is None:
        return None
    if node.op_type == "Constant":
        given = {a.name: a.t for a in node.attribute}
        return _readable(numpy_helper.to_array(given["value"])) if "value" in given else None
    value = _constant(node.input[0], constants, makers) if node.op_type in _KEEPS else None
    return None if value is None else _KEEPS[node.op_type](value, node, constants, makers)


def _readable(array: np.ndarray) -> np.ndarray:
    """``array``; numpy has no type for bf16, so those come as they are known to its extension."""
    return array if array.dtype.kind in "fiu" else array.astype(np.float32)


def _same(value: np.ndarray, *_: Any) -> np.ndarray:
    return value


def _turned(value: np.ndarray, node: Any, *_: Any) -> np.ndarray:
    order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
    return value.transpose(order)


def _cut(value: np.ndarray, node: Any, constants: Mapping[str, Any], makers: Mapping[str, Any]) -> np.ndarray | None:
    """A Slice, whose bounds are constants."""
    bounds = [_constant(name, constants, makers) for name in node.input[1:]]
    if any(bound is None for bound in bounds):
        return None
    first, last, *more = (bound.tolist() for bound in bounds if bound is not None)
    axes = more[0] if more else range(len(first))
    steps = more[1] if len(more) > 1 else [1] * len(first)
    where = [slice(None)] * value.ndim
    for axis, start, end, step in zip(axes, first, last, steps, strict=True):
        where[axis] = slice(start, end, step)
    return value[tuple(where)]


def _less_zero_point(
    value: np.ndarray, node: Any, constants: Mapping[str, Any], makers: Mapping[str, Any]
) -> np.ndarray | None:
    """Whole numbers of a DequantizeLinear, less the one that stands for zero."""
    if len(node.input) < 3 or value.dtype.kind == "f":  # of a pair: what goes into QuantizeLinear comes out again
        return value
    zero = _constant(node.input[2], constants, makers)
    if zero is None:
        return None
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [-1 if place == axis % value.ndim else 1 for place in range(value.ndim)] if zero.ndim else []
    return value.astype(np.int32) - zero.astype(np.int32).reshape(shape)


# operations through which constants are followed; a zero stays one in each
_KEEPS: dict[str, Callable[..., Any]] = {
    "Identity": _same,
    "Cast": _same,
    "QuantizeLinear": _same,
    "DequantizeLinear": _less_zero_point,
    "Transpose": _turned,
    "Slice": _cut,
}
