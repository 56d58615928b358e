"""What this machine can run and build, found out by trying; nothing is installed or changed."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import vitprune
from vitprune.errors import VitpruneError

from ..backends import onnxruntime as ort_backend
from ..backends import openvino as openvino_backend
from ..backends.base import Backend
from ..backends.tensorrt import capabilities
from ..latency.fingerprint import device_fingerprint
from ..latency.gate import RunQueue
from .answer import Answer, table

EXTRAS = {  # modules that an extra brings; one package of each is enough to tell
    "prune": ("torch", "torchvision", "timm", "onnx", "onnxscript", "safetensors", "accelerate", "jinja2"),
    "cpu": ("onnxruntime",),
    "openvino": ("openvino", "nncf"),
    "tensorrt": ("tensorrt", "cuda.bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "cuda.bindings"),
    "pycuda": ("pycuda",),
    "search": ("ray",),
    "ssh": ("asyncssh",),
}
PACKAGES = (
    "numpy", "pillow", "pydantic", "typer", "rich", "torch", "timm", "onnx", "onnxscript", "safetensors", "accelerate",
    *ort_backend.DISTRIBUTIONS, "openvino", "nncf", "tensorrt", "tensorrt-cu13", "tensorrt_rtx", "cuda-bindings",
    "pycuda", "ray", "asyncssh",
)  # fmt: skip
REMOTE_PROVIDERS = {"AzureExecutionProvider"}  # it asks a server
# y = Relu(x), float [1, 2], opset 17: no onnx package is needed to try a provider
RELU = bytes.fromhex(
    "080812003a3b0a0c0a0178120179220452656c751201675a130a0178120e0a0c08011208"
    "0a0208010a02080262130a0179120e0a0c080112080a0208010a02080242040a001011"
)


def doctor() -> Answer:
    """The facts of this machine; code 3 if it can run nothing, or holds packages that exclude each other."""
    facts: dict[str, Any] = {
        "vitprune": vitprune.__version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "machine": _machine(),
        "packages": {name: _version(name) for name in PACKAGES},
        "extras": {name: [m for m in modules if not is_installed(m)] for name, modules in EXTRAS.items()},
        "torch": _torch(),
        "onnxruntime": _onnxruntime(),
        "openvino": {p: try_openvino(p) for p in ("fp32", "bf16")} if is_installed("openvino") else {},
        "tensorrt": capabilities(),
        "gate": RunQueue.available(),
    }
    facts["can"] = _can(facts)
    facts["problems"] = _problems(facts)
    return Answer(_text(facts), facts, 3 if facts["onnxruntime"]["conflict"] or not facts["can"]["run"] else 0)


def _machine() -> dict[str, Any]:
    """Processor, memory, disk and GPUs; sizes in 10^6 bytes."""
    kept = ("cpu", "architecture", "cores", "flags", "memory_mb", "os", "gpus")
    found = device_fingerprint("none")
    return {name: found[name] for name in kept} | {
        "memory_free_mb": _free_memory_mb(),
        "disk_free_mb": shutil.disk_usage(Path.cwd()).free // 10**6,
    }


def _free_memory_mb() -> int | None:
    """Memory that could be had now; None where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 10**6
    except (ValueError, OSError, AttributeError):
        return None


def _torch() -> dict[str, Any] | None:
    """What pruning and recovery may use; None without torch."""
    if not is_installed("torch"):
        return None
    try:
        import torch

        return {"cuda": torch.cuda.is_available(), "threads": torch.get_num_threads(), "why": ""}
    except (ImportError, OSError, RuntimeError) as error:  # a broken installation fails in ways of its own
        return {"cuda": False, "threads": 0, "why": f"torch cannot be imported: {_one_line(error)}"}


def _onnxruntime() -> dict[str, Any]:
    """The installed packages that exclude each other, if any, and for each provider why it does not work, or ''."""
    try:
        ort_backend.check_packages()
        if not is_installed("onnxruntime"):
            return {"conflict": None, "providers": {}}
        import onnxruntime

        names = [name for name in onnxruntime.get_available_providers() if name not in REMOTE_PROVIDERS]
    except VitpruneError as error:
        return {"conflict": str(error), "providers": {}}
    except (ImportError, OSError) as error:
        return {"conflict": f"onnxruntime cannot be imported: {_one_line(error)}", "providers": {}}
    return {"conflict": None, "providers": {name: try_provider(name) for name in names}}


def try_provider(name: str) -> str:
    """Why ONNX Runtime's provider ``name`` does not compute y = max(x, 0) here; empty where it does."""
    return try_loading(name, partial(ort_backend.OnnxRuntime.load, options={"provider": name}))


