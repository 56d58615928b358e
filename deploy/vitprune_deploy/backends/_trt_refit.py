"""New weights in a built engine, in TensorRT's child process; this needs the GPU that the engine is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._trt_common import Refused, Send, gpu, load, logger

NAMED = 3  # of the weights that are missing


def refit(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Write the engine ``request['engine']`` with the weights of ``request['onnx']`` to ``request['plan']``."""
    trt = load(request["module"])
    here, why = gpu()
    if here is None:
        raise Refused("missing", f"changes weights on the GPU that the engine is for, and {why}")
    log = logger(trt)
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
