"""What a builder is asked for beside the network: GPUs, compatibility, profiles, timings of earlier builds.

What a version of TensorRT lacks is found by looking for the name; what TensorRT-RTX has the name of and cannot do
stands here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ._trt_common import TYPES, Refused
from ._trt_sparse import allow as allow_sparse

RTX = "tensorrt_rtx"
RTX_DEFAULT = ["8.6+"]  # what its documentation promises where nothing is asked for
LEVELS = {"ampere_plus": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}
SERVED = {"ampere_plus": ["8.0+"]}  # GPUs beyond the one at hand
FLAGS = {"version_compatible": "VERSION_COMPATIBLE", "refit": "REFIT"}


def targets(trt: Any) -> dict[str, Any]:
    """Compute capabilities that engines can be built for without their GPU: {'8.6': SM86, ...}."""
    members = getattr(trt, "ComputeCapability", None)
    names = {} if members is None else members.__members__
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in names.items() if name.startswith("SM")}


def set_targets(
    trt: Any, config: Any, request: Mapping[str, Any], gpu: Mapping[str, Any] | None, why: str
) -> list[str]:
    """Ask for the compute capabilities; those that the plan will be good for. ``why`` there is no ``gpu``."""
    wanted = request["compute_capabilities"]
    if request["module"] != RTX:  # TensorRT 11 has the same calls, and takes the current GPU alone
        return SERVED.get(request["hardware_compatibility"]) or _current(wanted, gpu, why)
    known = targets(trt)
    for one in wanted:
        if one not in known:
            raise Refused(
                "input",
                f"{trt.__version__} builds no engines for compute capability {one}, only for {', '.join(known)}; "
                "use the runtime tensorrt and build on the device itself",
            )
    if not wanted:
        return RTX_DEFAULT
    config.num_compute_capabilities = len(wanted)
    for place, one in enumerate(wanted):
        if not config.set_compute_capability(known[one], place):  # it would build for another GPU without a word
            raise Refused("input", f"{trt.__version__} does not take compute capability {one}")
    return wanted


def _current(wanted: list[str], gpu: Mapping[str, Any] | None, why: str) -> list[str]:
    """Classic TensorRT builds for the GPU that it runs on, and for no other."""
    if gpu is None:
        raise Refused("missing", f"builds on the device itself, and {why}")
    current = gpu["compute_capability"]
    if wanted and wanted != [current]:
        raise Refused(
            "input",
            f"builds for the GPU that it runs on, which has compute capability {current}, not for "
            f"{', '.join(wanted)}; build on that device",
        )
    return [current]


def set_flags(trt: Any, config: Any, request: Mapping[str, Any], gpu: Mapping[str, Any] | None) -> list[str]:
    """Ask for compatibility, refitting and sparse kernels; the names of the flags that are set."""
    level, found = request["hardware_compatibility"], []
    if level != "none":
        members = {} if request["module"] == RTX else trt.HardwareCompatibilityLevel.__members__
        if LEVELS[level] not in members:
            raise Refused("input", _lacks(trt, request["module"], "hardware_compatibility", LEVELS[level]))
        config.hardware_compatibility_level = members[LEVELS[level]]
    for key, name in FLAGS.items():
        if not request[key]:
            continue
        if name not in trt.BuilderFlag.__members__ or (request["module"] == RTX and key == "version_compatible"):
            raise Refused("input", _lacks(trt, request["module"], key, name))
        if request["module"] == RTX and gpu is None:
            raise Refused("missing", "builds engines that can be refitted only where there is an NVIDIA driver")
        config.set_flag(trt.BuilderFlag.__members__[name])
        found.append(name)
    if request["sparse"]:
        found.append(allow_sparse(trt, config))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the inspector says names, and no types
    return found


def _lacks(trt: Any, module: str, key: str, name: str) -> str:
    """Why an option cannot be had."""
    if module != RTX:
        return f"{trt.__version__} has no {name}; leave runtime.{key} out, or use a newer TensorRT"
    if key == "version_compatible":
        return f"{trt.__version__} has no version compatibility: build the engine again for each version"
    return (
        f"{trt.__version__} has no levels of hardware compatibility: its engines serve the GPUs of "
        "runtime.compute_capabilities"
    )


def add_profile(builder: Any, config: Any, network: Any, shapes: Mapping[str, Any]) -> None:
    """One optimisation profile; the caller has checked that min <= opt <= max."""
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    if shapes.keys() != inputs.keys():
        raise Refused("input", f"needs a profile for {', '.join(sorted(inputs))}, got {', '.join(sorted(shapes))}")
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in shapes.items():
        fixed = tensor_facts(inputs[name])["shape"]
        fits = len(least) == len(fixed) and all(
            isinstance(size, str) or size == low == high for size, low, high in zip(fixed, least, most)
        )
        if not fits:
            raise Refused("input", f"needs a profile for {name} within {fixed}, got {least} to {most}")
        profile.set_shape(name, least, best, most)
    if config.add_optimization_profile(profile) < 0:
        raise Refused("input", f"does not take the profile {json.dumps(shapes)}")


def tensor_facts(tensor: Any) -> dict[str, Any]:
    """Name, type and shape of an input or output; a free size is a name."""
    shape: list[int | str] = []
    for axis, size in enumerate(tensor.shape):
        name = tensor.get_dimension_name(axis) or ("batch" if axis == 0 else f"axis_{axis}")
        shape.append(size if size >= 0 else name)
    return {"name": tensor.name, "dtype": TYPES.get(tensor.dtype.name, tensor.dtype.name.lower()), "shape": shape}


class Timings:
    """Timings of earlier builds with this version for this GPU, in a file that builds share.

    Args:
        folder: where such files are; None: the build starts from nothing, and nothing is kept.
    """

    def __init__(self, trt: Any, config: Any, folder: str | None, gpu: Mapping[str, Any] | None) -> None:
        self._config = config
        self.file: Path | None = None
        if folder is None or not hasattr(config, "create_timing_cache"):
            return
        self.file = Path(folder) / f"{trt.__name__}-{trt.__version__}-{_gpu_key(gpu)}.timings"
        if not config.set_timing_cache(config.create_timing_cache(self._stored()), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)  # it is damaged: start anew

    def keep(self) -> dict[str, str] | None:
        """Write down what was timed, beside what others have timed meanwhile; name and SHA-256 of the file.

        None where nothing can be kept, as in a home that is read-only: the engine is there all the same.
        """
        if self.file is None:
            return None
        with contextlib.suppress(OSError), _alone(self.file):
            mine = self._config.get_timing_cache()
            mine.combine(self._config.create_timing_cache(self._stored()), False)
            data = bytes(mine.serialize())
            temporary = self.file.with_suffix(".new")
            temporary.write_bytes(data)
            temporary.replace(self.file)
            return {"file": self.file.name, "sha256": hashlib.sha256(data).hexdigest()}
        return None

    def _stored(self) -> bytes:
        """What the file holds; nothing where it cannot be read."""
        try:
            return self.file.read_bytes() if self.file else b""
        except OSError:
            return b""


def _gpu_key(gpu: Mapping[str, Any] | None) -> str:
    """The GPU in a file's name: timings of another one mislead."""
    if gpu is None:
        return "none"
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu["name"]).strip("-")
    return f"{name}-sm{gpu['compute_capability'].replace('.', '')}-{gpu['multiprocessors']}"


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """While other processes wait to write ``file``."""
    import fcntl  # POSIX only, as building is

    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
