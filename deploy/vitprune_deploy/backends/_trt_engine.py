"""Building and refitting TensorRT engines, each in a child process; beside every plan lies a JSON sidecar.

Precision stands in the ONNX file, never in a flag, and networks are strongly typed. That the plan holds the precision
that was asked for is counted, not assumed; see ``_trt_census``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vitprune import __version__
from vitprune.errors import InputError, MissingError, VitpruneError

from ..files import atomic_path, sha256_file, write_atomic
from . import _onnx_file
from ._cuda import open_cuda
from ._trt_child import MODULES, Progress, ask
from ._trt_sidecar import SCHEMA, read_sidecar, sidecar_path

DESCRIBE_TIMEOUT_S = 120.0
FORMATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
COMPATIBILITY = ("none", "ampere_plus", "same_compute_capability")


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
        precision: what the engine must be in: fp32, fp16 or bf16; None: what the ONNX file says of itself, if it does.
        compute_capabilities: of the GPUs to build for, as in '8.6'; empty: the GPU in the machine, or for TensorRT-RTX
            8.6 and all that is newer.
        hardware_compatibility: other GPUs that the engine must serve: ``none``, ``ampere_plus`` (Ampere and later) or
            ``same_compute_capability``; of TensorRT, which may be slower then.
        version_compatible: later versions of TensorRT must load it too; of TensorRT, which may be slower then.
        refit: its weights can be changed. TensorRT 11.3's release notes know of such engines that lose a bias.
        sparse: kernels that skip zeros may be used for weights of the pattern 2:4; see ``_trt_sparse``.
        workspace_mb: memory that a layer may use while it runs; None: as much as there is.
        timing_cache: folder with the timings of earlier builds, a file for each GPU and version; None: nothing is kept.
        timeout_s: after so many seconds the build is given up.
    """

    profiles: tuple[Mapping[str, Shapes], ...]
    module: str = "tensorrt"
    precision: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    refit: bool = False
    sparse: bool = False
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        check_module(self.module)
        if not self.profiles:
            raise InputError("an engine needs at least one profile of min, opt and max shapes")
        for number, profile in enumerate(self.profiles):
            for name, shapes in profile.items():
                _check_shapes(f"profile {number}, {name}", shapes)
        if self.precision not in (None, *FORMATS):
            raise InputError(f"precision must be one of {', '.join(FORMATS)}, got {self.precision!r}")
        if self.hardware_compatibility not in COMPATIBILITY:
            known = ", ".join(COMPATIBILITY)
            raise InputError(f"hardware_compatibility must be one of {known}, got {self.hardware_compatibility!r}")
        if self.timeout_s <= 0:
            raise InputError(f"timeout_s must be > 0 seconds, got {self.timeout_s}")
        if self.workspace_mb is not None and self.workspace_mb <= 0:
            raise InputError(f"workspace_mb must be > 0, got {self.workspace_mb}")


def build_engine(
    onnx_path: Path, out_path: Path, options: EngineOptions, progress: Progress | None = None
) -> dict[str, Any]:
    """Build the plan ``out_path`` and its sidecar from an ONNX file; what the sidecar says.

    Raises:
        InputError: the file is not there or of another precision, a profile or compute capability does not fit, this
            TensorRT has not what is asked for, or time ran out.
        NotSupported: TensorRT does not take a node, which the message names, it crashed, or what it built is not in the
            precision that was asked for.
        DamagedFile: the file is no ONNX file.
        MissingError: the module, a driver, memory or room on the disk is missing.
    """
    _check_file(onnx_path)
    precision = precision_of(onnx_path, options)
    request = {
        "profiles": [dict(profile) for profile in options.profiles],
        "format": FORMATS.get(precision or ""),
        "weights": _onnx_file.weights(onnx_path),
        "compute_capabilities": list(options.compute_capabilities),
        "hardware_compatibility": options.hardware_compatibility,
        "version_compatible": options.version_compatible,
        "refit": options.refit,
        "sparse": options.sparse,
        "workspace_mb": options.workspace_mb,
        "timing_cache": str(options.timing_cache) if options.timing_cache else None,
    }
    with atomic_path(out_path) as plan:
        request.update(onnx=str(onnx_path), plan=str(plan))
        found = ask(
            "build",
            options.module,
            request,
            subject=str(onnx_path),
            timeout_s=options.timeout_s,
            progress=progress,
        )
        sidecar = {"schema": SCHEMA, "status": "built", "precision": precision, **found, **files_of(plan, onnx_path)}
    write_atomic(sidecar_path(out_path), json.dumps(sidecar, indent=1) + "\n")
    return sidecar


