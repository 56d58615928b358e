"""CUDA's buffers: NVIDIA's bindings up to the border of the driver, and past it with a double of the API.

The double shows what our code makes of return codes and in which order arguments go, nothing about CUDA.
"""

from __future__ import annotations

import ctypes
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from vitprune.errors import InputError, MissingError
from vitprune_deploy.backends import _cuda
from vitprune_deploy.backends._cuda import Bindings, Cudart, PyCuda, open_cuda


@pytest.fixture(scope="module")
def api():
    return pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")


def test_every_call_that_we_make_exists_in_the_bindings(api):
    source = inspect.getsource(Bindings)
    names = set(re.findall(r'_call\("(\w+)"', source)) | set(re.findall(r"_api\.(\w+)", source))
    assert {"cudaMalloc", "cudaMemcpyAsync", "cudaMemcpyKind", "cudaFreeHost"} <= names
    assert [name for name in sorted(names) if not hasattr(api, name)] == []
    assert {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"} <= set(dir(api.cudaMemcpyKind))


def test_without_a_driver_there_is_a_sentence(api):
    code, count = api.cudaGetDeviceCount()
    if int(code) == 0 and count:
        pytest.skip("there is a GPU")
    with pytest.raises(MissingError, match=r"^(no NVIDIA driver|there is no NVIDIA GPU)"):
        open_cuda("cuda.bindings")


def test_pycuda_that_is_not_installed_comes_with_a_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(MissingError, match=r"^pycuda cannot be imported .* run `pip install pycuda`$"):
        open_cuda("pycuda")


def test_where_none_is_installed_all_are_named(monkeypatch):
    for module in ("pycuda", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(_cuda, "LIBRARIES", ("libcudart.nowhere.so",))
    with pytest.raises(MissingError, match=r"^cuda\.bindings and pycuda and libcudart cannot be imported"):
        open_cuda()


def the_library() -> str:
    """CUDA's own runtime library, as torch's dependencies bring it."""
    found = [file for root in sys.path for file in Path(root).glob("nvidia/*/lib/libcudart.so.*")]
    if not found:
        pytest.skip("there is no libcudart")
    return str(found[0])


def test_every_call_that_we_make_exists_in_the_library():
    names = set(re.findall(r'"(cuda[A-Z]\w+)"', inspect.getsource(Cudart)))
    one_of = {name for name in names if name.startswith("cudaGetDeviceProperties")}  # CUDA 12 has one, 13 the other
    assert {"cudaMalloc", "cudaMemcpyAsync", "cudaStreamCreate", "cudaEventElapsedTime"} <= names
    library = ctypes.CDLL(the_library())
    assert [name for name in sorted(names - one_of) if not hasattr(library, name)] == []
    assert any(hasattr(library, name) for name in one_of)


def test_the_systems_library_says_that_there_is_no_driver(monkeypatch):
    monkeypatch.setattr(_cuda, "LIBRARIES", (the_library(),))
    count = ctypes.c_int()
    if ctypes.CDLL(the_library()).cudaGetDeviceCount(ctypes.byref(count)) == 0 and count.value:
        pytest.skip("there is a GPU")
    with pytest.raises(MissingError, match=r"^(no NVIDIA driver|there is no NVIDIA GPU)"):
        open_cuda("libcudart")


DOUBLE = """
#include <stdlib.h>
#include <string.h>
static int live;
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaSetDevice(int n) { return n != 0; }
int cudaMemGetInfo(size_t *free_, size_t *total) { *free_ = 1; *total = 8000000000u; return 0; }
int cudaDeviceGetAttribute(int *v, int which, int n) {
  *v = which == 75 ? 8 : which == 76 ? 7 : which == 16 ? 14 : -1;
  return n;
}
int cudaDriverGetVersion(int *v) { *v = 12060; return 0; }
int cudaGetDeviceProperties(char *p, int n) { strcpy(p, "Orin"); return n; }
int cudaMalloc(void **p, size_t n) { if (n > 1000000) return 2; *p = malloc(n); live++; return 0; }
int cudaFree(void *p) { free(p); live--; return 0; }
int cudaHostAlloc(void **p, size_t n, unsigned f) { *p = malloc(n); live++; return f; }
int cudaFreeHost(void *p) { free(p); live--; return 0; }
int cudaStreamCreate(void **s) { *s = malloc(1); return 0; }
int cudaStreamSynchronize(void *s) { return s == 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *s) {
  if (!s || kind < 1 || kind > 2) return 1;
  memcpy(to, from, n);
  return 0;
}
int cudaEventCreate(void **e) { *e = malloc(1); return 0; }
int cudaEventRecord(void *e, void *s) { return !e || !s; }
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = 1.5f; return !a || !b; }
const char *cudaGetErrorName(int code) { return code == 2 ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown"; }
int alive(void) { return live; }
"""


def test_the_systems_library_is_called_by_its_c_interface(tmp_path, monkeypatch):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "double.c").write_text(DOUBLE)
    library = tmp_path / "libcudart.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "double.c"], check=True)
    monkeypatch.setattr(_cuda, "LIBRARIES", (str(library),))
    cuda = open_cuda("libcudart")
    assert cuda.device() == _cuda.Device("Orin", "8.7", 8_000_000_000, 14, "12.6")
    stream, address = cuda.stream(), cuda.allocate(24)
    assert cuda.handle(stream) > 0
    host = cuda.pinned((2, 3), np.dtype("float32"))
    host[:] = np.arange(6).reshape(2, 3)
    cuda.copy_in(address, host, stream)
    back = np.zeros_like(host)
    cuda.copy_out(back, address, stream)
    cuda.synchronize(stream)
    np.testing.assert_array_equal(back, host)
    first, last = cuda.event(), cuda.event()
    cuda.record(first, stream)
    cuda.record(last, stream)
    assert cuda.elapsed_ms(first, last) == 1.5
    with pytest.raises(MissingError, match="the GPU has no memory left"):
        cuda.allocate(10**9)
    cuda.free(address)
    del host
    assert ctypes.CDLL(str(library)).alive() == 0


def test_an_unknown_package_is_an_input_error():
    with pytest.raises(InputError, match=r"CUDA is reached through cuda\.bindings or pycuda or libcudart, not 'cupy'"):
        open_cuda("cupy")


class Code(int):
    """A return code with a name, as the bindings give it."""

    name = "cudaErrorOfSomeKind"


class DoubleApi:
    """Some of cuda.bindings.runtime: answers are given, calls are noted, host memory is real."""

    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice="to device", cudaMemcpyDeviceToHost="to host"
    )

    def __init__(self, **answers):
        self.answers, self.calls, self.held = answers, [], []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            return self.answers.get(name, (Code(0),))

        return call

    def cudaHostAlloc(self, size, flags):  # noqa: N802
        self.held.append(ctypes.create_string_buffer(size))
        return Code(0), ctypes.addressof(self.held[-1])


