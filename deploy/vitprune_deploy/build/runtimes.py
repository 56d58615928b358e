"""From a profile to the runtime that it names: how exported files are loaded, and on what device that is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitprune.errors import InputError

from ..backends.base import Backend
from ..cache import cache_dir
from ..profile import Profile
from ..remote.device import Device, Here

if TYPE_CHECKING:
    from vitprune.model.config import VitConfig

    from ..backends.tensorrt import EngineOptions
    from ..latency.wholes import Loader


# what a profile calls the package that reaches CUDA -> what the backend does
CUDA_PACKAGES = {"auto": None, "cuda-bindings": "cuda.bindings", "pycuda": "pycuda"}
BUILDER_OPTIONS = ("workspace_mb",)


def is_tensorrt(name: str) -> bool:
    """Whether the runtime ``name`` of a profile is TensorRT or TensorRT-RTX."""
    return name.startswith("tensorrt")


def module(name: str) -> str:
    """The Python module of the TensorRT that a profile calls ``name``."""
    return name.replace("-", "_")


def loader(profile: Profile) -> Loader:
    """What brings an exported file into the profile's runtime; for TensorRT it builds an engine first.

    Raises:
        MissingError: when called, if the runtime or its device is not here.
    """
    from ..latency.wholes import is_part, onnxruntime_loader, openvino_loader

    runtime, device, threads = profile.runtime, on(profile), profile.budget.threads
    if not is_tensorrt(runtime.name):
        make = openvino_loader if runtime.name == "openvino" else onnxruntime_loader
        return make(threads, load_options(profile), partial(device.load, runtime.name))

    def load(path: Path, sizes: Mapping[str, int]) -> Backend:
        plan = path.with_name(f"{path.stem}-{'-'.join(map(str, sizes.values()))}.plan")
        device.build(path, plan, fixed_options(path, sizes, profile))
        options = {**load_options(profile), "copies": not is_part(sizes)}
        return device.load("tensorrt", plan, threads=threads, options=options)

    return load


def load_options(profile: Profile, precision: str | None = None) -> dict[str, Any]:
    """Options of ``Backend.load`` for the profile's runtime, in the profile's precision by default."""
    from ..backends import _ort_plugins

    runtime = profile.runtime
    precision = precision or runtime.precision
    if is_tensorrt(runtime.name):
        return {"cuda": CUDA_PACKAGES[runtime.cuda]}
    options: dict[str, Any] = dict(runtime.options)
    if runtime.name == "openvino":
        return {"precision": precision, **options}
    ours = {name: options.pop(name) for name in ("cpu_nodes",) if name in options}
    if profile.tells_precision:
        options = _ort_plugins.precision_options(precision, str(options.get("device_type", "CPU"))) | options
    return {"provider": runtime.provider, "provider_options": options, **ours}


def on(profile: Profile) -> Device:
    """The machine that the engine is for: this one, or the board that the profile names."""
    return on_host(profile.device.host)


def on_host(host: str | None) -> Device:
    """The board of that name or address; this machine for None."""
    if host is None:
        return Here()
    from ..remote.board import board

    return board(host)


def device(profile: Profile) -> dict[str, Any]:
    """The fingerprint of the profile's device with its runtime on it."""
    name = "tensorrt" if is_tensorrt(profile.runtime.name) else profile.runtime.name
    provider = name if is_tensorrt(profile.runtime.name) else profile.runtime.provider
    version = on(profile).version(_distributions(profile.runtime.name)) or "none"
    return on(profile).fingerprint(f"{name} {version}", provider, profile.budget.threads)


def engine_options(profile: Profile, config: VitConfig, runtime: str, precision: str | None = None) -> EngineOptions:
    """How the engine of the shipped model is built: the shapes of the profile's input section."""
    from ..backends.tensorrt import EngineOptions, Shapes

    height, width = config.image_size
    sides = [profile.input.dynamic_height, profile.input.dynamic_width]
    least = [side.min if side else size for side, size in zip(sides, (height, width), strict=True)]
    most = [side.max if side else size for side, size in zip(sides, (height, width), strict=True)]
    shapes = [
        Shapes(
            min=(batch.min, config.channels, *least),
            opt=(batch.opt, config.channels, height, width),
            max=(batch.max, config.channels, *most),
        )
        for batch in profile.input.batch_ranges or (profile.input.batch,)
    ]
    capabilities = profile.runtime.compute_capabilities
    if not capabilities and profile.device.compute_capability and runtime == "tensorrt-rtx":
        capabilities = (profile.device.compute_capability,)
    return EngineOptions(
        profiles=tuple({"images": images} for images in shapes),
        precision=precision,
        compute_capabilities=capabilities,
        **_common_options(profile, runtime),
    )


def asks_compatibility(profile: Profile) -> bool:
    """Whether the product's engine is to serve other GPUs or versions of TensorRT too, which has a price."""
    runtime = profile.runtime
    return runtime.name == "tensorrt" and (runtime.hardware_compatibility != "none" or runtime.version_compatible)


def fixed_options(path: Path, sizes: Mapping[str, int], profile: Profile) -> EngineOptions:
    """Options for one of the files that are only timed: every axis has one size."""
    from ..backends._onnx_file import axes
    from ..backends.tensorrt import EngineOptions, Shapes

    shapes = {}
    for name, dims in axes(path).items():
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims)
        shapes[name] = Shapes(shape, shape, shape)
    return EngineOptions(profiles=(shapes,), **_common_options(profile, profile.runtime.name))


def _common_options(profile: Profile, runtime: str) -> dict[str, Any]:
    """What the engines that are only timed share with the one that is shipped: it has a say in their speed."""
    classic = runtime == "tensorrt"  # the others have no such compatibility
    folder = cache_dir()
    return {
        "module": module(runtime),
        "hardware_compatibility": profile.runtime.hardware_compatibility if classic else "none",
        "version_compatible": profile.runtime.version_compatible and classic,
        "refit": profile.runtime.refit,
        "sparse": profile.asks_2_4,
        "workspace_mb": _workspace_mb(profile),
        "timing_cache": folder / "timings" if folder else None,
        "timeout_s": profile.runtime.build_timeout_s,
    }


def _workspace_mb(profile: Profile) -> int | None:
    """What the profile lets a builder use; None: as much as there is, as for an engine beside another runtime's."""
    if not is_tensorrt(profile.runtime.name):
        return None
    options = profile.runtime.options
    for name, value in options.items():
        if name not in BUILDER_OPTIONS or not isinstance(value, int) or isinstance(value, bool):
            raise InputError(
                f"runtime.options: {profile.runtime.name} takes {', '.join(BUILDER_OPTIONS)}, a whole number, "
                f"got {name}: {value!r}"
            )
    return options.get("workspace_mb")  # type: ignore[return-value]  # an int, as was looked at


def _distributions(name: str) -> tuple[str, ...]:
    """The packages, whichever is there, that bring the runtime of a profile."""
    if is_tensorrt(name):
        return (name, f"{name}-cu13", f"{name}-cu12", name.replace("-", "_"))
    from ..backends.onnxruntime import DISTRIBUTIONS

    return ("openvino",) if name == "openvino" else DISTRIBUTIONS
