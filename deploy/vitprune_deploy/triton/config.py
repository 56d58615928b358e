"""The configuration of a model in Triton, derived from what a build found out about it.

Fields: https://github.com/triton-inference-server/common, ``protobuf/model_config.proto``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..backends.base import TensorSpec
from ..runtime import preprocess_of
from .engine import Engine
from .pbtxt import Word, entries
from .providers import placement, provider_of

LABELS = "labels.txt"
TYPES = {
    "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "float64": "FP64", "int64": "INT64", "int32": "INT32",
    "int8": "INT8", "uint8": "UINT8", "bool": "BOOL",
}  # fmt: skip


def model_config(engines: Sequence[Engine], name: str, plans: Mapping[str, str], queue_delay_us: int) -> dict[str, Any]:
    """The message ``ModelConfig``, as ``pbtxt.to_text`` takes it.

    Args:
        engines: one, or those of several GPUs that take and give the same tensors.
        plans: compute capability -> file of the engine for it; empty where there is one engine.
        queue_delay_us: microseconds that a request may wait for others to share its batch.

    Raises:
        InputError: Triton cannot run the engine as the build did.
    """
    first, batched = engines[0], all(engine.batched for engine in engines)
    most = min(engine.batch[1] for engine in engines) if batched else 0
    labels = {"label_filename": LABELS} if class_names(first) else {}
    config: dict[str, Any] = {
        "name": name,
        "backend": first.backend,
        "max_batch_size": most,
        "input": [_tensor(spec, batched) for spec in first.inputs],
        "output": [_tensor(spec, batched) | labels for spec in first.outputs],
        **placement(first),
    }
    if plans:
        config["cc_model_filenames"] = entries(plans)
    if most > 1:
        config["dynamic_batching"] = _batching(first, most, queue_delay_us)
    config["model_warmup"] = [_warm_up(first, batched, size) for size in sorted({1, max(most, 1)})]
    config["parameters"] = entries({key: {"string_value": text} for key, text in _parameters(engines).items()})
    return config


def class_names(engine: Engine) -> tuple[str, ...]:
    """Names of the classes in the order of the logits, each on one line; empty where the build knew none."""
    found = (engine.manifest.model_extra or {}).get("classes") or ()
    return tuple(" ".join(str(name).split()) for name in found)


def dims(spec: TensorSpec) -> list[int]:
    """The shape, with -1 for a free size."""
    return [size if isinstance(size, int) else -1 for size in spec.shape]


def _tensor(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    """An input or output; the batch is no part of its shape where Triton makes it."""
    return {"name": spec.name, "data_type": _type(spec), "dims": dims(spec)[1:] if batched else dims(spec)}


def _type(spec: TensorSpec) -> Word:
    return Word(f"TYPE_{TYPES[spec.dtype]}")


def _batching(engine: Engine, most: int, queue_delay_us: int) -> dict[str, Any]:
    """Preferred sizes are for plans with several profiles alone: elsewhere they only keep requests waiting."""
    preferred = sorted({size for size in engine.profiles if size <= most})
    sizes = {"preferred_batch_size": preferred} if len(engine.profiles) > 1 else {}
    return {**sizes, "max_queue_delay_microseconds": queue_delay_us}


def _warm_up(engine: Engine, batched: bool, size: int) -> dict[str, Any]:
    """A request of ``size`` images before the first user's; free sizes are those that the build was judged at."""
    known = {0: engine.batch[0], **dict(zip((2, 3), engine.manifest.budget.image_size, strict=True))}
    inputs = {}
    for spec in engine.inputs:
        shape = [known[axis] if length == -1 else length for axis, length in enumerate(dims(spec))]
        inputs[spec.name] = {
            "data_type": _type(spec),
            "dims": shape[1:] if batched else shape,
            "zero_data": True,
        }
    return {"name": f"batch of {size}", "batch_size": size, "inputs": entries(inputs)}


def _parameters(engines: Sequence[Engine]) -> dict[str, str]:
    """What a client must know to prepare images, where the model is from, and what the backend reads."""
    first = engines[0]
    found = {"vitprune.preprocess": json.dumps(preprocess_of(first.manifest, first.folder).to_dict())}
    for engine in engines:
        which = "" if len(engines) == 1 else "." + "+".join(engine.capabilities)
        found[f"vitprune.manifest_sha256{which}"] = engine.manifest_sha256
    threads = first.manifest.device.get("threads")
    if threads and first.backend == "onnxruntime" and provider_of(first) == "cpu":
        found["intra_op_thread_count"] = str(threads)
    return found
