"""What running an engine needs of CUDA, behind one small interface with three implementations.

``cuda.bindings`` (NVIDIA's own, a wheel), ``pycuda`` (compiled against the toolkit), and the system's ``libcudart``
through ctypes, which a board with CUDA has though nothing of it is in Python. All use the primary context of device 0,
which TensorRT uses too. Every call that fails is a sentence.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np

from vitprune.errors import InputError, MissingError


class Device(NamedTuple):
    """The GPU."""

    name: str
    compute_capability: str  # as in '8.6'
    memory_bytes: int
    multiprocessors: int | None = None
    driver_cuda: str | None = None  # the newest CUDA that its driver serves, as in '13.0'


class Cuda(ABC):
    """Memory, streams and events of device 0. Streams and events are whatever the implementation makes of them.

    Attributes:
        package: which Python package does it.
    """

    package: str

    @abstractmethod
    def device(self) -> Device:
        """Which GPU this is."""

    @abstractmethod
    def allocate(self, size_bytes: int) -> int:
        """Address of new device memory."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Give device memory back."""

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """Host memory that copies run to and from without a detour; given back with the last array on it."""

    @abstractmethod
    def stream(self) -> Any:
        """A new stream."""

    @abstractmethod
    def handle(self, stream: Any) -> int:
        """What TensorRT takes for ``stream``."""

    @abstractmethod
    def synchronize(self, stream: Any) -> None:
        """Wait for all work on ``stream``; errors of that work show here."""

    @abstractmethod
    def copy_in(self, address: int, array: np.ndarray, stream: Any) -> None:
        """Start a copy from the host."""

    @abstractmethod
    def copy_out(self, array: np.ndarray, address: int, stream: Any) -> None:
        """Start a copy to the host."""

    @abstractmethod
    def event(self) -> Any:
        """A new event that can be timed."""

    @abstractmethod
    def record(self, event: Any, stream: Any) -> None:
        """Have ``event`` happen when the stream gets there."""

    @abstractmethod
    def elapsed_ms(self, first: Any, last: Any) -> float:
        """Milliseconds between two events that have happened."""


def open_cuda(package: str | None = None) -> Cuda:
    """CUDA by way of ``package``: 'cuda.bindings', 'pycuda' or 'libcudart'; None: the first that is installed.

    Raises:
        InputError: no such package is known.
        MissingError: it is not installed, or there is no NVIDIA driver or GPU.
    """
    if package is not None and package not in KINDS:
        raise InputError(f"CUDA is reached through {' or '.join(KINDS)}, not {package!r}")
    for name in [package] if package else list(KINDS):
        try:
            return KINDS[name]()
        except ImportError as error:
            missing = error
    extra = "pycuda" if package == "pycuda" else "cuda-bindings"
    raise MissingError(f"{package or ' and '.join(KINDS)} cannot be imported ({missing}); run `pip install {extra}`")


