"""OpenVINO by itself: x86 processors of any make, and Intel's GPUs. It reads the same ONNX files as ONNX Runtime.

Options of ``load``:
    precision: what it computes in: fp32, bf16 or fp16; fp32. Weights stay as the file has them.
    device: OpenVINO's name for one: CPU, GPU, NPU; CPU.
    sizes: sizes of free dimensions by name, besides ``batch``; a graph with all of them fixed is specialised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitprune.errors import DamagedFile, InputError, MissingError, NotSupported

from ._onnx_file import axes
from ._threads import task_ids
from .base import Backend, TensorSpec, known_options

OPTIONS = ("precision", "device", "sizes")
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # of INFERENCE_PRECISION_HINT
UNITS = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}  # among OPTIMIZATION_CAPABILITIES
NUMPY = {"f32": "float32", "f16": "float16", "f64": "float64", "i64": "int64", "i32": "int32"}


class OpenVino(Backend):
    """A compiled model. Its threads belong to the process: all models of OpenVINO share them."""

    _pool: set[int] = set()  # noqa: RUF012  (shared on purpose)

    def __init__(self, compiled: Any, inputs: tuple[TensorSpec, ...], device: str) -> None:
        self._compiled, self._request = compiled, compiled.create_infer_request()
        self.runtime, self.provider = f"openvino {_version()}", device.lower()
        self.inputs = inputs
        self.outputs = tuple(_spec(port, _sizes(port)) for port in compiled.outputs)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        threads: int | None = None,
        batch: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> OpenVino:
        """The model compiled for one request at a time, in exactly the precision asked for."""
        options = known_options("openvino", options, OPTIONS)
        if not path.is_file():
            raise InputError(f"{path}: there is no such model file")
        device, precision = options.get("device", "CPU"), options.get("precision", "fp32")
        core = _import().Core()
        _check_units(core, device, precision)
        sizes = {**options.get("sizes", {}), **({} if batch is None else {"batch": batch})}
        settings = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        before = task_ids()
        try:
            model = core.read_model(str(path))
            inputs = _named(model, axes(path), sizes)
            if sizes:
                model.reshape({spec.name: _partial(spec.shape) for spec in inputs})
            compiled = core.compile_model(model, device, settings)
        except Exception as error:  # its exceptions share no base but Exception
            text = " ".join(str(error).split())
            raise DamagedFile(f"{path} is cut off or not a model that this OpenVINO reads: {text}") from error
        cls._pool |= task_ids() - before
        return cls(compiled, inputs, device)

    def run(self, images: np.ndarray) -> np.ndarray:
        """The first output, a copy of it."""
        if len(self.inputs) != 1:
            raise InputError(f"this model has {len(self.inputs)} inputs ({', '.join(i.name for i in self.inputs)})")
        self.refuse_misfit({self.inputs[0].name: images})
        self._request.infer({self.inputs[0].name: np.ascontiguousarray(images)}, share_inputs=True)
        return np.array(self._request.get_output_tensor(0).data)

    def bind(self, feed: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """One run of a request of its own, whose input tensors lie in the arrays' memory."""
        self.refuse_misfit(feed)
        request, tensor = self._compiled.create_infer_request(), _import().Tensor
        arrays = {name: np.ascontiguousarray(array) for name, array in feed.items()}
        for name, array in arrays.items():
            request.set_tensor(name, tensor(array, shared_memory=True))
        before = task_ids()
        request.infer()
        OpenVino._pool |= task_ids() - before  # some threads start with the first run

        def once() -> float:
            assert arrays  # tensors only point at them
            start = time.perf_counter_ns()
            request.infer()
            return (time.perf_counter_ns() - start) / 1e6

        return once

    def thread_ids(self) -> list[int]:
        """The threads that OpenVINO has in this process, besides the caller."""
        return sorted(self._pool & task_ids())

    def close(self) -> None:
        """Let go of the model; the threads stay."""
        self._compiled = self._request = None


def _check_units(core: Any, device: str, precision: str) -> None:
    """Raise what is wrong with a device or a precision; OpenVINO would compute in another one without a word."""
    if precision not in HINTS:
        raise InputError(f"openvino computes in {', '.join(HINTS)}, got {precision!r}")
    if device.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
        raise MissingError(f"OpenVINO has no device {device!r} here, it has {', '.join(core.available_devices)}")
    able = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if UNITS[precision] not in able:
        raise NotSupported(f"{device} has no units for {precision} here, OpenVINO names {', '.join(able)}; use fp32")


def _named(model: Any, known: Mapping[str, tuple[int | str, ...]], sizes: Mapping[str, int]) -> tuple[TensorSpec, ...]:
    """The inputs with the names of free sizes, which OpenVINO drops, and those in ``sizes`` fixed."""
    found = []
    for port in model.inputs:
        shape = known.get(port.get_any_name(), _sizes(port))
        found.append(_spec(port, tuple(sizes.get(size, size) if isinstance(size, str) else size for size in shape)))
    return tuple(found)


def _spec(port: Any, shape: tuple[int | str, ...]) -> TensorSpec:
    kind = port.get_element_type().get_type_name()
    return TensorSpec(port.get_any_name(), shape, NUMPY.get(kind, kind))


def _sizes(port: Any) -> tuple[int | str, ...]:
    """The sizes of an input or output; a free one is called by its place, and ``batch`` where that is the first."""
    names = ("batch", *(f"size{i}" for i in range(1, 16)))
    return tuple(name if dim.is_dynamic else dim.get_length() for name, dim in zip(names, port.get_partial_shape()))


def _partial(shape: tuple[int | str, ...]) -> Any:
    return _import().PartialShape([-1 if isinstance(size, str) else size for size in shape])


def _import() -> Any:
    """The module ``openvino``; by name, since this file bears the same one."""
    try:
        import openvino
    except ImportError as error:
        raise MissingError(f"openvino cannot be imported ({error}); run `pip install 'vitprune[openvino]'`") from error
    return openvino


def _version() -> str:
    return str(_import().__version__).split("-")[0]