def bindings(monkeypatch, **answers):
    api = DoubleApi(**{"cudaGetDeviceCount": (Code(0), 1)} | answers)
    monkeypatch.setattr(_cuda.importlib, "import_module", lambda name: api)
    return Bindings(), api


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (2, "the GPU has no memory left; use a smaller batch"),
        (35, "no NVIDIA driver was found on this machine, or it is too old"),
        (100, "there is no NVIDIA GPU in this machine"),
        (700, r"CUDA failed in cudaMalloc: cudaErrorOfSomeKind \(700\)"),
    ],
)
def test_every_code_but_success_is_a_sentence(monkeypatch, code, message):
    cuda, _ = bindings(monkeypatch, cudaMalloc=(Code(code), None))
    with pytest.raises(MissingError, match=message):
        cuda.allocate(16)


def test_the_gpu_is_told_with_its_multiprocessors_and_what_its_driver_serves(monkeypatch):
    facts = SimpleNamespace(name=b"L4\0", major=8, minor=9, totalGlobalMem=24 << 30, multiProcessorCount=58)
    answers = {"cudaGetDeviceProperties": (Code(0), facts), "cudaDriverGetVersion": (Code(0), 13020)}
    cuda, _ = bindings(monkeypatch, **answers)
    assert cuda.device() == ("L4", "8.9", 24 << 30, 58, "13.2")


def test_a_machine_with_a_driver_and_no_gpu_is_told_so(monkeypatch):
    with pytest.raises(MissingError, match="there is no NVIDIA GPU"):
        bindings(monkeypatch, cudaGetDeviceCount=(Code(0), 0))


def test_pinned_memory_is_an_array_on_the_drivers_own_memory_and_goes_back_to_it(monkeypatch):
    cuda, api = bindings(monkeypatch)
    array = cuda.pinned((2, 3), np.dtype(np.float32))
    array[...] = np.arange(6).reshape(2, 3)
    assert np.frombuffer(api.held[0], np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    row = array[1]
    del array
    assert api.calls[-1][0] != "cudaFreeHost"  # a view still needs it
    del row
    assert api.calls[-1] == ("cudaFreeHost", ctypes.addressof(api.held[0]))


def test_copies_go_in_their_direction(monkeypatch):
    cuda, api = bindings(monkeypatch)
    array = np.zeros(4, np.float32)
    cuda.copy_in(1234, array, "stream")
    cuda.copy_out(array, 1234, "stream")
    assert api.calls[-2:] == [
        ("cudaMemcpyAsync", 1234, array.ctypes.data, 16, "to device", "stream"),
        ("cudaMemcpyAsync", array.ctypes.data, 1234, 16, "to host", "stream"),
    ]


def test_pycuda_waits_copies_and_times_as_the_interface_says(monkeypatch):
    done = []
    event = SimpleNamespace(record=lambda stream: done.append("record"), time_till=lambda other: 2.5)
    context = SimpleNamespace(push=lambda: done.append("push"), pop=lambda: None)
    driver = ModuleType("pycuda.driver")
    driver.Error = type("Error", (Exception,), {})
    driver.init = lambda: done.append("init")
    driver.Device = lambda number: SimpleNamespace(
        retain_primary_context=lambda: context,
        compute_capability=lambda: (8, 7),
        name=lambda: "Orin",
        total_memory=lambda: 8 << 30,
        multiprocessor_count=8,
    )
    driver.get_driver_version = lambda: 12060
    driver.Event = lambda: event
    driver.memcpy_htod_async = lambda *arguments: done.append(("in", *arguments))
    driver.memcpy_dtoh_async = lambda *arguments: done.append(("out", *arguments))

    def refuse(size):
        raise driver.Error("out of memory")

    driver.mem_alloc = refuse
    monkeypatch.setitem(sys.modules, "pycuda", ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    cuda = open_cuda("pycuda")
    assert isinstance(cuda, PyCuda)
    assert cuda.device() == ("Orin", "8.7", 8 << 30, 8, "12.6")
    array = np.zeros(2)
    cuda.copy_in(1, array, "stream")
    cuda.copy_out(array, 1, "stream")
    cuda.record(cuda.event(), "stream")
    assert cuda.elapsed_ms(event, event) == 2.5
    assert done[:2] == ["init", "push"]
    assert [entry[0] for entry in done[2:4]] == ["in", "out"]
    assert (done[2][1], done[3][2]) == (1, 1)
    with pytest.raises(MissingError, match="CUDA failed: out of memory"):
        cuda.allocate(8)
