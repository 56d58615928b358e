"""TensorRT 10, TensorRT 11 and TensorRT-RTX: engines built in a child process, run through name-based tensors.

Precision stands in the ONNX file, never in a flag; networks are strongly typed. Beside every plan lies a JSON sidecar,
since a plan tells nothing about itself without the GPU that it was built for.

Options of ``load``:
    module: ``tensorrt`` or ``tensorrt_rtx``; by default, what the sidecar says.
    profile: number of the optimisation profile; 0.
    cuda: the package that reaches CUDA: ``cuda.bindings`` or ``pycuda``; by default, the first that is installed.
    copies: whether a timed run includes copying from and to the host, as on every other runtime; True.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitprune import __version__
from vitprune.errors import DamagedFile, InputError, MissingError, VitpruneError

from ..artifact import atomic_path, sha256_file, write_atomic
from ._cuda import Cuda, open_cuda
from ._trt_child import MODULES, Progress, ask, sentence
from .base import Backend, TensorSpec

OPTIONS = ("module", "profile", "cuda", "copies")
SIDECAR_SCHEMA = 1
DESCRIBE_TIMEOUT_S = 120.0
WARM_UP_S = 0.2  # as trtexec does; TensorRT-RTX compiles its kernels in the first runs


class Shapes(NamedTuple):
    """The shapes that a profile allows for one input, and the one that the engine is tuned for."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to be built.

    Attributes:
        profiles: for each optimisation profile, the shapes of each input.
        module: ``tensorrt``, which builds for the GPU in the machine, or ``tensorrt_rtx``, which needs none.
        compute_capabilities: of the GPUs to build for, as in '8.6'; empty: the GPU in the machine, or for TensorRT-RTX
            8.6 and all that is newer.
        workspace_mb: memory that a layer may use while it runs; None: as much as there is.
        timing_cache: file with the timings of earlier builds, read and renewed.
        timeout_s: after so many seconds the build is given up.
    """

    profiles: tuple[Mapping[str, Shapes], ...]
    module: str = "tensorrt"
    compute_capabilities: tuple[str, ...] = ()
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        _check_module(self.module)
        if not self.profiles:
            raise InputError("an engine needs at least one profile of min, opt and max shapes")
        for number, profile in enumerate(self.profiles):
            for name, shapes in profile.items():
                _check_shapes(f"profile {number}, {name}", shapes)
        if self.timeout_s <= 0:
            raise InputError(f"timeout_s must be > 0 seconds, got {self.timeout_s}")
        if self.workspace_mb is not None and self.workspace_mb <= 0:
            raise InputError(f"workspace_mb must be > 0, got {self.workspace_mb}")


def build_engine(
    onnx_path: Path, out_path: Path, options: EngineOptions, progress: Progress | None = None
) -> dict[str, Any]:
    """Build the plan ``out_path`` and its sidecar from an ONNX file; what the sidecar says.

    Raises:
        InputError: the file is not there, a profile or compute capability does not fit, or time ran out.
        NotSupported: TensorRT does not take a node, which the message names, or it crashed.
        DamagedFile: the file is no ONNX file.
        MissingError: the module, a driver, memory or room on the disk is missing.
    """
    _check_file(onnx_path)
    request = {
        "profiles": [dict(profile) for profile in options.profiles],
        "compute_capabilities": list(options.compute_capabilities),
        "workspace_mb": options.workspace_mb,
        "timing_cache": str(options.timing_cache) if options.timing_cache else None,
    }
    with atomic_path(out_path) as plan:
        request |= {"onnx": str(onnx_path), "plan": str(plan)}
        found = ask(
            "build",
            options.module,
            request,
            subject=str(onnx_path),
            timeout_s=options.timeout_s,
            progress=progress,
        )
        sidecar = {
            "schema": SIDECAR_SCHEMA,
            "status": "built",
            **found,
            "sha256": sha256_file(plan),
            "size_bytes": plan.stat().st_size,
            "onnx": {"name": onnx_path.name, "sha256": sha256_file(onnx_path)},
            "vitprune": __version__,
        }
    write_atomic(sidecar_path(out_path), json.dumps(sidecar, indent=1) + "\n")
    return sidecar


def check_parses(onnx_path: Path, module: str = "tensorrt", timeout_s: float = 600.0) -> None:
    """Return if TensorRT takes every node of an ONNX file, without building anything; raises as ``build_engine``."""
    _check_module(module)
    _check_file(onnx_path)
    ask("check", module, {"onnx": str(onnx_path)}, subject=str(onnx_path), timeout_s=timeout_s)


def capabilities() -> dict[str, dict[str, Any]]:
    """For each module: whether it builds and runs here, and if not, a sentence why.

    Keys of each: ``version``, ``compute_capabilities`` (what it builds for), ``builds``, ``runs``, ``gpu``, ``why``.
    """
    try:
        gpu: str | None = open_cuda().device().name
        no_gpu = ""
    except MissingError as error:
        gpu, no_gpu = None, str(error)
    found: dict[str, dict[str, Any]] = {}
    for module in MODULES:
        facts: dict[str, Any] = {
            "version": None,
            "compute_capabilities": [],
            "builds": False,
            "runs": False,
            "gpu": gpu,
            "why": no_gpu,
        }
        try:
            facts |= ask("describe", module, {}, timeout_s=DESCRIBE_TIMEOUT_S) | {
                "builds": True,
                "runs": gpu is not None,
            }
        except VitpruneError as error:
            facts["why"] = str(error)
        found[module] = facts
    return found


def sidecar_path(plan: Path) -> Path:
    """The JSON file that belongs to a plan."""
    return plan.with_name(f"{plan.name}.json")


def read_sidecar(plan: Path) -> dict[str, Any]:
    """What was noted when the plan was built, once it is clear that it is about this very file.

    Raises:
        InputError: there is no plan, or it has no sidecar.
        DamagedFile: either of them is not what was built.
    """
    path = sidecar_path(plan)
    for file in (plan, path):
        if not file.is_file():
            raise InputError(f"{file}: there is no such file; build the engine again")
    try:
        sidecar = json.loads(path.read_text())
        sha256, _ = sidecar["sha256"], sidecar["runtime"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged ({error}); build the engine again") from error
    if sha256 != sha256_file(plan):
        raise DamagedFile(f"{plan} is cut off or not the engine that {path.name} describes; build the engine again")
    return sidecar


class _Buffers(NamedTuple):
    """Memory for one set of shapes: page-locked on the host, and an address on the GPU, by tensor."""

    host: dict[str, np.ndarray]
    device: dict[str, int]


class TensorRT(Backend):
    """An engine, its execution context, and memory on the GPU for its tensors. Not for several threads at once."""

    def __init__(self, trt: Any, engine: Any, cuda: Cuda, profile: int, copies: bool) -> None:
        self._trt, self._engine, self._cuda, self._profile, self._copies = trt, engine, cuda, profile, copies
        self._context = engine.create_execution_context()
        if self._context is None:
            raise MissingError("TensorRT made no execution context; the GPU has too little memory left")
        self._stream = cuda.stream()
        if not self._context.set_optimization_profile_async(profile, cuda.handle(self._stream)):
            raise InputError(f"this engine has {engine.num_optimization_profiles} profiles, there is no {profile}")
        self._deserializer: Any = None
        self._all: list[_Buffers] = []
        self._selected: _Buffers | None = None  # those whose shapes and addresses the context knows
        self._last: _Buffers | None = None  # those of the last run
        self.runtime = f"{trt.__name__} {trt.__version__}"
        self.provider = "cuda"
        specs = [self._spec(engine.get_tensor_name(i)) for i in range(engine.num_io_tensors)]
        is_input = [engine.get_tensor_mode(spec.name) == trt.TensorIOMode.INPUT for spec in specs]
        self.inputs = tuple(spec for spec, enters in zip(specs, is_input, strict=True) if enters)
        self.outputs = tuple(spec for spec, enters in zip(specs, is_input, strict=True) if not enters)

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
        options = dict(options or {})
        unknown = sorted(options.keys() - set(OPTIONS))
        if unknown:
            raise InputError(f"tensorrt has no option {unknown[0]!r}, it has {', '.join(OPTIONS)}")
        sidecar = read_sidecar(path)
        module = options.get("module", sidecar["runtime"])
        _check_module(module)
        trt = _import(module)
        cuda = open_cuda(options.get("cuda"))  # before TensorRT asks: its answer without a driver is no sentence
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = _deserialize(trt, runtime, path, sidecar)
        backend = cls(trt, engine, cuda, options.get("profile", 0), options.get("copies", True))
        backend._deserializer = runtime  # which has to outlive its engine
        return backend

    def run(self, images: np.ndarray) -> np.ndarray:
        """The first output for ``images``; memory is kept for the next call with images of the same shape."""
        if len(self.inputs) != 1:
            raise InputError(f"this engine has {len(self.inputs)} inputs ({', '.join(i.name for i in self.inputs)})")
        feed = {self.inputs[0].name: images}
        self._check(feed)
        if self._last is None or self._last.host[self.inputs[0].name].shape != images.shape:
            if self._last is not None:
                self._free(self._last)
            self._last = self._allocate(feed)
        self._last.host[self.inputs[0].name][...] = images
        self._enqueue(self._last, copies=True)
        self._cuda.synchronize(self._stream)
        return np.array(self._last.host[self.outputs[0].name])

    def bind(self, feed: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """One run between two CUDA events, after a warm-up of a fixed time."""
        self._check(feed)
        buffers = self._allocate(feed)
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
        self._last = self._context = self._engine = self._deserializer = None

    def _spec(self, name: str) -> TensorSpec:
        """An input or output; free sizes are named by their axis."""
        names = ("batch", *(f"axis_{i}" for i in range(1, 9)))  # an engine has no names for its axes
        shape = tuple(s if s >= 0 else n for s, n in zip(self._engine.get_tensor_shape(name), names, strict=False))
        return TensorSpec(name, shape, np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))).name)

    def _check(self, feed: Mapping[str, np.ndarray]) -> None:
        """Refuse what the engine or its profile does not take."""
        wanted = {spec.name: spec for spec in self.inputs}
        if feed.keys() != wanted.keys():
            raise InputError(f"this engine's inputs are {', '.join(sorted(wanted))}, got {', '.join(sorted(feed))}")
        for name, array in feed.items():
            least, _, most = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, self._profile))
            fits = len(array.shape) == len(least) and all(
                low <= size <= high for low, size, high in zip(least, array.shape, most, strict=True)
            )
            if not fits or array.dtype.name != wanted[name].dtype:
                raise InputError(
                    f"input {name} must be {wanted[name].dtype} from {list(least)} to {list(most)}, "
                    f"got {array.dtype.name} {list(array.shape)}"
                )

    def _allocate(self, feed: Mapping[str, np.ndarray]) -> _Buffers:
        """Memory for inputs of the shapes of ``feed`` and for the outputs that come of them."""
        for name, array in feed.items():
            if not self._context.set_input_shape(name, array.shape):
                raise InputError(f"this engine refuses {name} of shape {list(array.shape)}")
        buffers = _Buffers({}, {})
        self._all.append(buffers)
        self._selected = None
        for spec in (*self.inputs, *self.outputs):
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if min(shape, default=0) < 0:
                raise InputError(f"the shape of {spec.name} depends on values: {list(shape)}")
            host = self._cuda.pinned(shape, np.dtype(spec.dtype))
            buffers.host[spec.name] = host
            buffers.device[spec.name] = self._cuda.allocate(host.nbytes)
        return buffers

    def _free(self, buffers: _Buffers) -> None:
        for address in buffers.device.values():
            self._cuda.free(address)
        self._all = [other for other in self._all if other is not buffers]
        self._selected = None

    def _select(self, buffers: _Buffers) -> None:
        """Have the context work on ``buffers``."""
        if self._selected is buffers:
            return
        for spec in self.inputs:
            self._context.set_input_shape(spec.name, buffers.host[spec.name].shape)
        for name, address in buffers.device.items():
            self._context.set_tensor_address(name, address)
        self._selected = buffers

    def _enqueue(self, buffers: _Buffers, copies: bool) -> None:
        """Put one run on the stream, with its copies if asked for."""
        self._select(buffers)
        for spec in self.inputs if copies else ():
            self._cuda.copy_in(buffers.device[spec.name], buffers.host[spec.name], self._stream)
        if not self._context.execute_async_v3(self._cuda.handle(self._stream)):
            raise MissingError(f"{self.runtime} could not run the engine; the GPU may have too little memory left")
        for spec in self.outputs if copies else ():
            self._cuda.copy_out(buffers.host[spec.name], buffers.device[spec.name], self._stream)


def _check_module(module: str) -> None:
    if module not in MODULES:
        raise InputError(f"module must be {' or '.join(MODULES)}, got {module!r}")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: there is no such ONNX file")


def _check_shapes(place: str, shapes: Shapes) -> None:
    """TensorRT would say no more than -1."""
    least, best, most = shapes
    if not len(least) == len(best) == len(most):
        raise InputError(f"{place}: min, opt and max need the same number of axes, got {least}, {best}, {most}")
    for axis, (low, middle, high) in enumerate(zip(least, best, most, strict=True)):
        if not 1 <= low <= middle <= high:
            raise InputError(f"{place}, axis {axis}: 1 <= min <= opt <= max must hold, got {low}, {middle}, {high}")


def _import(module: str) -> Any:
    """The module, in this process."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # its libraries fail in ways of their own
        raise MissingError(sentence(module, f"cannot be imported ({' '.join(str(error).split())})")) from error


def _deserialize(trt: Any, runtime: Any, path: Path, sidecar: Mapping[str, Any]) -> Any:
    """The engine in a plan file."""
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        built = f"{sidecar.get('runtime')} {sidecar.get('version')}"
        gpus = ", ".join(sidecar.get("compute_capabilities", []))
        raise MissingError(
            f"{path} does not load in {trt.__name__} {trt.__version__}: it was built by {built} for compute "
            f"capability {gpus}; build it again with this version, for this GPU"
        )
    return engine
