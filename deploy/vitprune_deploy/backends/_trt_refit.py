"""New weights in a built engine, in TensorRT's child process; this needs the GPU that the engine is for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._trt_common import Refused, Send, gpu, load, logger
from ._trt_sidecar import sidecar_path
from ._trt_sparse import fitting_layers

NAMED = 3  # of the weights that are missing


def refit(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Write the engine ``request['engine']`` with the weights of ``request['onnx']`` to ``request['plan']``."""
    trt = load(request["module"])
    here, why = gpu()
    if here is None:
        raise Refused("missing", f"changes weights on the GPU that the engine is for, and {why}")
    log = logger(trt)
    check_zeros(trt, log, Path(request["engine"]), request["onnx"])
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = request["host_code"]
    engine = runtime.deserialize_cuda_engine(Path(request["engine"]).read_bytes())
    if engine is None:
        raise Refused("missing", f"cannot load {request['engine']} on {here['name']} ({_last(log)})")
    if not engine.refittable:
        raise Refused("input", f"cannot refit {request['engine']}: it was not built for that")
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(request["onnx"]):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise Refused("input", f"does not take the weights: {'; '.join(errors) or _last(log)}")
    missing = refitter.get_missing_weights()
    if missing:
        raise Refused("input", f"finds no new weights for {', '.join(missing[:NAMED])}: the file is of another model")
    if not refitter.refit_cuda_engine():
        raise Refused("refused", f"could not put the weights in: {_last(log)}")
    Path(request["plan"]).write_bytes(bytes(engine.serialize_with_config(_whole(trt, engine))))
    return {"version": trt.__version__, "gpu": here}


def check_zeros(trt: Any, log: Any, engine: Path, onnx: str) -> None:
    """Whether the weights that the engine's kernels may take for 2:4 are so in the new file too.

    Raises:
        Refused: in some layers they are not: such kernels would leave out what is no zero; or the file cannot be read.
    """
    skipped = _skipped(engine)
    if not skipped:
        return
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)  # lives as long as the network, which reads its weights
    if not parser.parse_from_file(onnx):
        raise Refused("input", f"cannot read {onnx}: {_last(log)}")
    held = set(fitting_layers(trt, network))
    crowded = [name for name in skipped if name not in held]
    if crowded:
        raise Refused(
            "input",
            f"does not take the weights: those of {', '.join(crowded[:NAMED])} are not 2:4, and its kernels skip two "
            "of every four; prune them to the pattern, or build an engine from the file",
        )


def _skipped(engine: Path) -> list[str]:
    """The 2:4 layers of an engine, by its sidecar; none where it is known to have no kernels that skip zeros."""
    path = sidecar_path(engine)
    said = json.loads(path.read_text()).get("sparse") if path.is_file() else None
    return said["fitting"] or [] if said and said["used"] != 0 else []


def _whole(trt: Any, engine: Any) -> Any:
    """How the engine is written: with its weights, and so that it can be refitted again."""
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    again = trt.SerializationFlag.__members__.get("INCLUDE_REFIT")  # TensorRT 10.14; without it, before, all remain so
    if again is not None:
        config.set_flag(again)
    return config


def _last(log: Any) -> str:
    return log.errors[-1] if log.errors else "no reason given"
