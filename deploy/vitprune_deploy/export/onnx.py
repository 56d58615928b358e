"""torch modules as ONNX files with symbolic shapes, checked for what the exporter gets wrong in silence.

Two things differ from a plain ``torch.onnx.export(dynamo=True)``: attention is written in fewer nodes (see
``attention.py``), and what names files of this machine (stack traces of every node) is left out, so that the same model
gives the same bytes.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitprune import __version__
from vitprune.errors import InputError, NotSupported

from ..files import TEMPORARY, flush, sha256_file, writing
from .attention import translations
from .islands import Island
from .precision import in_precision, opset_for

METADATA_PREFIX = "vitprune."
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # the exporter's module of what no module asked for
EXTERNAL_DATA_FROM_BYTES = 1_900_000_000  # a protobuf message ends at 2 GB
# value: why the runtimes that we serve cannot take the node, or take it and compute something else
FORBIDDEN = {
    "NonZero": "TensorRT has no shape for a count that depends on values",
    "Unique": "TensorRT has no shape for a count that depends on values",
    "Compress": "TensorRT has no shape for a count that depends on values",
    "If": "its branches cannot be captured or fused",
    "Loop": "its steps cannot be captured or fused",
    "Scan": "its steps cannot be captured or fused",
    "RandomNormal": "an engine must answer the same twice",
    "RandomNormalLike": "an engine must answer the same twice",
    "RandomUniform": "an engine must answer the same twice",
    "RandomUniformLike": "an engine must answer the same twice",
    "Multinomial": "an engine must answer the same twice",
    "Bernoulli": "an engine must answer the same twice",
    "Dropout": "the model was not in eval mode",
}


class Axis(NamedTuple):
    """One symbolic axis: its name in the graph, and the sizes that it may take."""

    name: str
    least: int
    most: int
    multiple: int = 1  # only multiples of this are allowed


@dataclass(frozen=True)
class ExportInfo:
    """What was written.

    Attributes:
        opset: version of the standard operators.
        nodes: how many nodes there are of each operator.
        dynamic: names of the symbolic axes, by input and axis.
        sha256: of the .onnx file.
        size_bytes: of the .onnx file and its external data together.
        external_data: name of the file beside it that holds the weights; None: they are inside.
        weights: how many numbers there are among the weights of each format, floats alone: float32, float16, bfloat16.
    """

    opset: int
    nodes: dict[str, int]
    dynamic: dict[str, dict[int, str]]
    sha256: str
    size_bytes: int
    external_data: str | None
    weights: dict[str, int]


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    batch: int | tuple[int, int] = (1, 64),
    image_size: tuple[int, int] | tuple[tuple[int, int], tuple[int, int]] | None = None,
    precision: str = "fp32",
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
    names: tuple[str, str] = ("images", "logits"),
    islands: Sequence[Island] = (),
    ort_attention: bool = False,
) -> ExportInfo:
    """Write a ``Vit`` as ONNX: ``images`` [batch, channels, height, width] fp32 to ``logits`` [batch, classes] fp32.

    Args:
        batch: a fixed size, or the least and the most of a symbolic one.
        image_size: height and width in pixels, or the range of each: ((least, most), (least, most)), symbolic where
            they differ; None: the model's own size.
        precision: of weights and arithmetic; inputs and outputs are fp32 in any case.
        opset: None: see ``opset_for``.
        metadata: strings for the file's metadata_props, their keys without the prefix ``vitprune.``.
        names: of the input and the output.
        islands: operations that stay in fp32 whatever the precision; see ``islands.find_islands``.
        ort_attention: see ``precision.ort_attention``.

    Raises:
        InputError: a range is empty or is not made of whole patches, or the precision is unknown.
        NotSupported: the graph has a node that the runtimes refuse, or an axis did not stay symbolic.
    """
    config: Any = model.config
    height, width = config.image_size if image_size is None else image_size
    sizes = [batch, config.channels, height, width]
    steps = [1, 1, *config.patch_size]
    axes: dict[int, Axis] = {}
    for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
        sizes[axis], found = symbolic_axis(name, sizes[axis], steps[axis])
        if found is not None:
            axes[axis] = found
    weights = next(model.parameters())
    return export_module(
        in_precision(model, precision, islands),
        (torch.zeros(sizes, dtype=torch.float32, device=weights.device),),
        path,
        dynamic=[axes],
        names=([names[0]], [names[1]]),
        opset=opset or opset_for(precision),
        metadata={"precision": precision, **(metadata or {})},
        ort_attention=ort_attention,
    )


def export_module(
    module: nn.Module,
    inputs: Sequence[Tensor],
    path: Path,
    *,
    dynamic: Sequence[Mapping[int, Axis]],
    names: tuple[Sequence[str], Sequence[str]],
    opset: int = 20,
    metadata: Mapping[str, str] | None = None,
    ort_attention: bool = False,
) -> ExportInfo:
    """Write any module as ONNX.

    Args:
        inputs: examples; along a symbolic axis they need a size of at least 2, within its range.
        dynamic: for each input, its symbolic axes; the same name is the same size. An axis named ``batch`` must be
            the first of every output too.
        names: of the inputs and of the outputs.
        ort_attention: see ``precision.ort_attention``.

    Raises:
        NotSupported: the module cannot be exported, the graph has a node that the runtimes refuse, or an axis did
            not stay symbolic.
    """
    program = _trace(module, tuple(inputs), dynamic, names, opset, translations(opset, ort_attention))
    graph = program.graph
    _refuse_forbidden(graph)
    requested = {name: dict(axes) for name, axes in zip(names[0], dynamic, strict=True) if axes}
    _name_axes(graph, requested)
    _name_nodes(graph)
    _anonymise(program)
    weights = _weights(graph)
    props = {"version": __version__, "torch": torch.__version__, **metadata_json(weights=weights), **(metadata or {})}
    program.metadata_props.update({METADATA_PREFIX + key: str(value) for key, value in sorted(props.items())})
    nodes = Counter(f"{node.domain}:{node.op_type}" if node.domain else node.op_type for node in graph.all_nodes())
    sha256, size_bytes, external = _save(program, path)
    axes = {name: {axis: a.name for axis, a in found.items()} for name, found in requested.items()}
    return ExportInfo(opset, dict(nodes.most_common()), axes, sha256, size_bytes, external, weights)


def metadata_json(**values: Any) -> dict[str, str]:
    """Metadata whose values are JSON texts, with sorted keys so that equal values give equal files."""
    return {key: json.dumps(value, sort_keys=True) for key, value in values.items()}


def symbolic_axis(name: str, size: int | tuple[int, int], step: int) -> tuple[int, Axis | None]:
    """The example's size along an axis, and the axis if it is symbolic."""
    least, most = (size, size) if isinstance(size, int) else size
    if not 1 <= least <= most:
        raise InputError(f"{name} must range from at least 1 upwards, got {least} to {most}")
    for bound in (least, most):
        if bound % step:
            raise InputError(f"{name} must be a multiple of the patch size {step}, got {bound}")
    if least == most:
        return least, None
    return max(least, min(most, 2 * step)), Axis(name, least, most, step)