@final
class Bindings(Cuda):
    """CUDA's runtime API through ``cuda.bindings``; every call returns a code and its results."""

    package = "cuda.bindings"

    def __init__(self) -> None:
        self._api: Any = importlib.import_module("cuda.bindings.runtime")
        if not self._call("cudaGetDeviceCount"):
            raise MissingError("there is no NVIDIA GPU in this machine")
        self._call("cudaSetDevice", 0)

    def device(self) -> Device:
        facts = self._call("cudaGetDeviceProperties", 0)
        return Device(
            _text(facts.name),
            f"{facts.major}.{facts.minor}",
            int(facts.totalGlobalMem),
            int(facts.multiProcessorCount),
            _version(self._call("cudaDriverGetVersion")),
        )

    def allocate(self, size_bytes: int) -> int:
        return int(self._call("cudaMalloc", size_bytes))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def pinned(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        address = int(self._call("cudaHostAlloc", size, 0))
        raw = (ctypes.c_byte * size).from_address(address)
        weakref.finalize(raw, self._api.cudaFreeHost, address).atexit = False  # at exit the driver frees everything
        return np.frombuffer(memoryview(raw), dtype=dtype).reshape(shape)

    def stream(self) -> Any:
        return self._call("cudaStreamCreate")

    def handle(self, stream: Any) -> int:
        return int(stream)

    def synchronize(self, stream: Any) -> None:
        self._call("cudaStreamSynchronize", stream)

    def copy_in(self, address: int, array: np.ndarray, stream: Any) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def copy_out(self, array: np.ndarray, address: int, stream: Any) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def event(self) -> Any:
        return self._call("cudaEventCreate")

    def record(self, event: Any, stream: Any) -> None:
        self._call("cudaEventRecord", event, stream)

    def elapsed_ms(self, first: Any, last: Any) -> float:
        return float(self._call("cudaEventElapsedTime", first, last))

    def _call(self, name: str, *arguments: Any) -> Any:
        """The result of one call of the API; MissingError for any code but success."""
        try:
            code, *results = getattr(self._api, name)(*arguments)
        except RuntimeError as error:  # the library itself could not be loaded
            raise MissingError(f"{NO_DRIVER} ({error})") from error
        if int(code) != 0:
            raise MissingError(_complain(name, int(code), getattr(code, "name", str(code))))
        return results[0] if results else None


@final
class PyCuda(Cuda):
    """CUDA's driver API through ``pycuda``, which raises for every code but success."""

    package = "pycuda"

    def __init__(self) -> None:
        try:
            self._api: Any = importlib.import_module("pycuda.driver")
            self._api.init()
        except ImportError as error:
            if "libcuda" in str(error):  # the module is there, and the driver that it links is not
                raise MissingError(f"{NO_DRIVER} ({error})") from error
            raise
        except Exception as error:  # its errors derive from Exception alone
            raise MissingError(f"{NO_DRIVER} ({error})") from error
        self._device = self._api.Device(0)
        self._context = self._device.retain_primary_context()
        self._context.push()
        atexit.register(self._context.pop)  # pycuda aborts the process if its stack is not empty at the end
        self._memory: dict[int, Any] = {}

    def device(self) -> Device:
        major, minor = self._device.compute_capability()
        return Device(
            self._device.name(),
            f"{major}.{minor}",
            int(self._device.total_memory()),
            int(self._device.multiprocessor_count),
            _version(self._api.get_driver_version()),
        )

    def allocate(self, size_bytes: int) -> int:
        memory = self._call(self._api.mem_alloc, size_bytes)
        self._memory[int(memory)] = memory  # pycuda frees what nobody holds
        return int(memory)

    def free(self, address: int) -> None:
        self._memory.pop(address).free()

    def pinned(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        return self._call(self._api.pagelocked_empty, tuple(shape), dtype)

    def stream(self) -> Any:
        return self._call(self._api.Stream)

    def handle(self, stream: Any) -> int:
        return int(stream.handle)

    def synchronize(self, stream: Any) -> None:
        self._call(stream.synchronize)

    def copy_in(self, address: int, array: np.ndarray, stream: Any) -> None:
        self._call(self._api.memcpy_htod_async, address, array, stream)

    def copy_out(self, array: np.ndarray, address: int, stream: Any) -> None:
        self._call(self._api.memcpy_dtoh_async, array, address, stream)

    def event(self) -> Any:
        return self._call(self._api.Event)

    def record(self, event: Any, stream: Any) -> None:
        self._call(event.record, stream)

    def elapsed_ms(self, first: Any, last: Any) -> float:
        return float(self._call(first.time_till, last))

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._api.Error as error:
            raise MissingError(f"CUDA failed: {error}") from error


@final
class Cudart(Cuda):
    """CUDA's runtime API in the system's own library, by its C interface."""

    package = "libcudart"
    TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
    MAJOR, MINOR, MULTIPROCESSORS = 75, 76, 16  # cudaDeviceAttr
    NAME_BYTES, PROPERTIES_BYTES = 256, 8192  # a cudaDeviceProp begins with the name; it has grown to about 1 kB

    def __init__(self) -> None:
        self._library = _cudart()
        if not self._number("cudaGetDeviceCount"):
            raise MissingError("there is no NVIDIA GPU in this machine")
        self._call("cudaSetDevice", ctypes.c_int(0))

    def device(self) -> Device:
        total = ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(ctypes.c_size_t()), ctypes.byref(total))
        major, minor, multiprocessors = (
            self._number("cudaDeviceGetAttribute", ctypes.c_int(which), ctypes.c_int(0))
            for which in (self.MAJOR, self.MINOR, self.MULTIPROCESSORS)
        )
        driver = _version(self._number("cudaDriverGetVersion"))
        return Device(self._name(), f"{major}.{minor}", total.value, multiprocessors, driver)

    def allocate(self, size_bytes: int) -> int:
        return self._address("cudaMalloc", ctypes.c_size_t(size_bytes))

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def pinned(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        address = self._address("cudaHostAlloc", ctypes.c_size_t(size), ctypes.c_uint(0))
        raw = (ctypes.c_byte * size).from_address(address)
        free = self._library.cudaFreeHost
        weakref.finalize(raw, free, ctypes.c_void_p(address)).atexit = False  # at exit the driver frees everything
        return np.frombuffer(memoryview(raw), dtype=dtype).reshape(shape)

    def stream(self) -> Any:
        return self._address("cudaStreamCreate")

    def handle(self, stream: Any) -> int:
        return int(stream)

    def synchronize(self, stream: Any) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def copy_in(self, address: int, array: np.ndarray, stream: Any) -> None:
        self._copy(address, array.ctypes.data, array.nbytes, self.TO_DEVICE, stream)

    def copy_out(self, array: np.ndarray, address: int, stream: Any) -> None:
        self._copy(array.ctypes.data, address, array.nbytes, self.TO_HOST, stream)

    def event(self) -> Any:
        return self._address("cudaEventCreate")

    def record(self, event: Any, stream: Any) -> None:
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def elapsed_ms(self, first: Any, last: Any) -> float:
        found = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(found), ctypes.c_void_p(first), ctypes.c_void_p(last))
        return found.value

    def _copy(self, target: int, source: int, size: int, kind: int, stream: Any) -> None:
        ends = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._call("cudaMemcpyAsync", *ends, ctypes.c_size_t(size), ctypes.c_int(kind), ctypes.c_void_p(stream))

    def _name(self) -> str:
        """The GPU's name; in CUDA 12 the library has the call under another name."""
        properties = ctypes.create_string_buffer(self.PROPERTIES_BYTES)
        versions = ("cudaGetDeviceProperties_v2", "cudaGetDeviceProperties")
        call = next(name for name in versions if hasattr(self._library, name))
        self._call(call, properties, ctypes.c_int(0))
        return _text(properties.raw[: self.NAME_BYTES])

    def _address(self, name: str, *arguments: Any) -> int:
        """The address that a call writes to its first argument."""
        found = ctypes.c_void_p()
        self._call(name, ctypes.byref(found), *arguments)
        return int(found.value or 0)

    def _number(self, name: str, *arguments: Any) -> int:
        """The number that a call writes to its first argument."""
        found = ctypes.c_int()
        self._call(name, ctypes.byref(found), *arguments)
        return found.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            told = self._library.cudaGetErrorName
            told.restype = ctypes.c_char_p
            raise MissingError(_complain(name, code, _text(told(code) or b"")))


def _cudart() -> Any:
    """The library, wherever the system or CUDA's own folder has it.

    Raises:
        ImportError: nowhere.
    """
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ImportError(f"there is no {LIBRARIES[0]}")


LIBRARIES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "/usr/local/cuda/lib64/libcudart.so")
KINDS: dict[str, type[Any]] = {"cuda.bindings": Bindings, "pycuda": PyCuda, "libcudart": Cudart}
NO_DRIVER = "no NVIDIA driver was found on this machine"


def _complain(call: str, code: int, name: str) -> str:
    """A sentence for a code that CUDA gave back."""
    if code in (35, 34):  # cudaErrorInsufficientDriver, cudaErrorStubLibrary
        return f"{NO_DRIVER}, or it is too old for this CUDA ({name}); install NVIDIA's current driver"
    if code == 100:  # cudaErrorNoDevice
        return f"there is no NVIDIA GPU in this machine ({name})"
    if code == 2:  # cudaErrorMemoryAllocation
        return "the GPU has no memory left; use a smaller batch"
    return f"CUDA failed in {call}: {name} ({code})"


def _version(number: int) -> str:
    """13020 as '13.2'."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _text(name: bytes | str) -> str:
    """A C string of the API."""
    return name.split(b"\0")[0].decode(errors="replace") if isinstance(name, bytes) else name
