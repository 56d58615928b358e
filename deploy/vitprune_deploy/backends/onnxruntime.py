"""ONNX Runtime: on the CPU by default, on any other of its execution providers by name.

Options of ``load``:
    provider: ``cpu``, ``cuda``, ``tensorrt``, ``openvino``, ``tensorrt-rtx`` ..., or ONNX Runtime's own name for one.
    provider_options: what the provider takes, passed on as it is.
    cpu_nodes: let nodes that a GPU provider does not take run on the CPU; False, since that hides a slow graph.
    sizes: sizes of free dimensions by name, besides ``batch``; a graph with all of them fixed is specialised.
    copies: whether a timed run on a GPU includes copying from and to the host, as a service's does; True.
    optimise: whether nodes are fused and rearranged; False runs the graph node by node as it is written; True.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vitprune.errors import DamagedFile, InputError, MissingError, NotSupported

from ..files import atomic_path
from . import _ort_plugins
from ._threads import task_ids
from .base import Backend, TensorSpec, known_options

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": _ort_plugins.OPENVINO,
    "tensorrt-rtx": _ort_plugins.TENSORRT_RTX,
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}
# what to hand a graph's remaining nodes to, and which package brings the provider
BEHIND = {"TensorrtExecutionProvider": ["CUDAExecutionProvider"]}
PACKAGES = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu 'tensorrt-cu13<11'",  # it links libnvinfer.so.10
    "DmlExecutionProvider": "onnxruntime-directml",
}
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn")
OPTIONS = ("provider", "provider_options", "cpu_nodes", "sizes", "copies", "optimise")
CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
# Arithmetic on sizes, such as that of a free batch, is left to the CPU on purpose: its results are needed there. For
# numbers of a model the GPU providers have these operators, so what the CPU has of them is such arithmetic.
ON_SIZES = frozenset(("Shape", "Size", "Concat", "Gather", "Squeeze", "Unsqueeze", "Slice", "Cast", "Range", "Add",
                      "Sub", "Mul", "Div", "Reshape", "Expand", "ConstantOfShape", "Identity"))  # fmt: skip
TYPES = {"float": "float32", "double": "float64"}  # ONNX Runtime's names where they are not numpy's
# It splits a bias from the GELU behind it, and only where all shapes are fixed: such a graph took 4 to 10% longer than
# the same one with a symbolic batch (DeiT-S and the quickstart model, two x86 cores)
SLOWING = "MatMulAddFusion"


class OnnxRuntime(Backend):
    """A session of ONNX Runtime, and the threads that it started."""

    def __init__(self, session: Any, provider: str, threads: list[int], buffers: str = "cpu") -> None:
        self._session, self._threads, self._buffers = session, threads, buffers
        self.provider = provider
        self.runtime = f"onnxruntime {_import().__version__}"
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        threads: int | None = None,
        batch: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> OnnxRuntime:
        """A session on the provider that the options ask for, and on no other."""
        options = known_options("onnxruntime", options, OPTIONS)
        if not path.is_file():
            raise InputError(f"{path}: there is no such model file")
        short = options.get("provider", "cpu")
        provider = find_provider(short)
        sizes = {**options.get("sizes", {}), **({} if batch is None else {"batch": batch})}
        strict = _takes_all(provider) and not options.get("cpu_nodes")
        session_options = _session_options(threads, sizes, provider, strict=strict)
        if not options.get("optimise", True):
            session_options.graph_optimization_level = _import().GraphOptimizationLevel.ORT_DISABLE_ALL
        before = task_ids()
        session = _open(path, session_options, provider, dict(options.get("provider_options", {})), threads)
        if strict:
            _refuse_cpu_nodes(path, session, provider)
        buffers = "cuda" if provider in CUDA and not options.get("copies", True) else "cpu"
        return cls(session, _short(provider), sorted(task_ids() - before), buffers)

    @classmethod
    def compile(
        cls, path: Path, target: Path, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``path`` as ``target``, compiled for this machine's device: an ONNX file of one EPContext node.

        It loads faster, with the same options, on the same provider, its version and its device alone.

        Raises:
            InputError: the provider compiles nothing ahead of time.
            MissingError: as ``load``.
        """
        ort, options = _import(), dict(options or {})
        provider = find_provider(options.get("provider", "cpu"))
        session_options = _session_options(threads, dict(options.get("sizes", {})), provider, strict=False)
        if not _ort_plugins.is_installed(provider):
            raise InputError(f"{_short(provider)} compiles nothing ahead of time; leave runtime.compiled out")
        _ort_plugins.add(session_options, provider, dict(options.get("provider_options", {})), threads)
        with atomic_path(target) as temporary:
            temporary.unlink()  # the compiler writes no file over another
            try:
                compiler = ort.ModelCompiler(session_options, str(path), embed_compiled_data_into_model=True)
                compiler.compile_to_file(str(temporary))
            except Exception as error:  # its exceptions share no base but Exception
                raise _explain(path, provider, error) from error

    def run(self, images: np.ndarray) -> np.ndarray:
        """The first output, without I/O binding: its shape may differ from call to call."""
        if len(self.inputs) != 1:
            raise InputError(f"this model has {len(self.inputs)} inputs ({', '.join(i.name for i in self.inputs)})")
        feed = {self.inputs[0].name: images}
        self.refuse_misfit(feed)
        return np.asarray(self._session.run([self.outputs[0].name], feed)[0])

    def bind(self, feed: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """One run with I/O binding."""
        ort = _import()
        self.refuse_misfit(feed)
        results = self._session.run(None, dict(feed))  # the shapes of the outputs are known only after a run

        def as_value(array: np.ndarray) -> Any:
            return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._buffers)

        ins = {name: as_value(array) for name, array in feed.items()}
        outs = {spec.name: as_value(np.empty_like(out)) for spec, out in zip(self.outputs, results)}
        binding = self._session.io_binding()
        for name, value in ins.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outs.items():
            binding.bind_ortvalue_output(name, value)
        return _Bound(self._session, binding, [*ins.values(), *outs.values()])

    def thread_ids(self) -> list[int]:
        """The threads that came with this session: all that work on a batch, besides the caller."""
        return list(self._threads)

    def close(self) -> None:
        """Let go of the session."""
        self._session = None


