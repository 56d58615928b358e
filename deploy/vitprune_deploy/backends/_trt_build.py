"""The process in which TensorRT parses and builds: one JSON line in, JSON lines out.

A build can crash, hang or fill the memory, and its libraries print on the C level; so it never runs in the caller's
process. One code path serves TensorRT 10, TensorRT 11 and TensorRT-RTX: what differs is found by looking for the
name, never by comparing versions. Run by ``backends.tensorrt``; the lines are

    {"progress": [phase, steps done, steps in all]}     any number of them
    {"result": {...}}  or  {"error": [kind, message]}     the last one
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
# a model that cannot be parsed names this many of its nodes
NODES_NAMED = 3

Send = Callable[[Mapping[str, Any]], None]


class Refused(Exception):
    """The answer is no.

    Attributes:
        kind: whose turn it is: 'missing', 'input', 'refused' (by TensorRT) or 'damaged'.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def main() -> None:
    """Answer the request on stdin."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what TensorRT's libraries print goes where it does no harm

    def send(message: Mapping[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    request = json.loads(sys.stdin.readline())
    try:
        send({"result": ACTIONS[request["action"]](request, send)})
    except Refused as refused:
        send({"error": [refused.kind, str(refused)]})
    except MemoryError:
        send({"error": ["missing", "ran out of memory while building"]})
    except OSError as error:
        send({"error": ["missing", f"could not use {error.filename}: {error.strerror}"]})


def describe(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Version of the module, and which GPUs it builds for: ['current'] stands for the one in this machine."""
    trt = _load(request["module"])
    _builder(trt, _logger(trt))
    targets = list(_targets(trt)) if request["module"] == "tensorrt_rtx" else ["current"]
    return {"version": trt.__version__, "compute_capabilities": targets}


