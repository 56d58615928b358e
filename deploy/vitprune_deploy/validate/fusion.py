"""Is the attention of each block one kernel of the runtime, and what stands around it?

Attention is found in a graph by its shape: a softmax between two products of activations, or one node of that kind.
The nodes of our exports bear the module that they come from (``blocks.3.attn/Softmax_17``), those of other exporters do
so in ways of their own, and runtimes note which nodes a kernel was made of.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vitprune.errors import MissingError, NotSupported

from ..backends._kernels import Kernel, named, of_onnx, of_openvino, of_tensorrt

ONE_NODE = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "PackedMultiHeadAttention",
            "QAttention")  # fmt: skip
# what may stand between the softmax and the products before and behind it
BETWEEN = ("Add", "Mul", "Div", "Sub", "Where", "Cast", "Dropout", "QuantizeLinear", "DequantizeLinear", "Identity")
# Kernels that move numbers and compute nothing, by what the runtimes call them; those of shapes alone cost nothing
MOVES = {
    **dict.fromkeys(("cast", "convert"), "cast"),
    **dict.fromkeys(("transpose", "permute", "shuffle"), "transpose"),
    **dict.fromkeys(("reorder", "reorderinput", "reorderoutput", "reformat"), "reformat"),
    **dict.fromkeys(("slice", "stridedslice", "split", "variadicsplit", "concat", "concatenation", "copy"), "copy"),
    **dict.fromkeys(("reshape", "squeeze", "unsqueeze", "flatten", "identity", "noop"), "shape"),
}
# TensorRT's names of kernels that it generates are made of these: __myl_TranReshMove_myl3_3
GENERATED = re.compile(r"__my[el]\d*_(?:bb\d+_\d+_)?((?:[A-Z][a-z]{2,3})+)(?:_|$)")
PIECES = {"tra": "transpose", "cas": "cast", "sli": "copy", "spl": "copy", "con": "copy", "mov": "copy", "res": "shape"}
# Arithmetic on single numbers or tokens, which may stand between attention and the products around it
LIGHT = ("mul", "multiply", "add", "div", "eltwise", "layernormalization", "rmsnormalization", "mvn")
PLAIN = re.compile(r"matmul|matrixmultiply|gemm|fullyconnected|softmax", re.IGNORECASE)
BLOCK = re.compile(r"(?:^|[./])(?:blocks?|layers?)[./](\d+)\b")
SCORING = re.compile(r"\.reducer\b")  # what a token method attends with is not the attention of its block
HEAD_LEAST, HEAD_MOST, HEAD_STEP = 16, 256, 8  # channels of a head that TensorRT's fused attention takes


class Core(NamedTuple):
    """The attention of a block in a graph.

    Attributes:
        block: its number; None where names do not tell.
        nodes: names of the two products and of the softmax between them, or of the one node that is all of it.
        heads: names of the queries and of the values.
    """

    block: int | None
    nodes: tuple[str, ...]
    heads: tuple[str, str]


@dataclass(frozen=True)
class Attention:
    """What became of the attention of a block.

    Attributes:
        block: its number; None where names do not tell.
        fused: it is one kernel; None: the runtime does not say what became of it.
        kernels: what does its work, as the runtime calls it.
        around: how many kernels that only move numbers stand between it and the products around it, by what they do.
    """

    block: int | None
    fused: bool | None
    kernels: tuple[str, ...]
    around: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest and the report."""
        return {"block": self.block, "fused": self.fused, "kernels": list(self.kernels), "around": dict(self.around)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Attention:
        """What ``to_dict`` wrote."""
        return cls(plain["block"], plain["fused"], tuple(plain["kernels"]), plain["around"])

    def became(self) -> str:
        """The kernels, for a person."""
        kernels = " + ".join(self.kernels)
        return "not known" if self.fused is None else f"one kernel: {kernels}" if self.fused else kernels

    def moved(self) -> str:
        """What stands around it, for a person."""
        return ", ".join(f"{count} {what}" for what, count in self.around.items()) or "nothing"


def in_onnxruntime(
    path: Path, *, threads: int | None = None, options: Mapping[str, Any] | None = None
) -> tuple[Attention, ...]:
    """What ONNX Runtime makes of an ONNX file, loaded as ``OnnxRuntime.load`` loads it.

    Raises:
        NotSupported: the provider keeps its graph to itself.
        InputError, DamagedFile, MissingError: as ``OnnxRuntime.load``.
    """
    from ..backends.onnxruntime import optimised

    graph = optimised(path, threads=threads, options=options).graph
    return what_became(cores(graph), of_onnx(graph))


def in_openvino(path: Path, config: Mapping[str, Any] | None = None) -> tuple[Attention, ...]:
    """What OpenVINO makes of an ONNX file on the CPU, compiled with ``config``.

    Raises:
        MissingError: OpenVINO is not installed.
        NotSupported: it does not take the file.
    """
    import onnx

    try:
        import openvino
    except ImportError as error:
        raise MissingError(f"openvino cannot be imported ({error}); run `pip install openvino`") from error
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", dict(config or {}))
    except RuntimeError as error:
        raise NotSupported(f"{path}: openvino does not take this file: {' '.join(str(error).split())[:300]}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    return what_became(cores(graph), of_openvino(compiled.get_runtime_model()))


def in_tensorrt(information: Mapping[str, Any], path: Path) -> tuple[Attention, ...]:
    """What TensorRT made of the ONNX file ``path``, by what its engine inspector says."""
    import onnx

    return what_became(cores(onnx.load(str(path), load_external_data=False).graph), of_tensorrt(information))


def cores(graph: Any) -> list[Core]:
    """The attention of each block of an ``onnx.GraphProto``, in the order of the graph."""
    index, found = _Index.of(graph), []
    for node in graph.node:
        first = last = node
        if node.op_type.endswith("Softmax"):
            first, last = _before(node, index), _behind(node, index)
        elif node.op_type not in ONE_NODE:
            continue
        if first is None or last is None:
            continue
        names = tuple(dict.fromkeys(named(one) for one in (first, node, last)))
        values = last.input[1] if len(names) > 1 else [*last.input, "", ""][2]
        if not any(map(SCORING.search, names)):
            blocks = [int(match[1]) for match in map(BLOCK.search, names) if match]
            found.append(Core(blocks[0] if blocks else None, names, (first.input[0], values)))
    return found


def broken(dense: Sequence[Attention], pruned: Sequence[Attention]) -> list[str]:
    """A sentence for each block whose attention is one kernel in the dense model and no longer in the pruned one."""
    had = {one.block: one for one in dense if one.fused and one.block is not None}
    return [
        f"pruning broke a fusion: the attention of block {one.block} is one kernel in the dense model "
        f"({had[one.block].kernels[0]}), and {one.became()} in the pruned one"
        for one in pruned
        if one.fused is False and one.block in had
    ]


def refused_heads(blocks: Iterable[tuple[int | None, int, int]]) -> list[str]:
    """A sentence for each head size that TensorRT's fused attention does not take.

    Args:
        blocks: number of each block, and the channels of a head's queries and of its values.
    """
    places: dict[int, list[str]] = {}
    for block, *sizes in blocks:
        for size in dict.fromkeys(sizes):
            if not HEAD_LEAST <= size <= HEAD_MOST or size % HEAD_STEP:
                places.setdefault(size, []).append("?" if block is None else str(block))
    return [
        f"TensorRT's fused attention takes heads of {HEAD_LEAST} to {HEAD_MOST} channels in multiples of {HEAD_STEP}, "
        f"and those of block {', '.join(found)} have {size}"
        for size, found in places.items()
    ]


def head_sizes(model: Any) -> list[tuple[int | None, int, int]]:
    """Block, and channels of a head's queries and values, of each attention of an ``onnx.ModelProto`` that tells."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    last = {}
    for value in (*graph.value_info, *graph.input):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4:  # batch, heads, tokens, channels
            last[value.name] = dims[-1].dim_value
    sizes = [(core.block, *(last.get(name, 0) for name in core.heads)) for core in cores(graph)]
    return [(block, q, v) for block, q, v in sizes if q and v]


def fusion_rows(found: Mapping[str, Any] | None) -> list[tuple[str, ...]]:
    """Block, attention of the dense model and of the pruned one, and what stands around that, from a manifest."""
    read = {name: [Attention.from_dict(one) for one in (found or {}).get(name, ())] for name in ("dense", "pruned")}
    dense = {one.block: one.became() for one in read["dense"]}
    return [
        ("-" if one.block is None else str(one.block), dense.get(one.block, "-"), one.became(), one.moved())
        for one in read["pruned"]
    ]


class _Index(NamedTuple):
    """Who makes and who uses each value of a graph, and which are stored in it."""

    made: Mapping[str, Any]
    used: Mapping[str, list[Any]]
    stored: frozenset[str]

    @classmethod
    def of(cls, graph: Any) -> _Index:
        used: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                used.setdefault(name, []).append(node)
        stored = [tensor.name for tensor in graph.initializer]
        stored += [name for node in graph.node if node.op_type == "Constant" for name in node.output]
        return cls({name: node for node in graph.node for name in node.output}, used, frozenset(stored))

    def product(self, node: Any) -> bool:
        """Whether ``node`` multiplies two values that are computed."""
        return "MatMul" in node.op_type and not self.stored & set(node.input[:2])


def _before(softmax: Any, index: _Index) -> Any:
    """The product whose result the softmax is of; None if there is none."""
    node = index.made.get(softmax.input[0])
    while node is not None and node.op_type in BETWEEN:
        makers = [index.made[name] for name in node.input if name in index.made]
        node = next((maker for maker in makers if maker.op_type in BETWEEN or index.product(maker)), None)
    return node if node is not None and index.product(node) else None


def _behind(softmax: Any, index: _Index) -> Any:
    """The product that weighs the values by the softmax; None if there is none."""
    names = [softmax.output[0]]
    while names:
        name = names.pop()
        for node in index.used.get(name, ()):
            if index.product(node) and node.input[0] == name:
                return node
            if node.op_type in BETWEEN:
                names.append(node.output[0])
    return None


def what_became(found: Sequence[Core], kernels: Sequence[Kernel]) -> tuple[Attention, ...]:
    """What became of each attention in the kernels of a runtime."""
    made = {name: kernel for kernel in kernels for name in kernel.outputs}
    used: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for name in kernel.inputs:
            used.setdefault(name, []).append(kernel)

    def before(kernel: Kernel) -> list[Kernel]:
        return [made[name] for name in kernel.inputs if name in made]

    def behind(kernel: Kernel) -> list[Kernel]:
        return [other for name in kernel.outputs for other in used.get(name, ())]

    results = []
    for core in found:
        wanted = set(core.nodes)
        mine = [kernel for kernel in kernels if wanted & set(kernel.origins) and _moves(kernel) is None]
        whole = [kernel for kernel in mine if wanted <= set(kernel.origins)]
        # one node may have fallen apart into kernels that all name it
        fused = bool(whole) and (len(wanted) > 1 or (len(mine) == 1 and not PLAIN.search(whole[0].kind)))
        moved = [what for what in map(_moves, _met(mine, before) | _met(mine, behind)) if what and what != "shape"]
        shown = tuple(map(_called, whole if fused else mine))
        results.append(Attention(core.block, fused if mine else None, shown, dict(sorted(Counter(moved).items()))))
    return tuple(results)


def _met(start: Sequence[Kernel], following: Callable[[Kernel], list[Kernel]]) -> set[Kernel]:
    """The kernels that only move numbers, on the way from ``start`` to the next ones that compute."""
    found: set[Kernel] = set()
    seen, left = set(start), list(start)
    while left:
        for kernel in following(left.pop()):
            moves = _moves(kernel) is not None
            theirs = any(map(SCORING.search, (kernel.name, *kernel.origins)))
            if kernel not in seen and not theirs and (moves or kernel.kind.lower() in LIGHT):
                seen.add(kernel)
                left.append(kernel)
                if moves:
                    found.add(kernel)
    return found


def _moves(kernel: Kernel) -> str | None:
    """What a kernel that computes nothing does; None for one that computes."""
    if kernel.kind.lower() in MOVES:
        return MOVES[kernel.kind.lower()]
    match = GENERATED.match(kernel.name)
    pieces = [PIECES.get(piece[:3].lower()) for piece in re.findall("[A-Z][a-z]+", match[1])] if match else []
    if not pieces or None in pieces:
        return None
    return next(what for what in ("transpose", "cast", "copy", "shape") if what in pieces)


def _called(kernel: Kernel) -> str:
    """What a reader knows a kernel by: generated ones are all of one kind, and tell more by their names."""
    return kernel.name if kernel.kind in ("", "kgen") else kernel.kind
