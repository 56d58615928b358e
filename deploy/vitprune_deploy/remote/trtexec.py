"""TensorRT's own program, trtexec, for a device that has TensorRT and nothing in Python: what to ask it, what it says.

All of this is argument lists and the reading of texts and files; the caller runs the program on the device and quotes
the arguments for its shell. The facts are those of the sources of trtexec in TensorRT 10.0 to 11.1
(https://github.com/NVIDIA/TensorRT, samples/trtexec and samples/common), which differ thus:

    TensorRT 10     copies data from and to the host unless told not to, waits by sleeping, launches kernels singly
    TensorRT 11     copies nothing unless told to, waits by spinning, records a CUDA graph unless told not to

Here a run is timed as our own TensorRT backend times it: one batch at a time (``--exposeDMA``; otherwise trtexec puts
the next batch on the stream while one runs), no CUDA graph, a spinning wait.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vitprune.errors import DamagedFile, InputError, MissingError

from ..backends import _trt_sparse
from ..backends._trt_sidecar import SCHEMA
from ..backends.base import TensorSpec
from ..backends.tensorrt import Shapes
from ._trtexec_log import Version, explain, read_gpu, read_version

__all__ = [
    "PLACES",
    "Times",
    "Version",
    "build_arguments",
    "explain",
    "help_arguments",
    "plan_version",
    "read_gpu",
    "read_outputs",
    "read_times",
    "read_version",
    "run_arguments",
    "sidecar",
    "timing_arguments",
]

PLACES = ("trtexec", "/usr/src/tensorrt/bin/trtexec")  # on the path, or where JetPack has it
LEAST_MAJOR = 10  # strong typing came with it
WARM_UP_MS = 200  # as trtexec does by itself, and our backend
NO_NUMBER = re.compile(r"(?<=[\[, \n])-?(?:nan|inf)(?=\s*[,\]])")  # as C++ writes them
PYTHON_NAMES = {"nan": "NaN", "-nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
PLAN_TAG, PLAN_VERSION = b"ftrt", slice(24, 28)  # where trtexec --getPlanVersionOnly finds them
FORBIDDEN = {",": "a comma", "'": "a quotation mark"}  # in what trtexec splits at them


class Times(NamedTuple):
    """Milliseconds of each timed run."""

    latency_ms: list[float]  # from the host to the host; without copies the same as compute_ms
    compute_ms: list[float]  # on the GPU alone


def help_arguments(program: str) -> list[str]:
    """Ask for nothing but the banner, which ``read_version`` reads: ``--version`` ends with an error."""
    return [program, "--help"]


def build_arguments(
    program: str,
    version: Version,
    onnx: str,
    plan: str,
    profiles: Sequence[Mapping[str, Shapes]],
    *,
    workspace_mb: int | None = None,
    timing_cache: str | None = None,
    sparse: bool = False,
) -> list[str]:
    """Build ``plan`` from an ONNX file, in the precision that the file itself is in.

    Args:
        program: trtexec on the device; so are all paths.
        profiles: for each optimisation profile, the shapes of each input; none for a file without free sizes, for
            which trtexec takes no shapes.
        workspace_mb: memory that a layer may use while it runs; None: as much as there is.
        timing_cache: file with the timings of earlier builds, which is made or added to.
        sparse: kernels that skip zeros may be used for weights of the pattern 2:4, as they are in the file.

    Raises:
        InputError: a name or path that trtexec would split.
        MissingError: a TensorRT that is too old.
    """
    _check_version(version)
    arguments = [program, f"--onnx={onnx}", f"--saveEngine={plan}", "--skipInference"]
    if version.major == LEAST_MAJOR:
        arguments.append("--stronglyTyped")  # all that later ones can do
    for number, profile in enumerate(profiles):
        arguments += [f"--profile={number}"] if len(profiles) > 1 else []
        for which in Shapes._fields:
            shapes = {name: getattr(sizes, which) for name, sizes in profile.items()}
            arguments.append(f"--{which}Shapes={_shapes(shapes)}")
    if workspace_mb is not None:
        arguments.append(f"--memPoolSize=workspace:{workspace_mb}")  # in MiB
    if timing_cache is not None:
        arguments.append(f"--timingCacheFile={timing_cache}")
    if sparse:
        arguments.append("--sparsity=enable")
    return arguments


def timing_arguments(
    program: str,
    version: Version,
    plan: str,
    shapes: Mapping[str, Sequence[int]],
    times: str,
    *,
    runs: int,
    seconds: float = 0.0,
    profile: int | None = None,
    copies: bool = True,
) -> list[str]:
    """Time ``plan`` on random inputs of ``shapes``, and write every run to the file ``times``.

    Args:
        runs: the least number of timed runs.
        seconds: the least time that they take together; both must be reached.
        profile: number of the optimisation profile; None: the first.
        copies: whether a run includes copying from and to the host.

    Raises:
        InputError: a name that trtexec would split.
        MissingError: a TensorRT that is too old.
    """
    return [
        *_loaded(program, version, plan, shapes, profile),
        *_launch(version, copies),
        f"--warmUp={WARM_UP_MS}",
        f"--duration={seconds:g}",
        f"--iterations={runs}",
        f"--avgRuns={runs}",  # the log has a line for each so many runs
        f"--exportTimes={times}",
    ]


def run_arguments(
    program: str,
    version: Version,
    plan: str,
    inputs: Mapping[str, tuple[Sequence[int], str]],
    outputs: str,
    *,
    profile: int | None = None,
) -> list[str]:
    """Run ``plan`` once on the given inputs, and write what it gives to the file ``outputs``.

    Args:
        inputs: shape and file of each; a file holds nothing but the numbers, as ``ndarray.tobytes`` gives them.

    Raises:
        InputError: a name or path that trtexec would split.
        MissingError: a TensorRT that is too old.
    """
    for name, (_, file) in inputs.items():
        _check_name("input", name)
        _check_name("file", file, ":")
    return [
        *_loaded(program, version, plan, {name: shape for name, (shape, _) in inputs.items()}, profile),
        *_launch(version, copies=True),
        f"--loadInputs={','.join(f'{name}:{file}' for name, (_, file) in inputs.items())}",
        "--warmUp=0",
        "--duration=0",
        "--iterations=1",
        f"--exportOutput={outputs}",
    ]


def read_times(text: str) -> Times:
    """The runs in the file of ``--exportTimes``; trtexec leaves out the warm-up.

    The intervals are read, never computed from the moments beside them: those have six digits in all.

    Raises:
        DamagedFile: the file is cut off, or holds no runs.
    """
    try:
        runs = json.loads(text)
        times = Times([float(run["latencyMs"]) for run in runs], [float(run["computeMs"]) for run in runs])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"trtexec's file of times is cut off or of an unknown form ({error})") from error
    if not times.compute_ms:
        raise DamagedFile("trtexec's file of times holds no run; measure again")
    return times


def read_outputs(text: str) -> dict[str, np.ndarray]:
    """The outputs in the file of ``--exportOutput``, by name: float32, whatever the engine's own type.

    trtexec writes six digits, so that they are off by up to 5e-6 of their size.

    Raises:
        DamagedFile: the file is cut off, or its numbers do not fill its shapes.
    """
    try:
        found = json.loads(NO_NUMBER.sub(lambda word: PYTHON_NAMES[word[0]], text))
        arrays = {}
        for one in found:
            shape = [int(size) for size in one["dimensions"].split("x") if size]
            arrays[one["name"]] = np.array(one["values"], np.float32).reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"trtexec's file of outputs is cut off or of an unknown form ({error})") from error
    return arrays


def plan_version(head: bytes) -> str | None:
    """The TensorRT that built a plan, as in '10.3.0.30', from its first 28 bytes; None where they are no plan's."""
    version = head[PLAN_VERSION]
    if not head.startswith(PLAN_TAG) or head[4:8] != bytes(4) or len(version) < 4:
        return None
    return ".".join(map(str, version))


