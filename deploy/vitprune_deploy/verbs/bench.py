"""How long an ONNX file takes here: interleaved visits, an interval, and the circumstances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vitprune.errors import InputError

from ..backends.base import TensorSpec
from ..backends.onnxruntime import OnnxRuntime
from ..console import Console
from ..files import sha256_file
from ..latency.fingerprint import device_fingerprint, machine_state
from ..latency.protocol import Measurement, measure
from ..latency.visits import Subject
from .answer import Answer, milliseconds, table

IMAGE_AXES = {2: "height", 3: "width"}  # of an input [batch, channels, height, width]


def bench(
    console: Console,
    files: Sequence[Path],
    *,
    batch: int,
    threads: int | None,
    image_size: tuple[int, int] | None,
    provider: str,
    seconds: float,
) -> Answer:
    """Median latency of each of ``files``, the first being the one that the others are compared with.

    Raises:
        InputError: a file is not there, or has an axis of free size that nothing sets.
        DamagedFile: a file is no ONNX file.
        MissingError: the runtime or the provider is not here.
    """
    loaded = [_load(path, batch, image_size, threads, provider) for path in files]
    names = [path.name if len({f.name for f in files}) == len(files) else str(path) for path in files]
    subjects = [Subject.of(name, model, feed) for name, (model, feed) in zip(names, loaded, strict=True)]
    with console.stage("measure", 1, 1):
        found = measure(subjects, subjects[0], max_seconds=seconds, progress=console.progress)
    runtime = loaded[0][0]
    circumstances = {
        "batch": batch,
        "shapes": [{name: list(array.shape) for name, array in feed.items()} for _, feed in loaded],
        "device": device_fingerprint(runtime.runtime, runtime.provider, threads),
        "state": machine_state(),
    }
    for model, _ in loaded:
        model.close()
    results = [_result(path, one) for path, one in zip(files, found, strict=True)]
    unstable = any(one.unstable for one in found)
    return Answer(_text(found, circumstances), {"results": results, "circumstances": circumstances}, int(unstable))


def _load(
    path: Path, batch: int, image_size: tuple[int, int] | None, threads: int | None, provider: str
) -> tuple[OnnxRuntime, dict[str, np.ndarray]]:
    """The model with every free axis set, so that the runtime may specialise; and noise for its inputs."""
    with OnnxRuntime.load(path, threads=threads, options={"provider": provider, "cpu_nodes": True}) as model:
        inputs = model.inputs
    sizes: dict[str, int] = {}
    feed = {spec.name: _noise(spec, _shape(path, spec, batch, image_size, sizes)) for spec in inputs}
    return OnnxRuntime.load(path, threads=threads, options={"provider": provider, "sizes": sizes}), feed


def _shape(
    path: Path, spec: TensorSpec, batch: int, image_size: tuple[int, int] | None, sizes: dict[str, int]
) -> list[int]:
    """The input's shape; what its free axes are set to is added to ``sizes``, by their names."""
    shape = []
    for axis, size in enumerate(spec.shape):
        if isinstance(size, int):
            if axis == 0 and size != batch:
                raise InputError(f"{path}: input {spec.name} has a fixed batch of {size}; run with --batch {size}")
            shape.append(size)
            continue
        if axis == 0:
            value = batch
        elif axis in IMAGE_AXES and len(spec.shape) == 4:
            if image_size is None:
                raise InputError(f"{path}: the {IMAGE_AXES[axis]} of input {spec.name} is free; give --image-size")
            value = image_size[axis - 2]
        else:
            raise InputError(
                f"{path}: axis {axis} ({size}) of input {spec.name} is free, and bench cannot tell its size"
            )
        sizes[size] = value
        shape.append(value)
    return shape


def _noise(spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
    """Normal noise, or ones where the input is not of floats."""
    if np.dtype(spec.dtype).kind != "f":
        return np.ones(shape, spec.dtype)
    return np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)


def _result(path: Path, one: Measurement) -> dict[str, Any]:
    ratio = {name: getattr(one, f"{name}_ms") / one.reference_ms for name in ("value", "low", "high")}
    return {"file": str(path), "sha256": sha256_file(path), **asdict(one), "of_first": ratio}


def _text(found: Sequence[Measurement], circumstances: Mapping[str, Any]) -> str:
    rows = []
    for one in found:
        interval = f"{milliseconds(one.low_ms)} to {milliseconds(one.high_ms)}"
        ratio = f"{one.value_ms / one.reference_ms:.3f}"
        note = "unstable" if one.unstable else "" if one.gated else "others ran meanwhile, or the system cannot tell"
        rows.append([one.name, milliseconds(one.value_ms), interval, ratio, one.accepted, one.rejected, note])
    head = ["file", "median (ms)", "95% interval", "of the first", "samples", "rejected", ""]
    device, state = circumstances["device"], circumstances["state"]
    threads = "all threads" if device["threads"] is None else f"{device['threads']} threads"
    where = (
        f"{device['cpu']}, {device['cores']} cores; {device['runtime']} {device['runtime_version']} "
        f"({device['provider']}), {threads}, batch {circumstances['batch']}; load {state.get('load_1min', 'not known')}"
    )
    return table(rows, head=head, right=[1, 3, 4, 5]) + f"\n\n{where}"
