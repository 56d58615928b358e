"""All that can be refused before a build begins, found at once, and an estimate of how long the build takes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vitprune.errors import InputError, MissingError, VitpruneError

from ..backends import onnxruntime as ort_backend
from ..backends.tensorrt import capabilities
from ..console import Console
from ..data import open_split
from ..profile import Profile, load_fleet
from .answer import Answer, table
from .building import OUT
from .doctor import EXTRAS, is_installed, try_loading, try_openvino, try_provider
from .estimate import duration, estimate

if TYPE_CHECKING:
    from ..build import Bench

T = TypeVar("T")
SPARE_BYTES = 200_000_000  # besides copies of the model: rankings, engines, the report
COPIES = 10  # of the weights: dense, pruned, both as ONNX, candidates, engines


class Problems:
    """Errors so far, none twice; what does not depend on them goes on."""

    def __init__(self) -> None:
        self.errors: list[VitpruneError] = []

    def during(self, work: Callable[[], T]) -> T | None:
        """What ``work`` returns; None if it found a problem."""
        try:
            return work()
        except VitpruneError as error:
            if str(error) not in map(str, self.errors):
                self.errors.append(error)
            return None


def check(console: Console, name: str, overrides: Sequence[str], out: Path | None) -> Answer:
    """What stands in the way of a build, and if nothing does, what it will take; code 2 or 3 for problems.

    Of a profile for several devices, all are looked at, and code 2 goes before 3.

    Raises:
        InputError: the profile itself is wrong; one line for each problem.
    """
    profiles = load_fleet(name, overrides, files_exist=True)
    first = next(iter(profiles.values()))
    out = out or OUT / first.name
    if list(profiles) == [first.name]:
        return _check_one(console, first, out)
    found = {device: _check_one(console, profile, out / device) for device, profile in profiles.items()}
    text = "\n\n".join(f"device {device}:\n{answer.text}" for device, answer in found.items())
    codes = {answer.code for answer in found.values()}
    data = {"folder": str(out), "devices": {device: answer.data for device, answer in found.items()}}
    return Answer(text, data, 2 if 2 in codes else max(codes))


def _check_one(console: Console, profile: Profile, out: Path) -> Answer:
    """The same for one device."""
    problems, facts = Problems(), {}
    able = problems.during(_check_packages)
    engines = _tensorrt_modules(profile)
    if profile.device.host is None:
        problems.during(lambda: _check_runtime(profile, engines))
        problems.during(lambda: _check_engines(profile, engines))
    else:
        problems.during(lambda: _check_board(profile))
    problems.during(lambda: _check_folder(out))
    with tempfile.TemporaryDirectory() as scratch:
        bench = problems.during(lambda: _open_model(profile, console, Path(scratch))) if able else None
        if bench is None:
            problems.during(lambda: open_split(profile.data, seed=profile.seed))
        else:
            problems.during(lambda: bench.images)
            problems.during(bench.token_methods)
            problems.during(lambda: bench.base_config)
            problems.during(lambda: _check_table(bench))
            problems.during(lambda: _check_disk(bench, out))
        if bench is not None and not problems.errors:
            facts = _facts(bench)
    return _answer(profile, out, problems.errors, facts)


def _check_packages() -> bool:
    missing = [module for module in EXTRAS["prune"] if not is_installed(module)]
    if missing:
        raise MissingError(f"{', '.join(missing)} cannot be imported; run `pip install 'vitprune[prune,cpu]'`")
    return True


def _tensorrt_modules(profile: Profile) -> dict[str, dict[str, Any]]:
    """What the TensorRT modules can do here; nothing where the profile asks for none of them."""
    names = [profile.runtime.name, *(engine.name for engine in profile.runtime.also_build)]
    here = profile.device.host is None
    return capabilities() if here and any(name.startswith("tensorrt") for name in names) else {}


def _check_board(profile: Profile) -> None:
    """Raises MissingError if the board is not reached, or the profile's runtime does not run there."""
    from ..build import runtimes

    device, name = runtimes.on(profile), profile.runtime.name
    if not device.has(runtimes.module(name)):
        raise MissingError(f"{profile.device.host}: its Python has no {runtimes.module(name)}; install it there")
    if not name.startswith("tensorrt"):
        load = partial(device.load, name, options=runtimes.load_options(profile))
        if why := try_loading(f"{name} on {profile.device.host}", load):
            raise MissingError(why)


