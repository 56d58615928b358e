"""Writes a model into a repository of Triton: its configuration, its labels and its files, whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitprune.errors import InputError

from ..artifact import hash_files
from ..files import atomic_folder, copy_atomic, sweep, write_atomic
from ..runtime import preprocess_of
from .config import LABELS, class_names, dims, model_config
from .engine import Engine, open_engine
from .pbtxt import to_text

RECORD = "vitprune.json"  # what was written, so that it may be replaced; Triton does not look at it
VERSION = "1"
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}  # what Triton looks for


class Written(NamedTuple):
    """A model in a repository.

    Attributes:
        folder: of the model.
        files: in it, with their SHA-256.
        engines: that it was made of.
        config: the configuration, as ``pbtxt.to_text`` takes it.
    """

    folder: Path
    files: dict[str, str]
    engines: tuple[Engine, ...]
    config: dict[str, Any]


def write_repository(
    folders: Sequence[Path],
    repository: Path,
    *,
    name: str | None = None,
    runtime: str | None = None,
    queue_delay_us: int,
) -> Written:
    """Put the engine of an output folder, or the TensorRT plans of several for several GPUs, into ``repository``.

    Args:
        name: of the model; None: that of the first folder's profile.
        runtime: which of a folder's engines; None: the one that was run when it was built, if Triton runs it.
        queue_delay_us: microseconds that a request may wait for others to share its batch.

    Raises:
        InputError: a folder is not there, has no engine that Triton runs, or does not go with the others; or the
            repository has something else of that name.
        DamagedFile: a file of a folder is not what its manifest says.
        MissingError: the disk is full.
        ImportError: an engine is an ONNX file, and onnx is not installed.
    """
    engines = tuple(open_engine(folder, runtime) for folder in folders)
    _check_together(engines)
    model = _model_name(name, engines[0])
    target = repository / model
    if (target.exists() or target.is_symlink()) and not _ours(target):
        raise InputError(
            f"{target} was not written by this command, or has been changed since; "
            "remove it, or choose another --name or --output"
        )
    plans = {one: _plan_name(engine) for engine in engines for one in engine.capabilities} if len(engines) > 1 else {}
    config = model_config(engines, model, plans, queue_delay_us)
    sweep(repository, model)
    with atomic_folder(target) as temporary:
        _fill(temporary, engines, config)
        files = hash_files(temporary, _files_in(temporary))
        write_atomic(temporary / RECORD, json.dumps({"files": files}, indent=1) + "\n")
    return Written(target, files, engines, config)


def _check_together(engines: Sequence[Engine]) -> None:
    """Refuse folders that make no single model."""
    first, seen = engines[0], {}  # type: tuple[Engine, dict[str, Path]]
    for engine in engines if len(engines) > 1 else ():
        if engine.backend != "tensorrt":
            raise InputError(
                f"{engine.folder} has an engine for {engine.backend}: several folders make one model only if they have "
                "TensorRT plans for different GPUs"
            )
        if _face(engine) != _face(first):
            raise InputError(
                f"{engine.folder} and {first.folder} differ in their tensors, optimisation profiles, classes or "
                "preprocessing, so they make no single model; give each another --name"
            )
        for capability in engine.capabilities:
            _check_capability(capability, engine, seen.get(capability))
            seen[capability] = engine.folder


def _check_capability(capability: str, engine: Engine, other: Path | None) -> None:
    """Refuse a compute capability by which Triton could not tell ``engine`` from the rest."""
    if not re.fullmatch(r"\d+\.\d+", capability):
        raise InputError(
            f"{engine.folder} has a plan for compute capability {capability}, and Triton chooses by exact ones; "
            "build it for one GPU"
        )
    if other is not None:
        raise InputError(f"{other} and {engine.folder} are both for compute capability {capability}; give one of them")


def _face(engine: Engine) -> tuple[Any, ...]:
    """What a client sees of an engine, and what one configuration says of all of them."""
    tensors = [(spec.name, dims(spec), spec.dtype) for spec in (*engine.inputs, *engine.outputs)]
    return (tensors, len(engine.profiles), class_names(engine), preprocess_of(engine.manifest, engine.folder))


def _model_name(name: str | None, engine: Engine) -> str:
    """``name``, or that of the engine's profile."""
    found = name or (engine.manifest.model_extra or {}).get("name") or engine.folder.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(found)):
        raise InputError(f"a model's name must be made of letters, digits and ._-, got {found!r}; give one with --name")
    return str(found)


def _plan_name(engine: Engine) -> str:
    """The file of one of several plans."""
    return f"model_{'_'.join('sm' + capability.replace('.', '') for capability in engine.capabilities)}.plan"


def _fill(folder: Path, engines: Sequence[Engine], config: Mapping[str, Any]) -> None:
    """Write everything that Triton reads."""
    write_atomic(folder / "config.pbtxt", to_text(config))
    if names := class_names(engines[0]):
        write_atomic(folder / LABELS, "".join(f"{name}\n" for name in names))
    for engine in engines:
        model, *beside = engine.files
        target = folder / VERSION / (FILES[engine.backend] if len(engines) == 1 else _plan_name(engine))
        if not beside:
            copy_atomic(model, target)
            continue
        copy_atomic(model, target / target.name)  # Triton takes a folder of that name for a model of several files
        for file in beside:
            copy_atomic(file, target / file.name)


def _ours(folder: Path) -> bool:
    """Whether all that is in ``folder`` is as this module wrote it."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        return bool(record["files"] == hash_files(folder, set(_files_in(folder)) - {RECORD}))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