def try_openvino(precision: str) -> str:
    """The same of OpenVINO in ``precision``."""
    return try_loading("openvino", partial(openvino_backend.OpenVino.load, options={"precision": precision}))


def try_loading(name: str, load: Callable[[Path], Backend]) -> str:
    """Why a small graph that ``load`` loads does not give what it should; empty where it does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "relu.onnx")
        path.write_bytes(RELU)
        try:
            with load(path) as model:
                found = model.run(np.array([[-1.0, 2.0]], np.float32))
        except VitpruneError as error:
            return str(error)
        except Exception as error:  # a provider's own libraries raise nearly anything
            return f"{name} failed: {_one_line(error)}"
    return "" if found.tolist() == [[0.0, 2.0]] else f"{name} computed max(x, 0) wrongly: {found.tolist()}"


def _can(facts: Mapping[str, Any]) -> dict[str, list[str]]:
    """What runs artefacts here, what engines can be built here, and whether models can be pruned."""
    working = [name for name, why in facts["onnxruntime"]["providers"].items() if not why]
    modules = {name.replace("_", "-"): found for name, found in facts["tensorrt"].items()}
    return {
        "run": [f"onnxruntime {name}" for name in working]
        + [f"openvino in {precision}" for precision, why in facts["openvino"].items() if not why]
        + [name for name, one in modules.items() if one["runs"]],
        "build engines": [name for name, one in modules.items() if one["builds"]],
        "prune": []
        if facts["extras"]["prune"]
        else ["torch" + (" with CUDA" if facts["torch"]["cuda"] else " on the CPU")],
    }


def _problems(facts: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that does not work, and what to do; what nobody asked for is not among them."""
    found = [facts["onnxruntime"]["conflict"], *facts["onnxruntime"]["providers"].values()]
    for name, one in facts["tensorrt"].items():
        if one["version"] and one["why"]:
            found.append(
                f"{name} {'builds engines here, but runs none' if one['builds'] else 'is of no use'}: {one['why']}"
            )
    if facts["torch"] is not None:
        found.append(facts["torch"]["why"])
    if not facts["can"]["run"]:
        found.append("no runtime works here; run `pip install 'vitprune[cpu]'`")
    if facts["extras"]["prune"]:
        missing = ", ".join(facts["extras"]["prune"])
        found.append(f"models cannot be pruned without {missing}; run `pip install 'vitprune[prune]'`")
    if not facts["gate"]:
        found.append("this system does not count waits for a processor, so latencies are measured without a gate")
    return list(dict.fromkeys(filter(None, found)))


def _text(facts: Mapping[str, Any]) -> str:
    machine, gpus = facts["machine"], facts["machine"]["gpus"]
    memory = f"{machine['memory_mb']} MB, {machine['memory_free_mb']} MB of it free"
    rows = [
        ["vitprune", facts["vitprune"]],
        ["Python", f"{facts['python']['version']}  {facts['python']['executable']}"],
        ["system", f"{machine['os']}, {machine['architecture']}"],
        ["processor", f"{machine['cpu']}, {machine['cores']} cores"],
        ["instructions", " ".join(machine["flags"]) or "none of note"],
        ["memory", memory],
        ["disk", f"{machine['disk_free_mb']} MB free in {Path.cwd()}"],
        ["GPU", "; ".join(f"{g['name']} ({g['compute_capability']}), {g['memory_mb']} MB" for g in gpus) or "none"],
        ["latency gate", "yes" if facts["gate"] else "no"],
    ]
    packages = [[name, version] for name, version in facts["packages"].items() if version]
    providers = [[name, why or "works"] for name, why in facts["onnxruntime"]["providers"].items()]
    providers += [[f"openvino in {precision}", why or "works"] for precision, why in facts["openvino"].items()]
    engines = [
        [name, one["version"] or "-", _yes(one["builds"]), _yes(one["runs"]), " ".join(one["compute_capabilities"])]
        for name, one in facts["tensorrt"].items()
    ]
    can = [[name, ", ".join(what) or "nothing"] for name, what in facts["can"].items()]
    parts = [
        table(rows),
        table(packages, head=["package", "version"]),
        table(providers, head=["onnxruntime's provider, or openvino", ""]),
        table(engines, head=["module", "version", "builds", "runs", "for compute capabilities"]),
        table(can, head=["this machine can", ""]),
    ]
    return "\n\n".join(parts + (["\n".join(f"- {line}" for line in facts["problems"])] if facts["problems"] else []))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_installed(module: str) -> bool:
    """Whether ``module`` is installed; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