def _trace(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    dynamic: Sequence[Mapping[int, Axis]],
    names: tuple[Sequence[str], Sequence[str]],
    opset: int,
    table: Mapping[Callable[..., Any], Callable[..., Any]],
) -> Any:
    """The module as an ``onnx_ir.Model``."""
    dims: dict[str, Any] = {}
    shapes = tuple({axis: _dim(found, dims) for axis, found in axes.items()} for axes in dynamic)
    plain = _Positional(module)  # so that shapes go by position, whatever the arguments are called
    try:
        with _eval(module), _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                plain,
                inputs,
                dynamo=True,
                dynamic_shapes=(shapes,),
                input_names=list(names[0]),
                output_names=list(names[1]),
                opset_version=opset,
                custom_translation_table=dict(table),
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever it meets into errors of several libraries
        reason = str(error.__cause__ or error).strip().splitlines()
        raise NotSupported(
            f"{type(module).__name__} cannot be exported to ONNX: {reason[0] if reason else error!r}"
        ) from error
    return program.model


def _dim(axis: Axis, known: dict[str, Any]) -> Any:
    """torch's symbol for an axis, the same one for the same name."""
    if axis.name not in known:
        known[axis.name] = torch.export.Dim(
            axis.name, min=math.ceil(axis.least / axis.multiple), max=axis.most // axis.multiple
        )
    return axis.multiple * known[axis.name] if axis.multiple > 1 else known[axis.name]


