"""What Triton needs to know of an engine in an output folder: its files, its tensors and the batches that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitprune.errors import DamagedFile, InputError

from ..artifact import MANIFEST, EngineEntry, Manifest
from ..backends.base import TensorSpec
from ..backends.tensorrt import read_sidecar
from ..files import sha256_file
from ..runtime import CHUNK

BACKENDS = ("onnxruntime", "tensorrt")  # Triton's names are ours
RTX = "tensorrt-rtx"


@dataclass(frozen=True)
class Engine:
    """An engine whose files are what its manifest says.

    Attributes:
        folder: the output folder that it lies in.
        manifest: of that folder.
        manifest_sha256: of the manifest's file.
        backend: what runs it in Triton: onnxruntime or tensorrt.
        options: how the build loaded it.
        files: the model file, then the files with weights that it refers to.
        inputs, outputs: its tensors.
        batch: the fewest and the most images in a run.
        profiles: the batch that each optimisation profile is tuned for; empty for an ONNX file.
        capabilities: compute capabilities of the GPUs that it is for; empty for an ONNX file.
    """

    folder: Path
    manifest: Manifest
    manifest_sha256: str
    backend: str
    options: Mapping[str, Any]
    files: tuple[Path, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: tuple[int, int]
    profiles: tuple[int, ...] = ()
    capabilities: tuple[str, ...] = ()

    @property
    def batched(self) -> bool:
        """Whether Triton may put requests together: it sends any batch from one image upwards."""
        return self.batch[0] == 1 and not any(isinstance(spec.shape[0], int) for spec in self.inputs)


def open_engine(folder: Path, runtime: str | None) -> Engine:
    """The engine for ``runtime`` in an output folder; None: the one that was run when it was built, if Triton runs it.

    Raises:
        InputError: there is no such folder, or no engine in it that Triton runs.
        DamagedFile: a file is not what the manifest says.
        ImportError: the engine is an ONNX file, and onnx is not installed.
    """
    manifest = Manifest.load(folder)
    entry = _entry(manifest, folder, runtime)
    extra = entry.model_extra or {}
    name = extra.get("file", "model.onnx")
    file = manifest.file(folder, name)
    sidecar = f"{name.removesuffix('.plan')}.json"
    beside = [n for n in manifest.files if n.startswith(f"{name}.") or n == sidecar]
    checked = [manifest.file(folder, other) for other in beside]
    weights = [path for path in checked if path.name.startswith(f"{file.name}.data")]
    facts = _of_onnx(file, extra) if entry.runtime == "onnxruntime" else _of_plan(file, extra)
    return Engine(
        folder=folder,
        manifest=manifest,
        manifest_sha256=sha256_file(folder / MANIFEST),
        backend=entry.runtime,
        options=extra.get("options", {}),
        files=(file, *weights),
        **facts,
    )


def _entry(manifest: Manifest, folder: Path, runtime: str | None) -> EngineEntry:
    """What the manifest says of the engine to serve."""
    if runtime not in (None, RTX, *BACKENDS):
        raise InputError(f"--runtime must be {' or '.join(BACKENDS)}, got {runtime!r}")
    wanted = BACKENDS if runtime is None else (runtime,)
    fitting = [e for e in manifest.engines if e.runtime in wanted and e.runtime in BACKENDS]
    if fitting:
        return min(fitting, key=lambda entry: entry.status != "run")
    there = ", ".join(entry.runtime for entry in manifest.engines) or "none"
    reason = f"it has no engine for {' or '.join(wanted)}, only {there}"
    if RTX in (runtime, *(entry.runtime for entry in manifest.engines)):
        reason = f"Triton has no backend for TensorRT-RTX, and the engines here are {there}"
    raise InputError(f"{folder}: {reason}; build one with the runtime {' or '.join(BACKENDS)}")


def _of_onnx(path: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors and batches of an ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise DamagedFile(f"{path} is no ONNX file; run the build again") from error
    if not graph.input:  # an empty file parses too
        raise DamagedFile(f"{path} is no ONNX file; run the build again")
    inputs = tuple(_onnx_tensor(value) for value in graph.input)
    size = inputs[0].shape[0]
    free = (extra.get("min_batch", 1), extra.get("max_batch") or CHUNK)
    outputs = tuple(_onnx_tensor(value) for value in graph.output)
    return {"inputs": inputs, "outputs": outputs, "batch": (size, size) if isinstance(size, int) else free}


def _onnx_tensor(value: Any) -> TensorSpec:
    from onnx.helper import tensor_dtype_to_np_dtype

    kind = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
    return TensorSpec(value.name, shape, tensor_dtype_to_np_dtype(kind.elem_type).name)


def _of_plan(path: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors, batches, profiles and GPUs of a TensorRT plan, as its sidecar has them."""
    sidecar = read_sidecar(path)
    inputs, outputs = (
        tuple(TensorSpec(one["name"], tuple(one["shape"]), one["dtype"]) for one in sidecar[way])
        for way in ("inputs", "outputs")
    )
    shapes = [profile[inputs[0].name] for profile in sidecar["profiles"]]  # (min, opt, max) of each profile
    most = max(largest[0] for _, _, largest in shapes)
    return {
        "inputs": inputs,
        "outputs": outputs,
        "batch": (min(least[0] for least, _, _ in shapes), min(most, extra.get("max_batch") or most)),
        "profiles": tuple(best[0] for _, best, _ in shapes),
        "capabilities": tuple(sidecar["compute_capabilities"]),
    }