def _check_runtime(profile: Profile, engines: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises MissingError if the runtime that latency is measured in does not run here."""
    name = profile.runtime.name
    if name.startswith("tensorrt"):
        found = engines[name.replace("-", "_")]
        if not (found["builds"] and found["runs"]):
            raise MissingError(f"{name} does not run here, and latency is measured with it: {found['why']}")
        return
    if name == "openvino":
        why = try_openvino(profile.runtime.precision)
    else:
        why = try_provider(ort_backend.find_provider(profile.runtime.provider))
    if why:
        raise MissingError(why)


def _check_engines(profile: Profile, engines: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises InputError if TensorRT-RTX would have to build for a GPU that the installed one does not serve.

    And MissingError if its engine is to be refitted, and there is no driver to build such a one with.
    """
    names = {profile.runtime.name, *(engine.name for engine in profile.runtime.also_build)}
    wanted = profile.runtime.compute_capabilities or (profile.device.compute_capability,)
    served = engines.get("tensorrt_rtx", {}).get("compute_capabilities", [])
    strange = sorted({one for one in wanted if one is not None} - set(served))
    if "tensorrt-rtx" in names and served and strange:
        raise InputError(
            f"runtime: the installed TensorRT-RTX builds for compute capabilities {', '.join(served)}, "
            f"not for {', '.join(strange)}; use tensorrt, or set runtime.compute_capabilities"
        )
    if "tensorrt-rtx" in names and served and profile.runtime.refit and not engines["tensorrt_rtx"]["gpu"]:
        raise MissingError(
            f"runtime.refit: TensorRT-RTX builds engines that can be refitted only where there is an NVIDIA driver: "
            f"{engines['tensorrt_rtx']['why']}"
        )


def _check_folder(out: Path) -> None:
    """Raises InputError if the output folder cannot be made or written to."""
    there = _nearest(out)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be written to; choose another with --out")


def _check_table(bench: Bench) -> None:
    """Raises InputError if the recorded latency table that the profile names is damaged, or belongs elsewhere."""
    from ..build import runtimes
    from ..build.choose import table_request
    from ..latency.table import accept, read_table

    given = bench.profile.measure.table
    if given:
        accept(read_table(Path(given)), bench.base_config, table_request(bench), runtimes.device(bench.profile))


def _check_disk(bench: Bench, out: Path) -> None:
    """Raises MissingError if the disk has no room for the copies of the model that a build makes."""
    needed = SPARE_BYTES + COPIES * sum(weight.numel() * weight.element_size() for weight in bench.dense.parameters())
    free = shutil.disk_usage(_nearest(out)).free
    if free < needed:
        raise MissingError(
            f"the disk of {out} has {free / 1e9:.1f} GB left, and the build needs about {needed / 1e9:.1f} GB; "
            "free some, or choose another --out"
        )


def _nearest(path: Path) -> Path:
    """``path``, or the first folder above it that is there."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def _open_model(profile: Profile, console: Console, scratch: Path) -> Bench:
    """The model converted as the first stage of a build does it, in a folder of its own."""
    from ..build import Bench
    from ..build.prepare import prepare_model

    bench = Bench(profile, console, scratch)
    prepare_model(bench, scratch)
    bench.folders["model"] = scratch
    return bench


def _facts(bench: Bench) -> dict[str, Any]:
    """What a build will work on, and about how many seconds its stages take."""
    from vitprune.macs import macs, params

    from ..build import runtimes, sparse

    config, device = bench.dense.config, runtimes.on(bench.profile)
    return {
        "model": bench.profile.model.name,
        "params": params(config),
        "macs": macs(config),
        "image_size": list(config.image_size),
        "images": {name: len(part) for name, part in bench.images._asdict().items()},
        "labelled": bench.images.test.labels is not None,
        "token_methods": [method.name for method in bench.token_methods()],
        "weights": sparse.worth(bench.profile),
        "left_out": [e.name for e in bench.profile.runtime.also_build if not device.has(runtimes.module(e.name))],
        "estimated_seconds": estimate(bench),
    }


def _answer(profile: Profile, out: Path, errors: Sequence[VitpruneError], facts: dict[str, Any]) -> Answer:
    data = {"profile": profile.name, "folder": str(out), "problems": [str(error) for error in errors], **facts}
    if errors:
        code = 2 if any(isinstance(error, InputError) for error in errors) else 3
        lines = [f"- {line}" for problem in data["problems"] for line in problem.splitlines()]
        return Answer("\n".join([f"this stands in the way of building {profile.name}:", *lines]), data, code)
    images = ", ".join(f"{count} for {name}" for name, count in facts["images"].items())
    rows = [
        ["model", facts["model"]],
        ["size", f"{facts['params'] / 1e6:.2f} million parameters, {facts['macs'] / 1e6:.0f} million MACs an image"],
        ["images", f"{images}{'' if facts['labelled'] else ', without classes'}"],
        ["token methods", ", ".join(facts["token_methods"]) or "none"],
        ["output", str(out)],
    ]
    rows += [["weights", facts["weights"]]] if facts["weights"] else []
    rows += [["left out", f"the engine for {name}, which is not installed"] for name in facts["left_out"]]
    seconds = facts["estimated_seconds"]
    times = [[stage, duration(value)] for stage, value in seconds.items()]
    times.append(["all", duration(sum(seconds.values()))])
    title = "nothing stands in the way; an estimate of the time, which may be off by a factor of two:"
    return Answer("\n\n".join([table(rows), title, table(times, right=[1])]), data)