def check(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Nothing, if the file parses."""
    trt = _load(request["module"])
    log = _logger(trt)
    builder = _builder(trt, log)
    _parse(trt, builder, log, request["onnx"])
    return {}


def build(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Write the plan to ``request['plan']``; what the sidecar says of it."""
    trt = _load(request["module"])
    log = _logger(trt)
    builder = _builder(trt, log)
    network, parser = _parse(trt, builder, log, request["onnx"])
    _let_attention_fall_apart(trt, network)
    config = builder.create_builder_config()
    capabilities = _set_targets(trt, config, request)
    for profile in request["profiles"]:
        _add_profile(builder, config, network, profile)
    if request["workspace_mb"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mb"] << 20)
    cache = _set_timing_cache(config, request["timing_cache"])
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = monitor = _monitor(trt, send)  # noqa: F841  (TensorRT does not keep it alive)
    plan = builder.build_serialized_network(network, config)
    del parser  # not before: the network reads the parser's weights
    if plan is None:
        raise Refused(*_explain(log, request))
    with Path(request["plan"]).open("wb") as file:
        file.write(plan)
    if cache is not None:
        cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return {
        "runtime": request["module"],
        "version": trt.__version__,
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "profiles": request["profiles"],
        "compute_capabilities": capabilities,
        "layers": network.num_layers,
    }


ACTIONS = {"describe": describe, "check": check, "build": build}


def _load(module: str) -> Any:
    """The Python module of TensorRT."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # its libraries fail in ways of their own
        raise Refused("missing", f"cannot be imported ({' '.join(str(error).split())})") from error


def _logger(trt: Any) -> Any:
    """A logger that keeps errors and warnings, the only place where TensorRT says why."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))

    return Log()


def _monitor(trt: Any, send: Send) -> Any:
    """Passes on how far the outermost phase has come, and what it is at."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer, self.done, self.total = "", 0, 1

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outer, self.done, self.total = phase, 0, steps
            send({"progress": [phase, self.done, self.total]})

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.outer:
                self.done = step + 1
                send({"progress": [phase, self.done, self.total]})
            return True

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _builder(trt: Any, log: Any) -> Any:
    """A builder; classic TensorRT has none without a GPU."""
    try:
        builder = trt.Builder(log)
    except Exception as error:  # pybind11 raises TypeError where the C++ side gave a null pointer
        raise Refused("missing", _no_builder(log, str(error))) from error
    if builder is None:
        raise Refused("missing", _no_builder(log, ""))
    return builder


def _no_builder(log: Any, text: str) -> str:
    reason = log.errors[0] if log.errors else " ".join(text.split())
    return f"has no builder on this machine, it needs an NVIDIA GPU and its driver ({reason})"


def _parse(trt: Any, builder: Any, log: Any, onnx: str) -> tuple[Any, Any]:
    """The network of an ONNX file, and the parser, which must live as long."""
    flags = trt.NetworkDefinitionCreationFlag.__members__
    if "STRONGLY_TYPED" not in flags:
        raise Refused("missing", f"{trt.__version__} is too old: strongly typed networks came with TensorRT 10")
    network = builder.create_network(1 << int(flags["STRONGLY_TYPED"]))
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(onnx):
        return network, parser
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if not any(error.node_operator() for error in errors):
        reason = errors[0].desc() if errors else (log.errors or ["no reason given"])[0]
        raise Refused("damaged", f"is cut off or not an ONNX file ({' '.join(reason.split())})")
    raise Refused("refused", _blame(trt, builder, log, onnx) or _sentence(errors))


def _let_attention_fall_apart(trt: Any, network: Any) -> None:
    """Let attention be several kernels where no fused one fits, as with heads of 8; otherwise the build would fail."""
    kind = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)
    for number in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(number)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionOutputLayer  # Python gets every layer as a plain ILayer
            layer.attention.decomposable = True


def _blame(trt: Any, builder: Any, log: Any, onnx: str) -> str:
    """All nodes that will not parse, where this version can tell; parsing itself stops at the first."""
    if not hasattr(trt.OnnxParser, "supports_model_v2"):
        return ""
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    parser.supports_model_v2(Path(onnx).read_bytes(), onnx)
    return _sentence([parser.get_error(i) for i in range(parser.num_errors)])


def _sentence(errors: list[Any]) -> str:
    """What is wrong with which nodes; each node once."""
    found: dict[str, str] = {}
    for error in errors:
        if error.node_operator():
            reason = " ".join(error.desc().split()).rstrip(".")
            found.setdefault(error.node_name(), f"{error.node_name()} of type {error.node_operator()} ({reason})")
    more = len(found) - NODES_NAMED
    nodes = "; ".join(list(found.values())[:NODES_NAMED])
    return f"cannot parse the node {nodes}{f' and {more} more' if more > 0 else ''}" if found else ""


def _targets(trt: Any) -> dict[str, Any]:
    """Compute capabilities that engines can be built for without their GPU: {'8.6': SM86, ...}."""
    members = getattr(trt, "ComputeCapability", None)
    names = {} if members is None else members.__members__
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in names.items() if name.startswith("SM")}


def _set_targets(trt: Any, config: Any, request: Mapping[str, Any]) -> list[str]:
    """Ask for the compute capabilities; those that the plan will be good for."""
    wanted = request["compute_capabilities"]
    if request["module"] != "tensorrt_rtx":  # TensorRT 11 has the same calls, and takes the current GPU alone
        return _check_current(wanted)
    known = _targets(trt)
    for one in wanted:
        if one not in known:
            raise Refused(
                "input",
                f"{trt.__version__} builds no engines for compute capability {one}, only for {', '.join(known)}; "
                "use the runtime tensorrt and build on the device itself",
            )
    if not wanted:
        return ["8.6+"]  # what its documentation promises where nothing is asked for
    config.num_compute_capabilities = len(wanted)
    for place, one in enumerate(wanted):
        if not config.set_compute_capability(known[one], place):  # it would build for another GPU without a word
            raise Refused("input", f"{trt.__version__} does not take compute capability {one}")
    return wanted


def _check_current(wanted: list[str]) -> list[str]:
    """Classic TensorRT builds for the GPU that it runs on, and for no other."""
    from vitprune.errors import MissingError

    from ._cuda import open_cuda

    try:
        current = open_cuda().device().compute_capability
    except MissingError as error:
        raise Refused("missing", f"builds on the device itself, and {error}") from error
    if wanted and wanted != [current]:
        raise Refused(
            "input",
            f"builds for the GPU that it runs on, which has compute capability {current}, not for "
            f"{', '.join(wanted)}; build on that device",
        )
    return [current]


def _add_profile(builder: Any, config: Any, network: Any, shapes: Mapping[str, Any]) -> None:
    """One optimisation profile; the caller has checked that min <= opt <= max."""
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    if shapes.keys() != inputs.keys():
        raise Refused("input", f"needs a profile for {', '.join(sorted(inputs))}, got {', '.join(sorted(shapes))}")
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in shapes.items():
        fixed = _tensor(inputs[name])["shape"]
        fits = len(least) == len(fixed) and all(
            isinstance(size, str) or size == low == high for size, low, high in zip(fixed, least, most, strict=True)
        )
        if not fits:
            raise Refused("input", f"needs a profile for {name} within {fixed}, got {least} to {most}")
        profile.set_shape(name, least, best, most)
    if config.add_optimization_profile(profile) < 0:
        raise Refused("input", f"does not take the profile {json.dumps(shapes)}")


def _set_timing_cache(config: Any, path: str | None) -> Path | None:
    """Start from the cache in ``path``; where the cache is to be written afterwards."""
    if path is None or not hasattr(config, "create_timing_cache"):
        return None
    file = Path(path)
    known = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)  # of another GPU or version: start anew
    return file


def _explain(log: Any, request: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and sentence of a build that came to nothing."""
    text = "; ".join(dict.fromkeys(log.errors[-3:])) or "no reason given"
    if "out of memory" in text.lower() or "outofmemory" in text.lower():
        return "missing", f"ran out of memory while building; lower workspace_mb or the largest batch ({text})"
    if "cudaErrorInsufficientDriver" in text or "CUDA initialization failure" in text:
        return "missing", f"needs an NVIDIA driver for this build ({text})"
    if "Turing" in text:
        return "input", f"cannot build this graph for compute capability 7.5; leave that out or use fp16 ({text})"
    return "refused", f"parses the graph and cannot build it: {text}"


def _tensor(tensor: Any) -> dict[str, Any]:
    """Name, type and shape of an input or output; a free size is a name."""
    shape: list[int | str] = []
    for axis, size in enumerate(tensor.shape):
        name = tensor.get_dimension_name(axis) or ("batch" if axis == 0 else f"axis_{axis}")
        shape.append(size if size >= 0 else name)
    return {"name": tensor.name, "dtype": TYPES.get(tensor.dtype.name, tensor.dtype.name.lower()), "shape": shape}


if __name__ == "__main__":
    main()