class _Bound:
    """One run on fixed buffers; it keeps them alive, since a binding only points at them."""

    def __init__(self, session: Any, binding: Any, values: list[Any]) -> None:
        self._run, self._binding, self._values = session.run_with_iobinding, binding, values

    def __call__(self) -> float:
        start = time.perf_counter_ns()
        self._run(self._binding)
        return (time.perf_counter_ns() - start) / 1e6


def optimised(path: Path, *, threads: int | None = None, options: Mapping[str, Any] | None = None) -> Any:
    """The graph that a session of the model in ``path`` runs, as an ``onnx.ModelProto`` without its weights.

    Raises:
        NotSupported: the provider compiles the graph into something of its own.
        InputError, DamagedFile, MissingError: as ``OnnxRuntime.load``.
    """
    import onnx

    options = dict(options or {})
    provider = find_provider(options.get("provider", "cpu"))
    wanted = _session_options(threads, options.get("sizes", {}), provider, strict=False)
    with tempfile.TemporaryDirectory(prefix="vitprune-") as folder:
        written = Path(folder) / "optimised.onnx"
        wanted.optimized_model_filepath = str(written)
        wanted.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        wanted.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            _open(path, wanted, provider, dict(options.get("provider_options", {})), threads)
        except DamagedFile as error:
            if "compiled nodes" in str(error):
                raise NotSupported(f"{provider} does not show what it made of {path.name}") from error
            raise
        return onnx.load(str(written), load_external_data=False)


def check_packages() -> None:
    """Refuse a Python that holds two packages of ONNX Runtime.

    Raises:
        MissingError: both are there; they share one folder, and which one is imported is chance.
    """
    found = [name for name in DISTRIBUTIONS if _installed(name)]
    if len(found) > 1:
        raise MissingError(
            f"{' and '.join(found)} are both installed, and they overwrite each other's files; "
            f"run `pip uninstall -y {' '.join(found)}`, then `pip install` the one you want"
        )


def find_provider(name: str) -> str:
    """ONNX Runtime's name of the execution provider ``name``, which this installation has.

    Raises:
        InputError: no provider bears that name.
        MissingError: the installed package lacks it; the message names the one that has it.
    """
    ort = _import()
    provider = PROVIDERS.get(name.lower(), name)
    if provider in ort.get_available_providers() or _ort_plugins.is_installed(provider):
        return provider
    if provider in _ort_plugins.PLUGINS:
        its_package = _ort_plugins.PLUGINS[provider].distribution
        raise MissingError(f"{provider} is a package of its own, which is not here; run `pip install {its_package}`")
    if provider not in PROVIDERS.values() and provider not in ort.get_all_providers():
        raise InputError(f"onnxruntime has no execution provider {name!r}; known are {', '.join(PROVIDERS)}")
    package = PACKAGES.get(provider)
    way = f"run `pip uninstall -y onnxruntime && pip install {package}`" if package else "it needs another build of it"
    raise MissingError(f"this onnxruntime {ort.__version__} was built without {provider}; {way}")


