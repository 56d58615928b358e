"""TensorRT 10, TensorRT 11 and TensorRT-RTX: engines built in a child process, run through name-based tensors.

Building is in ``_trt_engine``, what lies beside a plan in ``_trt_sidecar``. An engine may have several optimisation
profiles; each batch runs in the one that is tuned for its shape, or for the nearest that takes it.

Options of ``load``:
    module: ``tensorrt`` or ``tensorrt_rtx``; by default, what the sidecar says.
    profile: number of the optimisation profile for all batches; by default, the best one for each.
    cuda: the package that reaches CUDA: ``cuda.bindings`` or ``pycuda``; by default, the first that is installed.
    copies: whether a timed run includes copying from and to the host, as on every other runtime; True.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitprune.errors import InputError, MissingError

from ._cuda import Cuda, open_cuda
from ._trt_child import sentence
from ._trt_engine import EngineOptions, Shapes, build_engine, capabilities, check_module, check_parses, refit_engine
from ._trt_sidecar import engine_name, read_sidecar, sidecar_path
from .base import Backend, TensorSpec, known_options, number_format

__all__ = [
    "EngineOptions",
    "Shapes",
    "TensorRT",
    "build_engine",
    "capabilities",
    "check_parses",
    "engine_name",
    "read_sidecar",
    "refit_engine",
    "sidecar_path",
]

OPTIONS = ("module", "profile", "cuda", "copies")
WARM_UP_S = 0.2  # as trtexec does; TensorRT-RTX compiles its kernels in the first runs


class _Buffers(NamedTuple):
    """Memory for one set of shapes: page-locked on the host, and an address on the GPU, by tensor."""

    profile: int  # in which they run
    host: dict[str, np.ndarray]
    device: dict[str, int]


class TensorRT(Backend):
    """An engine, its execution contexts, and memory on the GPU for its tensors. Not for several threads at once."""

    def __init__(self, trt: Any, engine: Any, cuda: Cuda, profile: int | None, copies: bool) -> None:
        self._trt, self._engine, self._cuda, self._copies = trt, engine, cuda, copies
        count = engine.num_optimization_profiles
        if profile is not None and not 0 <= profile < count:
            raise InputError(f"this engine has {count} profiles, there is no {profile}")
        self._profiles = list(range(count)) if profile is None else [profile]
        self._stream = cuda.stream()
        self._contexts: dict[int, Any] = {}
        self._context(self._profiles[0])  # a GPU without the memory for one says so now
        self._deserializer: Any = None
        self._all: list[_Buffers] = []
        self._selected: dict[int, _Buffers] = {}  # those whose shapes and addresses each context knows
        self._last: _Buffers | None = None  # those of the last run
        self.runtime = f"{trt.__name__} {trt.__version__}"
        self.provider = "cuda"
        specs = [self._spec(engine.get_tensor_name(i)) for i in range(engine.num_io_tensors)]
        is_input = [engine.get_tensor_mode(spec.name) == trt.TensorIOMode.INPUT for spec in specs]
        self.inputs = tuple(spec for spec, enters in zip(specs, is_input) if enters)
        self.outputs = tuple(spec for spec, enters in zip(specs, is_input) if not enters)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        threads: int | None = None,
        batch: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> TensorRT:
        """An engine from its plan file; ``threads`` and ``batch`` change nothing on a GPU, the profile does."""
        options = known_options("tensorrt", options, OPTIONS)
        sidecar = read_sidecar(path)
        module = options.get("module", sidecar["runtime"])
        check_module(module)
        trt = _import(module)
        cuda = open_cuda(options.get("cuda"))  # before TensorRT asks: its answer without a driver is no sentence
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = _deserialize(trt, runtime, path, sidecar)
        backend = cls(trt, engine, cuda, options.get("profile"), options.get("copies", True))
        backend._deserializer = runtime  # which has to outlive its engine
        return backend

    def run(self, images: np.ndarray) -> np.ndarray:
        """The first output for ``images``; memory is kept for the next call with images of the same shape."""
        if len(self.inputs) != 1:
            raise InputError(f"this engine has {len(self.inputs)} inputs ({', '.join(i.name for i in self.inputs)})")
        feed = {self.inputs[0].name: images}
        profile = self._check(feed)
        if self._last is None or self._last.host[self.inputs[0].name].shape != images.shape:
            if self._last is not None:
                self._free(self._last)
            self._last = self._allocate(feed, profile)
        self._last.host[self.inputs[0].name][...] = images
        self._enqueue(self._last, copies=True)
        self._cuda.synchronize(self._stream)
        return np.array(self._last.host[self.outputs[0].name])

    def bind(self, feed: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """One run between two CUDA events, after a warm-up of a fixed time."""
        buffers = self._allocate(feed, self._check(feed))
        for name, array in feed.items():
            buffers.host[name][...] = array
        self._enqueue(buffers, copies=True)  # so that the inputs are there also if no run copies them
        first, last = self._cuda.event(), self._cuda.event()

        def once() -> float:
            self._select(buffers)
            self._cuda.record(first, self._stream)
            self._enqueue(buffers, self._copies)
            self._cuda.record(last, self._stream)
            self._cuda.synchronize(self._stream)
            return self._cuda.elapsed_ms(first, last)

        end = time.monotonic() + WARM_UP_S
        while time.monotonic() < end:
            once()
        return once

    def layers(self) -> dict[str, Any]:
        """What the engine's inspector says of its layers; names alone unless it was built to say more."""
        found = self._engine.create_engine_inspector().get_engine_information(self._trt.LayerInformationFormat.JSON)
        return json.loads(found)

    def close(self) -> None:
        """Free the memory on the GPU."""
        for buffers in list(self._all):
            self._free(buffers)
        self._contexts.clear()  # before their engine
        self._last = self._engine = self._deserializer = None

    def _context(self, profile: int) -> Any:
        """The execution context of a profile: one each, since switching a context between profiles takes time."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, self._cuda.handle(self._stream)):
                raise MissingError("TensorRT made no execution context; the GPU has too little memory left")
            if hasattr(context, "nvtx_verbosity"):  # details, which the engine was built with, would slow down each run
                context.nvtx_verbosity = self._trt.ProfilingVerbosity.LAYER_NAMES_ONLY
            self._contexts[profile] = context
        return self._contexts[profile]

    def _spec(self, name: str) -> TensorSpec:
        """An input or output; free sizes are named by their axis."""
        names = ("batch", *(f"axis_{i}" for i in range(1, 9)))  # an engine has no names for its axes
        shape = tuple(s if s >= 0 else n for s, n in zip(self._engine.get_tensor_shape(name), names))
        dtype = self._engine.get_tensor_dtype(name)
        narrow = getattr(dtype, "name", "") == "BF16"  # numpy has no such type, so nptype raises
        return TensorSpec(name, shape, "bfloat16" if narrow else np.dtype(self._trt.nptype(dtype)).name)

    def _check(self, feed: Mapping[str, np.ndarray]) -> int:
        """The profile that takes ``feed`` and is tuned for the shapes nearest to it; InputError if none takes it."""
        wanted = {spec.name: spec for spec in self.inputs}
        if feed.keys() != wanted.keys():
            raise InputError(f"this engine's inputs are {', '.join(sorted(wanted))}, got {', '.join(sorted(feed))}")
        found = dict.fromkeys(self._profiles, 0.0)
        for name, array in feed.items():
            ranges = {profile: self._range(name, profile) for profile in found}
            fitting = {profile: _distance(array.shape, allowed) for profile, allowed in ranges.items()}
            if array.dtype.name != wanted[name].dtype or all(far is None for far in fitting.values()):
                allowed_ones = (f"from {list(least)} to {list(most)}" for least, _, most in ranges.values())
                raise InputError(
                    f"input {name} must be {wanted[name].dtype} {' or '.join(allowed_ones)}, "
                    f"got {array.dtype.name} {list(array.shape)}"
                )
            found = {profile: found[profile] + far for profile, far in fitting.items() if far is not None}
        return min(found, key=lambda profile: found[profile])

    def _range(self, name: str, profile: int) -> Shapes:
        """The shapes of an input in a profile."""
        return Shapes(*(tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, profile)))

    def _allocate(self, feed: Mapping[str, np.ndarray], profile: int) -> _Buffers:
        """Memory for inputs of the shapes of ``feed`` and for the outputs that come of them."""
        context = self._context(profile)
        for name, array in feed.items():
            if not context.set_input_shape(name, array.shape):
                raise InputError(f"this engine refuses {name} of shape {list(array.shape)}")
        buffers = _Buffers(profile, {}, {})
        self._all.append(buffers)
        self._selected.pop(profile, None)
        for spec in (*self.inputs, *self.outputs):
            shape = tuple(context.get_tensor_shape(spec.name))
            if min(shape, default=0) < 0:
                raise InputError(f"the shape of {spec.name} depends on values: {list(shape)}")
            host = self._cuda.pinned(shape, number_format(spec.dtype))
            buffers.host[spec.name] = host
            buffers.device[spec.name] = self._cuda.allocate(host.nbytes)
        return buffers

    def _free(self, buffers: _Buffers) -> None:
        for address in buffers.device.values():
            self._cuda.free(address)
        self._all = [other for other in self._all if other is not buffers]
        self._selected.pop(buffers.profile, None)

    def _select(self, buffers: _Buffers) -> Any:
        """The context of their profile, which works on ``buffers`` from now on."""
        context = self._context(buffers.profile)
        if self._selected.get(buffers.profile) is not buffers:
            for spec in self.inputs:
                context.set_input_shape(spec.name, buffers.host[spec.name].shape)
            for name, address in buffers.device.items():
                context.set_tensor_address(name, address)
            self._selected[buffers.profile] = buffers
        return context

    def _enqueue(self, buffers: _Buffers, copies: bool) -> None:
        """Put one run on the stream, with its copies if asked for."""
        context = self._select(buffers)
        for spec in self.inputs if copies else ():
            self._cuda.copy_in(buffers.device[spec.name], buffers.host[spec.name], self._stream)
        if not context.execute_async_v3(self._cuda.handle(self._stream)):
            raise MissingError(f"{self.runtime} could not run the engine; the GPU may have too little memory left")
        for spec in self.outputs if copies else ():
            self._cuda.copy_out(buffers.host[spec.name], buffers.device[spec.name], self._stream)


def _distance(shape: tuple[int, ...], allowed: Shapes) -> float | None:
    """How many times larger or smaller ``shape`` is than what a profile is tuned for, as logarithms; None: too far."""
    least, best, most = allowed
    if len(shape) != len(least) or any(not a <= b <= c for a, b, c in zip(least, shape, most)):
        return None
    return sum(abs(math.log(size / tuned)) for size, tuned in zip(shape, best))


def _import(module: str) -> Any:
    """The module, in this process."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # its libraries fail in ways of their own
        raise MissingError(sentence(module, f"cannot be imported ({' '.join(str(error).split())})")) from error


def _deserialize(trt: Any, runtime: Any, path: Path, sidecar: Mapping[str, Any]) -> Any:
    """The engine in a plan file."""
    if "VERSION_COMPATIBLE" in sidecar.get("flags", ()):
        runtime.engine_host_code_allowed = True  # it brings code of its own: load only what you trust
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        built = f"{sidecar.get('runtime')} {sidecar.get('version')}"
        gpus = ", ".join(sidecar.get("compute_capabilities", []))
        raise MissingError(
            f"{path} does not load in {trt.__name__} {trt.__version__}: it was built by {built} for compute "
            f"capability {gpus}; build it again with this version, for this GPU"
        )
    return engine