def sidecar(
    log: str,
    head: bytes,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    profiles: Sequence[Mapping[str, Shapes]],
    precision: str | None,
    sparse: bool = False,
) -> dict[str, Any]:
    """What can be known of a plan that trtexec built, under the keys that the sidecars of our own builds have.

    What the files say is left to the caller: sha256, size_bytes, onnx, vitprune. That the plan is in ``precision``
    follows from the network's strong typing, and is not counted as in our own builds.

    Args:
        log: what trtexec said while building.
        head: the first bytes of the plan.
        inputs, outputs: of the ONNX file; trtexec does not tell their types.
        profiles: as they were asked for; for a file without free sizes, its own.
        precision: what the ONNX file is in.
        sparse: kernels that skip zeros were allowed.

    Raises:
        DamagedFile: ``head`` is not that of a plan, or ``log`` is cut off.
    """
    gpu, version = read_gpu(log), plan_version(head)
    if version is None:
        raise DamagedFile("what trtexec wrote is no TensorRT engine; build it again")
    return {
        "schema": SCHEMA,
        "status": "built",
        "precision": precision,
        "runtime": "tensorrt",
        "version": version,
        "gpu": gpu,
        "inputs": [one._asdict() for one in inputs],
        "outputs": [one._asdict() for one in outputs],
        "profiles": [dict(profile) for profile in profiles],
        "compute_capabilities": [gpu["compute_capability"]],
        "flags": [_trt_sparse.FLAG] if sparse else [],
        "hardware_compatibility": "none",
        "sparse": _trt_sparse.account(log.splitlines()) if sparse else None,
        "builder": "trtexec",
    }


def _loaded(
    program: str, version: Version, plan: str, shapes: Mapping[str, Sequence[int]], profile: int | None
) -> list[str]:
    """A plan at given shapes."""
    _check_version(version)
    which = [] if profile is None else [f"--useProfile={profile}"]
    return [program, f"--loadEngine={plan}", f"--shapes={_shapes(shapes)}", *which]


def _launch(version: Version, copies: bool) -> list[str]:
    """One batch at a time, with or without its copies, launched as our backend does."""
    if version.major == LEAST_MAJOR:
        return ["--exposeDMA", "--useSpinWait", *([] if copies else ["--noDataTransfers"])]
    return ["--exposeDMA", "--noCudaGraph", *(["--includeDataTransfers"] if copies else [])]


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    """As in 'images:1x3x224x224,mask:1x197'."""
    for name in shapes:
        _check_name("input", name)
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _check_name(what: str, name: str, more: str = "") -> None:
    """trtexec splits lists of names and files without a way to quote what it splits at."""
    bad = next((letter for letter in (*FORBIDDEN, *more) if letter in name), None)
    if bad is not None:
        called = FORBIDDEN.get(bad, "a colon")
        raise InputError(f"the {what} {name!r} holds {called}, at which trtexec splits its options; rename it")


def _check_version(version: Version) -> None:
    if version.major < LEAST_MAJOR:
        raise MissingError(
            f"trtexec there is of TensorRT {version}, and TensorRT {LEAST_MAJOR} or newer is needed; on a Jetson it "
            "comes with JetPack 6.1"
        )
