"""Execution providers that come as packages of their own and are loaded into a running ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from vitprune.errors import InputError, MissingError

from .openvino import HINTS

OPENVINO = "OpenVINOExecutionProvider"
TENSORRT_RTX = "NvTensorRTRTXExecutionProvider"


class Plugin(NamedTuple):
    """The package of a provider: its module and what pip calls it."""

    module: str
    distribution: str


PLUGINS = {
    OPENVINO: Plugin("onnxruntime_ep_openvino", "onnxruntime-ep-openvino"),
    TENSORRT_RTX: Plugin("onnxruntime_ep_nv_tensorrt_rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13"),
}


def is_installed(provider: str) -> bool:
    """Whether the package of ``provider`` is here; it is not loaded."""
    return provider in PLUGINS and find_spec(PLUGINS[provider].module) is not None


def add(session_options: Any, provider: str, options: Mapping[str, Any], threads: int | None) -> None:
    """Have a session run on ``provider``.

    Args:
        options: of the provider. OpenVINO's ``device_type`` is CPU by default, GPU or NPU.
        threads: processor threads that work on one batch.

    Raises:
        InputError: OpenVINO has no such device here, or its load_config is no JSON object.
        MissingError: as ``devices``.
    """
    found, given = devices(provider), {name: _text(value) for name, value in options.items()}
    if provider == OPENVINO:
        device = given.pop("device_type", "CPU")
        found = _of_type(found, device)
        if threads is not None:
            given["load_config"] = _with_threads(given.get("load_config", "{}"), device, threads)
    session_options.add_provider_for_devices(list(found[:1]), given)


def devices(provider: str) -> tuple[Any, ...]:
    """What ``provider`` can run on here; its library is loaded at the first call, and stays.

    Raises:
        MissingError: the library does not load, or finds no device.
    """
    import onnxruntime

    _register(provider)
    found = tuple(device for device in onnxruntime.get_ep_devices() if device.ep_name == provider)
    if not found:
        served = "Intel's processors and GPUs" if provider == OPENVINO else "NVIDIA's RTX GPUs"
        raise MissingError(f"{provider} runs on {served} alone, and finds none here")
    return found


@lru_cache(maxsize=len(PLUGINS))
def _register(provider: str) -> None:
    """Load the library of ``provider`` into ONNX Runtime, once in this process."""
    import onnxruntime

    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise MissingError(
            f"onnxruntime {onnxruntime.__version__} loads no providers from other packages; "
            "run `pip install --upgrade 'onnxruntime>=1.23'`"
        )
    try:
        library = import_module(PLUGINS[provider].module).get_library_path()
        onnxruntime.register_execution_provider_library(provider, library)
    except Exception as error:  # its exceptions share no base but Exception
        raise MissingError(f"{provider} did not load: {' '.join(str(error).split())}") from error


def precision_options(precision: str, device: str = "CPU") -> dict[str, str]:
    """Options with which OpenVINO computes in ``precision``, whatever it would choose."""
    return {"load_config": json.dumps({device: {"INFERENCE_PRECISION_HINT": HINTS[precision]}})}


def _with_threads(load_config: str, device: str, threads: int) -> str:
    """OpenVINO's configuration with a number of threads, unless it has one: the plugin passes num_of_threads over."""
    try:
        config = json.loads(load_config)
        of_device = config.setdefault(device, {})
        of_device.setdefault("INFERENCE_NUM_THREADS", str(threads))
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"runtime.options: load_config must be a JSON object of devices and their settings, got {load_config!r}"
        ) from error
    return json.dumps(config)


def _of_type(found: tuple[Any, ...], wanted: str) -> tuple[Any, ...]:
    """OpenVINO's devices of one type."""
    fitting = tuple(device for device in found if device.ep_metadata.get("ov_device", "CPU").split(".")[0] == wanted)
    if not fitting:
        there = ", ".join(sorted({device.ep_metadata.get("ov_device", "CPU") for device in found}))
        raise InputError(f"OpenVINO has no device {wanted!r} here, it has {there}")
    return fitting


def _text(value: Any) -> str:
    """A provider's option as ONNX Runtime takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
