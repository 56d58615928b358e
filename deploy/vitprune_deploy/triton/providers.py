"""Where Triton is to run an engine, and through which of ONNX Runtime's providers with which options.

Names of options: the README of https://github.com/triton-inference-server/onnxruntime_backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitprune.errors import InputError

from ..backends.onnxruntime import PROVIDERS
from .engine import Engine
from .pbtxt import Word, entries

ON_GPU = ("cuda", "tensorrt")
# options of the TensorRT provider: Triton refuses a name that it does not know, and gives some of them another
MODES = {"trt_fp16_enable": "FP16", "trt_bf16_enable": "BF16", "trt_int8_enable": "INT8"}  # of precision_mode
RENAMED = {
    "trt_max_workspace_size": "max_workspace_size_bytes",
    "trt_int8_calibration_table_name": "int8_calibration_table_name",
    "trt_int8_use_native_calibration_table": "int8_use_native_calibration_table",
}
KEPT = frozenset(
    f"trt_{name}"
    for name in (
        "auxiliary_streams", "build_heuristics_enable", "builder_optimization_level", "context_memory_sharing_enable",
        "cuda_graph_enable", "detailed_build_log", "dla_core", "dla_enable", "dump_ep_context_model", "dump_subgraphs",
        "engine_cache_enable", "engine_cache_path", "engine_cache_prefix", "ep_context_embed_mode",
        "ep_context_file_path", "extra_plugin_lib_paths", "force_sequential_engine_build", "force_timing_cache",
        "layer_norm_fp32_fallback", "max_partition_iterations", "min_subgraph_size", "profile_max_shapes",
        "profile_min_shapes", "profile_opt_shapes", "sparsity_enable", "tactic_sources", "timing_cache_enable",
        "timing_cache_path",
    )
)  # fmt: skip


def placement(engine: Engine) -> dict[str, Any]:
    """The fields ``instance_group`` and, where a provider has to be named, ``optimization``.

    Raises:
        InputError: Triton does not have the provider, or does not pass on one of its options.
    """
    if engine.backend == "tensorrt":
        profiles = [str(number) for number in range(len(engine.profiles))]
        return {"instance_group": [{"count": 1, "kind": Word("KIND_GPU"), "profile": profiles}]}
    provider = provider_of(engine)
    group = [{"count": 1, "kind": Word("KIND_GPU" if provider in ON_GPU else "KIND_CPU")}]
    accelerators = _on_gpu(engine, provider) if provider in ON_GPU else _on_cpu(engine, provider)
    optimization = {"optimization": {"execution_accelerators": accelerators}} if accelerators else {}
    return {"instance_group": group, **optimization}


def provider_of(engine: Engine) -> str:
    """Our name of the provider on which the build ran an ONNX file."""
    given = str(engine.options.get("provider", "cpu"))
    return next((short for short, name in PROVIDERS.items() if given.lower() in (short, name.lower())), given)


def _on_cpu(engine: Engine, provider: str) -> dict[str, Any]:
    if provider not in ("cpu", "openvino"):
        raise InputError(
            f"{engine.folder} was built for ONNX Runtime's provider {provider}, which Triton does not have; "
            "build for cpu, openvino, cuda or tensorrt"
        )
    options = engine.options.get("provider_options")
    if options:
        raise InputError(
            f"{engine.folder} was built with options for {provider} ({', '.join(options)}), and Triton passes it none; "
            "build for cpu without runtime.options"
        )
    return {"cpu_execution_accelerator": [{"name": "openvino"}]} if provider == "openvino" else {}


def _on_gpu(engine: Engine, provider: str) -> dict[str, Any]:
    given = engine.options.get("provider_options") or {}
    texts = {key: str(int(value) if isinstance(value, bool) else value) for key, value in given.items()}
    options = _tensorrt_options(engine, texts) if provider == "tensorrt" else texts
    if provider == "cuda" and not options:  # it is what a GPU instance runs on in any case
        return {}
    parameters = {"parameters": entries(options)} if options else {}
    return {"gpu_execution_accelerator": [{"name": provider, **parameters}]}


def _tensorrt_options(engine: Engine, options: Mapping[str, str]) -> dict[str, str]:
    """Options of the TensorRT provider under Triton's names."""
    modes = [mode for key, mode in MODES.items() if options.get(key, "0").lower() in ("1", "true")]
    if len(modes) > 1:
        raise InputError(f"{engine.folder} was built with {' and '.join(modes)} together, and Triton takes one of them")
    found = {"precision_mode": modes[0]} if modes else {}
    for key, value in options.items():
        if key not in MODES and key not in RENAMED and key not in KEPT:
            raise InputError(f"{engine.folder} was built with the option {key}, which Triton does not pass to TensorRT")
        if key not in MODES:
            found[RENAMED.get(key, key)] = value
    return found