class _Positional(nn.Module):
    """A module with any number of positional arguments."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def _refuse_forbidden(graph: Any) -> None:
    """Raise NotSupported for the first node that a runtime would refuse or that would answer at random."""
    for node in graph.all_nodes():
        why = FORBIDDEN.get(node.op_type)
        if node.op_type.startswith("Scatter") and _text(node, "reduction", "none") != "none":
            why = "TensorRT-RTX cannot reduce while scattering; merge by a matrix product"
        if node.op_type == "Resize" and node.attributes.get_int("antialias", 0):
            why = "TensorRT cannot resize with antialiasing; use two matrix products"
        if why:
            place = node.metadata_props.get("pkg.torch.onnx.stack_trace", "").strip().splitlines()
            where = f" ({place[-2].strip()})" if len(place) > 1 else ""
            raise NotSupported(f"the exported graph has the node {node.name} of type {node.op_type}{where}: {why}")


def _text(node: Any, name: str, default: str) -> str:
    """A string attribute of a node."""
    return node.attributes.get_string(name, default)


def _name_axes(graph: Any, requested: Mapping[str, Mapping[int, Axis]]) -> None:
    """Give the inputs' symbolic axes the names that were asked for; NotSupported if the exporter has fixed one."""
    for value in graph.inputs:
        for axis, found in requested.get(value.name, {}).items():
            if isinstance(value.shape[axis], int):
                raise NotSupported(f"the exporter fixed {found.name} of {value.name} to {value.shape[axis]}")
            value.shape[axis] = found.name
    if any(axis.name == "batch" for axes in requested.values() for axis in axes.values()):
        for value in graph.outputs:
            if isinstance(value.shape[0], int):
                raise NotSupported(f"the exporter fixed batch of the output {value.name} to {value.shape[0]}")


def _name_nodes(graph: Any) -> None:
    """Name each node by the module that it comes from, as in ``blocks.3.attn/Softmax_17``: runtimes keep such names."""
    for number, node in enumerate(graph.all_nodes()):
        # paths of modules from the outermost to the innermost, and at last the exporter's name of the call
        *scopes, _ = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']"))
        module = _unwrapped(scopes[-1] if scopes else "").removeprefix(NO_MODULE)
        node.name = f"{module}/{node.op_type}_{number}" if module else f"{node.op_type}_{number}"


def _unwrapped(name: str) -> str:
    """A module's or a weight's name without our wrappers' names for what they hold."""
    return f"{name}.".removeprefix("module.").removeprefix("model.").removesuffix(".")


def _anonymise(program: Any) -> None:
    """Drop stack traces and the exporter's own shapes of inner values, which use other names for the axes."""
    graph = program.graph
    outside = {id(value) for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    program.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in outside:
                value.shape = None
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for value in list(graph.initializers.values()):
        value.name = _unwrapped(value.name)


def _weights(graph: Any) -> dict[str, int]:
    """How many numbers there are among the graph's weights, by format, floats alone."""
    found: Counter[str] = Counter()
    for value in graph.initializers.values():
        if value.dtype.is_floating_point():
            found[value.dtype.numpy().name] += value.const_value.size
    return dict(found)


def _save(program: Any, path: Path) -> tuple[str, int, str | None]:
    """Write the file whole or not at all; its sha256, its size, and the name of the file with its weights."""
    import onnx_ir as ir

    weights = sum(value.const_value.nbytes for value in program.graph.initializers.values())
    external = f"{path.name}.data" if weights > EXTERNAL_DATA_FROM_BYTES else None
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=TEMPORARY) as folder:
            written = Path(folder) / path.name
            ir.save(program, written, external_data=external)
            files = [Path(folder) / external] if external else []
            files.append(written)  # last: once the graph is there, its weights are
            size_bytes = sum(file.stat().st_size for file in files)
            sha256 = sha256_file(written)
            for file in files:
                flush(file)
                file.replace(path.parent / file.name)
    return sha256, size_bytes, external


@contextlib.contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; afterwards every part is in the mode in which it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout, stderr or in the log while the exporter talks to itself."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)