def refit_engine(plan: Path, onnx_path: Path, out_path: Path, *, timeout_s: float = 3600.0) -> dict[str, Any]:
    """Write ``out_path``, the engine ``plan`` with the weights of an ONNX file, and its sidecar; what that says.

    The file must be of the same plan and precision as the one that the engine was built from: a model that was trained
    on. This takes seconds, and the GPU that the engine is for.

    Raises:
        InputError: the engine was not built to be refitted, or the file is of another model.
        NotSupported: TensorRT could not do it, or crashed.
        DamagedFile: the plan is not what its sidecar says.
        MissingError: the module, a driver or room on the disk is missing.
    """
    sidecar = read_sidecar(plan)
    _check_file(onnx_path)
    if "REFIT" not in sidecar.get("flags", ()):
        raise InputError(f"{plan} was not built to be refitted; set runtime.refit: true and build it again")
    theirs, ours = sidecar["onnx"]["structure"], _onnx_file.structure(onnx_path)
    other = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if other:
        raise InputError(
            f"{onnx_path} differs from {sidecar['onnx']['name']}, which {plan} was built from, in {', '.join(other)}: "
            "refitting changes weights alone; build an engine from it"
        )
    with atomic_path(out_path) as refitted:
        request = {
            "engine": str(plan),
            "onnx": str(onnx_path),
            "plan": str(refitted),
            "host_code": "VERSION_COMPATIBLE" in sidecar["flags"],
        }
        ask("refit", sidecar["runtime"], request, subject=str(plan), timeout_s=timeout_s)
        sidecar = {**sidecar, "refitted_from": sidecar["sha256"], **files_of(refitted, onnx_path)}
    write_atomic(sidecar_path(out_path), json.dumps(sidecar, indent=1) + "\n")
    return sidecar


def check_parses(onnx_path: Path, module: str = "tensorrt", timeout_s: float = 600.0) -> None:
    """Return if TensorRT takes every node of an ONNX file, without building anything; raises as ``build_engine``."""
    check_module(module)
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
            described = ask("describe", module, {}, timeout_s=DESCRIBE_TIMEOUT_S)
            facts.update(described, builds=True, runs=gpu is not None)
        except VitpruneError as error:
            facts["why"] = str(error)
        found[module] = facts
    return found


def check_module(module: str) -> None:
    """Raises InputError for a module that is no TensorRT."""
    if module not in MODULES:
        raise InputError(f"module must be {' or '.join(MODULES)}, got {module!r}")


def files_of(plan: Path, onnx_path: Path) -> dict[str, Any]:
    """What the sidecar says of the plan and of the file that its weights come from."""
    return {
        "sha256": sha256_file(plan),
        "size_bytes": plan.stat().st_size,
        "onnx": {**_onnx_file.identity(onnx_path), "structure": _onnx_file.structure(onnx_path)},
        "vitprune": __version__,
    }


def precision_of(onnx_path: Path, options: EngineOptions) -> str | None:
    """What the engine is to be in.

    Raises:
        InputError: the file says that it is in another precision than the one asked for.
    """
    said = _onnx_file.metadata(onnx_path).get("precision")
    if options.precision is not None and said is not None and said != options.precision:
        raise InputError(
            f"{onnx_path} is in {said}, and was to become an engine in {options.precision}; export it in that precision"
        )
    return options.precision or said


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: there is no such ONNX file")


def _check_shapes(place: str, shapes: Shapes) -> None:
    """TensorRT would say no more than -1."""
    least, best, most = shapes
    if not len(least) == len(best) == len(most):
        raise InputError(f"{place}: min, opt and max need the same number of axes, got {least}, {best}, {most}")
    for axis, (low, middle, high) in enumerate(zip(least, best, most)):
        if not 1 <= low <= middle <= high:
            raise InputError(f"{place}, axis {axis}: 1 <= min <= opt <= max must hold, got {low}, {middle}, {high}")