def _import() -> Any:
    """The module ``onnxruntime``; by name, since this file bears the same one."""
    check_packages()
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError(f"onnxruntime cannot be imported ({error}); run `pip install 'vitprune[cpu]'`") from error
    return onnxruntime


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _session_options(threads: int | None, sizes: Mapping[str, int], provider: str, *, strict: bool) -> Any:
    """How a session is to run: one operator at a time, its threads asleep between runs."""
    ort = _import()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL  # ORT_PARALLEL took 1.7 times as long on a ViT
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    options.log_severity_level = 3  # what is an error comes as an exception, and warnings are not ours to print
    # workers that spin after a run would take processor time from the next model of an interleaved measurement
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if provider == PROVIDERS["cpu"]:  # what it does on others has not been measured
        options.add_session_config_entry("optimization.disable_specified_optimizers", SLOWING)
    if strict:
        tells = hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")  # else refuse sizes on the CPU too
        key = "session.record_ep_graph_assignment_info" if tells else "session.disable_cpu_ep_fallback"
        options.add_session_config_entry(key, "1")
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    return options


def _open(path: Path, options: Any, provider: str, provider_options: dict[str, Any], threads: int | None) -> Any:
    """A session of the model in ``path``, on ``provider`` and nothing else."""
    ort = _import()
    providers: list[Any] | None = [(provider, provider_options), *BEHIND.get(provider, [])]
    if _ort_plugins.is_installed(provider):
        providers = None
        _ort_plugins.add(options, provider, provider_options, threads)
    missing = _load_cuda() if provider in CUDA else ""
    try:
        with redirect_stdout(io.StringIO()) if provider != PROVIDERS["cpu"] else nullcontext():
            # where a provider does not start, it prints that it takes another one, and ours is a program's output
            session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its exceptions share no base but Exception
        raise _explain(path, provider, error) from error
    if session.get_providers()[0] != provider:
        raise MissingError(
            f"{path.name} was to run on {provider}, but it did not start (its libraries or its device are missing) "
            f"and onnxruntime fell back to {session.get_providers()[0]}; "
            f"{missing or '`vitprune-deploy doctor` says what is missing'}"
        )
    return session


def _load_cuda() -> str:
    """Load CUDA's libraries from NVIDIA's wheels, where the system's loader does not look; says which it missed."""
    said = io.StringIO()
    if hasattr(_import(), "preload_dlls"):  # since 1.21
        with redirect_stdout(said):
            _import().preload_dlls()
    return " ".join(said.getvalue().split())


def _refuse_cpu_nodes(path: Path, session: Any, provider: str) -> None:
    """Raise NotSupported if the CPU is to run a node that works on more than sizes."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return
    assigned = session.get_provider_graph_assignment_info()
    nodes = [node for part in assigned if part.ep_name == PROVIDERS["cpu"] for node in part.get_nodes()]
    for node in nodes:
        if node.op_type not in ON_SIZES:
            raise NotSupported(
                f"{path}: {provider} does not take the node {node.name} of type {node.op_type}; "
                "set the option cpu_nodes to let the CPU run it"
            )


def _explain(path: Path, provider: str, error: Exception) -> Exception:
    """Our exception for what ONNX Runtime raised while loading ``path``."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if "fallback to CPU EP" in text:
        return NotSupported(
            f"{path}: {provider} does not take every node of this graph; load it with a fixed batch, "
            "or set the option cpu_nodes to let the rest run on the CPU"
        )
    if kind == "NotImplemented":
        return NotSupported(f"{path}: onnxruntime has no kernel for a node of it: {text}")
    if kind in ("EPFail", "RuntimeException") and _is_gpu(provider):
        return MissingError(f"{provider} did not start on this machine: {text}")
    return DamagedFile(f"{path} is cut off or not an ONNX model that this onnxruntime reads: {text}")


def _spec(node: Any) -> TensorSpec:
    """Name, shape and type of an input or output."""
    name = node.type[len("tensor(") : -1] if node.type.startswith("tensor(") else node.type
    shape = tuple(size if isinstance(size, int) else str(size) for size in node.shape)
    return TensorSpec(node.name, shape, TYPES.get(name, name))


def _short(provider: str) -> str:
    """Our name for a provider, where there is one."""
    return next((short for short, name in PROVIDERS.items() if name == provider), provider)


def _takes_all(provider: str) -> bool:
    """Whether nodes that it leaves to the CPU provider would make figures meaningless."""
    return _is_gpu(provider) or provider in _ort_plugins.PLUGINS


def _is_gpu(provider: str) -> bool:
    return provider in (*CUDA, "DmlExecutionProvider", _ort_plugins.TENSORRT_RTX)
