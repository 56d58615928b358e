"""The process in which TensorRT parses, builds and refits: one JSON line in, JSON lines out.

A build can crash, hang or fill the memory, and its libraries print on the C level; so it never runs in the caller's
process. One code path serves TensorRT 10, TensorRT 11 and TensorRT-RTX: what differs is found by looking for the
name, never by comparing versions. Run by ``backends.tensorrt``; the lines are

    {"progress": [phase, steps done, steps in all]}     any number of them
    {"result": {...}}  or  {"error": [kind, message]}     the last one
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import _trt_census as census
from . import _trt_sparse as sparse
from ._trt_common import Refused, Send, gpu, load, logger
from ._trt_config import RTX, Timings, add_profile, set_flags, set_targets, targets, tensor_facts
from ._trt_refit import refit

NODES_NAMED = 3  # of a model that cannot be parsed


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
    trt = load(request["module"])
    _builder(trt, logger(trt))
    return {"version": trt.__version__, "compute_capabilities": list(targets(trt)) if _is_rtx(request) else ["current"]}


def check(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Nothing, if the file parses."""
    trt = load(request["module"])
    log = logger(trt)
    builder = _builder(trt, log)
    _parse(trt, builder, log, request["onnx"])
    return {}


def build(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Write the plan to ``request['plan']``; what the sidecar says of it."""
    trt = load(request["module"])
    log = logger(trt)
    builder = _builder(trt, log)
    network, parser = _parse(trt, builder, log, request["onnx"])
    _let_attention_fall_apart(trt, network)
    held = census.of_network(trt, network)
    census.check_network(held, request["format"], request["weights"])
    fitting = sparse.fitting_layers(trt, network) if request["sparse"] else []
    here, why = gpu()
    config = builder.create_builder_config()
    asked = {
        "compute_capabilities": set_targets(trt, config, request, here, why),
        "flags": set_flags(trt, config, request, here),
    }
    timings = _configure(trt, builder, config, network, request, here)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = monitor = _monitor(trt, send)  # noqa: F841  (TensorRT does not keep it alive)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused(*_explain(log, request))
    inspected = None if here is None else census.inspect(trt, log, plan, request)
    counted = _counted(plan, held, request, here, inspected)
    found = sparse.account(log.sparsity, fitting, inspected) if request["sparse"] else None
    del parser  # not before: the network reads the parser's weights
    with Path(request["plan"]).open("wb") as file:
        file.write(plan)
    return {
        "runtime": request["module"],
        "version": trt.__version__,
        "gpu": here,
        "inputs": [tensor_facts(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [tensor_facts(network.get_output(i)) for i in range(network.num_outputs)],
        "profiles": request["profiles"],
        **asked,
        "hardware_compatibility": request["hardware_compatibility"],
        "timing_cache": timings.keep(),
        "layers": network.num_layers,
        "census": counted,
        "sparse": found,
    }


def _configure(
    trt: Any, builder: Any, config: Any, network: Any, request: Mapping[str, Any], here: Mapping[str, Any] | None
) -> Timings:
    """Shapes, memory, and the timings that the build starts from."""
    for profile in request["profiles"]:
        add_profile(builder, config, network, profile)
    if request["workspace_mb"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mb"] << 20)
    return Timings(trt, config, request["timing_cache"], here)


ACTIONS = {"describe": describe, "check": check, "build": build, "refit": refit}


def _is_rtx(request: Mapping[str, Any]) -> bool:
    return request["module"] == RTX


def _counted(
    plan: Any,
    network: Mapping[str, Any],
    request: Mapping[str, Any],
    here: Mapping[str, Any] | None,
    inspected: str | None,
) -> dict[str, Any]:
    """The census of a plan, which is refused if it is not in the precision asked for, and what proves that it is."""
    engine = None if inspected is None else census.of_inspection(inspected)
    proof = "network"
    if engine is not None and census.tells(engine):
        census.check_engine(engine, network, request["format"])
        proof = "inspector"
    # with several profiles a plan may hold weights several times
    elif here is None and len(request["profiles"]) == 1 and census.check_size(plan.nbytes, network, request["format"]):
        proof = "size"
    return {"asked": request["format"], "proof": proof, "network": network, "engine": engine}


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


if __name__ == "__main__":
    main()
