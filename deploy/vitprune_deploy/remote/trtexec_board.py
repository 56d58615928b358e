"""A board that has TensorRT's own program, trtexec, and nothing in Python: it builds, times and runs plans by itself.

Every visit is a process of its own, which loads the plan again: a table takes much longer than through the runner, and
samples during which another process ran are not told from others.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitprune.errors import InputError, MissingError

from ..backends import _onnx_file
from ..backends._trt_engine import files_of, precision_of
from ..backends._trt_sidecar import read_sidecar, sidecar_path
from ..backends.base import Backend, TensorSpec, number_format
from ..files import sha256_file, write_atomic
from ..latency.fingerprint import read_power_mode
from ..latency.machine import REFERENCES, Asked, Taken
from ..processor import FLAGS
from . import registry, trtexec
from .backend import DeviceMachine, Elsewhere
from .connection import Completed, Connection
from .device import Device

if TYPE_CHECKING:
    from ..backends.tensorrt import EngineOptions

LONGEST_S = 3600.0  # of a command that is no build
LOCK_S = 120  # that a command waits for another measurer's
# 'key value' lines, by what every Linux has
FACTS = r"""
echo "architecture $(uname -m)"
echo "cores $(nproc)"
echo "os $(uname -sr)"
echo "memory_kb $(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo)"
model=$(tr -d '\0' < /proc/device-tree/model) 2> /dev/null
echo "cpu ${model:-$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)}"
echo "flags $(sed -n 's/^\(flags\|Features\).*: //p' /proc/cpuinfo | head -n 1)"
"""
# files under their own names, in a line each
HEAT = "grep -s . /sys/class/thermal/thermal_zone*/type /sys/class/thermal/thermal_zone*/temp"


class TrtexecBoard(Device):
    """A device at the other end of a connection, asked through its shell."""

    def __init__(self, registered: registry.Device) -> None:
        self.address = str(registered.host)
        self._registered = registered
        self._numbers = count(1)

    def fingerprint(self, runtime: str, provider: str = "cpu", threads: int | None = None) -> dict[str, Any]:
        """As ``latency.fingerprint.device_fingerprint``; the GPU is known by what trtexec says of it while building."""
        name, _, version = runtime.partition(" ")
        more = {"runtime": name, "runtime_version": version, "provider": provider, "threads": threads}
        return {**self._facts, **more}

    def state(self) -> dict[str, Any]:
        """What its tools say of power and heat."""
        tools = {
            "nvpmodel": "nvpmodel -q",
            "jetson_clocks": "jetson_clocks --show",
            "tegrastats": "timeout 2 tegrastats --interval 100 | head -n 1",
        }
        found: dict[str, Any] = {name: self._run(command).stdout.strip() for name, command in tools.items()}
        lines = [line.partition(":") for line in self._run(HEAT).stdout.splitlines()]
        zones: dict[str, dict[str, str]] = {}
        for path, _, value in lines:
            zones.setdefault(posixpath.dirname(path), {})[posixpath.basename(path)] = value
        found["thermal"] = {one["type"]: int(one["temp"]) for one in zones.values() if {"type", "temp"} <= one.keys()}
        return {name: value for name, value in found.items() if value}

    def version(self, distributions: Sequence[str]) -> str | None:
        """TensorRT's, as trtexec tells it."""
        return str(self._program[1]) if "tensorrt" in distributions else None

    def has(self, module: str) -> bool:
        """Whether it can build for what that module is to others."""
        return module == "tensorrt"

    def load(
        self, backend: str, path: Path, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Backend:
        """A plan that was built there.

        Raises:
            InputError: it is of another runtime.
        """
        if backend != "tensorrt":
            raise InputError(f"{self.address} runs TensorRT engines alone, by trtexec; got one for {backend}")
        return TrtexecBackend(self, self._put(path), read_sidecar(path), bool((options or {}).get("copies", True)))

    def build(self, onnx: Path, plan: Path, options: EngineOptions) -> dict[str, Any]:
        """Build a plan there, and bring it back with a sidecar.

        Raises:
            InputError: an option that trtexec is not asked for here.
            VitpruneError: as ``trtexec.explain``.
        """
        if options.refit or options.version_compatible or options.hardware_compatibility != "none":
            raise InputError(
                f"{self.address}: trtexec builds here for the very GPU alone; leave runtime.refit, version_compatible "
                "and hardware_compatibility out"
            )
        program, version = self._program
        free = any(isinstance(size, str) for shape in _onnx_file.axes(onnx).values() for size in shape)
        there, made = self._put(onnx), f"{self._folder}/{next(self._numbers)}.plan"
        timings = f"{self._folder}/timings" if options.timing_cache else None
        arguments = trtexec.build_arguments(
            program, version, there, made, options.profiles if free else (),
            workspace_mb=options.workspace_mb, timing_cache=timings, sparse=options.sparse,
        )  # fmt: skip
        log = self.call(arguments, onnx, timeout_s=options.timeout_s)
        self._connection.fetch(made, plan)
        self._run(f"rm -f {shlex.quote(made)}")
        with plan.open("rb") as file:
            head = file.read(28)
        inputs, outputs = _specs(onnx)
        found = trtexec.sidecar(
            log, head, inputs, outputs, options.profiles, precision_of(onnx, options), options.sparse
        )
        found |= files_of(plan, onnx)
        write_atomic(sidecar_path(plan), json.dumps(found, indent=1) + "\n")
        return found

    def memory_mb(self, backend: str, model: Path, inputs: np.ndarray, **load: Any) -> None:
        """It is not measured there."""

    @contextlib.contextmanager
    def answering(
        self, backend: str, model: Path, batches: np.ndarray, load: Mapping[str, Any]
    ) -> Iterator[Callable[[], np.ndarray]]:
        """Processes that run ``batches``, one each, as all runs there are."""
        with self.load(backend, model, **load) as engine:
            dtype = number_format(engine.inputs[0].dtype)
            yield lambda: np.stack([engine.run(batch.astype(dtype)) for batch in batches])

    def call(self, arguments: Sequence[str], subject: Path | str, timeout_s: float = LONGEST_S) -> str:
        """What trtexec says, once nobody else uses it there.

        Raises:
            VitpruneError: it failed; see ``trtexec.explain``.
        """
        lock = shlex.quote(f"{self._folder}/lock")
        done = self._run(f"flock -w {LOCK_S} {lock} {shlex.join(arguments)}", timeout_s)
        log = done.stdout + done.stderr
        if done.code == 1 and not log:
            raise MissingError(f"somebody else is measuring on {self.address}; wait until they are done")
        if done.code:
            raise trtexec.explain(log, done.code, f"{self.address}: {Path(subject).name}")
        return log

    def times_ms(self, plan: str, shapes: Mapping[str, Sequence[int]], runs: int, copies: bool) -> list[float]:
        """Milliseconds of ``runs`` runs of a plan on random inputs."""
        program, version = self._program
        file = f"{self._folder}/times-{next(self._numbers)}.json"
        self.call(trtexec.timing_arguments(program, version, plan, shapes, file, runs=runs, copies=copies), plan)
        times = trtexec.read_times(self._take_text(file))
        return (times.latency_ms if copies else times.compute_ms)[-runs:]

    def outputs(self, plan: str, name: str, images: np.ndarray) -> dict[str, np.ndarray]:
        """What a plan gives for ``images``."""
        program, version = self._program
        number = next(self._numbers)
        given, answers = f"{self._folder}/in-{number}.bin", f"{self._folder}/out-{number}.json"
        with tempfile.TemporaryDirectory(prefix="vitprune-") as folder:
            local = Path(folder) / "in.bin"
            local.write_bytes(np.ascontiguousarray(images).tobytes())
            self._connection.send(local, given)
        try:
            self.call(trtexec.run_arguments(program, version, plan, {name: (images.shape, given)}, answers), plan)
        finally:
            self._run(f"rm -f {shlex.quote(given)}")
        return trtexec.read_outputs(self._take_text(answers))

    def close(self) -> None:
        """End the connection."""
        if "_connection" in self.__dict__:
            self._connection.close()
            del self.__dict__["_connection"]

    @cached_property
    def _connection(self) -> Connection:
        return Connection.open(self._registered.host)

    @cached_property
    def _folder(self) -> str:
        folder = posixpath.join(self._connection.home(), self._registered.folder)
        self._run(f"mkdir -p {shlex.quote(folder)}")
        return folder

    @cached_property
    def _program(self) -> tuple[str, trtexec.Version]:
        """Where trtexec is, and its version."""
        said = ""
        for place in trtexec.PLACES:
            done = self._run(shlex.join(trtexec.help_arguments(place)))
            said = done.stdout + done.stderr
            if "&&&&" in said:
                return place, trtexec.read_version(said)
        trtexec.read_version(said)  # says why there is none
        raise AssertionError

    @cached_property
    def _facts(self) -> dict[str, Any]:
        said = dict(line.split(" ", 1) for line in self._run(FACTS).stdout.splitlines() if " " in line)
        known = set(said.get("flags", "").split())
        return {
            "cpu": said.get("cpu", "").strip(),
            "architecture": said["architecture"],
            "cores": int(said["cores"]),
            "flags": sorted(known & set(FLAGS)),
            "memory_mb": int(said.get("memory_kb") or 0) * 1024 // 10**6,
            "os": said["os"],
            "gpus": [],
            "power_mode": read_power_mode(self._run("nvpmodel -q").stdout)[0],
        }

    def _put(self, path: Path) -> str:
        """Have a file there, under its sum; what is there already is not sent."""
        there = f"{self._folder}/{sha256_file(path)}{path.suffix}"
        if self._run(f"test -e {shlex.quote(there)}").code:
            self._connection.send(path, there)
        return there

    def _take_text(self, file: str) -> str:
        quoted = shlex.quote(file)
        return self._run(f"cat {quoted} && rm -f {quoted}").stdout

    def _run(self, command: str, timeout_s: float = LONGEST_S) -> Completed:
        return self._connection.run(command, timeout_s=timeout_s)


class TrtexecBackend(Elsewhere):
    """A plan on such a board. Nothing stays loaded."""

    def __init__(self, board: TrtexecBoard, plan: str, sidecar: Mapping[str, Any], copies: bool) -> None:
        self._board, self._plan, self._copies = board, plan, copies
        self.runtime, self.provider = f"tensorrt {sidecar['version']}", "tensorrt"
        self.inputs, self.outputs = (
            tuple(TensorSpec(one["name"], tuple(one["shape"]), one["dtype"]) for one in sidecar[which])
            for which in ("inputs", "outputs")
        )
        self.machine = TrtexecMachine(board)

    def run(self, images: np.ndarray) -> np.ndarray:
        """The first output, as trtexec writes it: with six digits."""
        self.refuse_misfit({self.inputs[0].name: images})
        return self._board.outputs(self._plan, self.inputs[0].name, images)[self.outputs[0].name]

    def bind(self, feed: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """One run on random inputs of these shapes."""
        self.refuse_misfit(feed)
        shapes = {name: array.shape for name, array in feed.items()}
        return TrtexecRun(lambda runs: self._board.times_ms(self._plan, shapes, runs, self._copies))

    def close(self) -> None:
        """There is nothing to free."""


class TrtexecRun:
    """Runs of a plan at one shape, some at a time."""

    def __init__(self, times_ms: Callable[[int], list[float]]) -> None:
        self.times_ms = times_ms

    def __call__(self) -> float:
        """Milliseconds of one."""
        return self.times_ms(1)[0]


class TrtexecMachine(DeviceMachine):
    """Such a board as the protocol sees it: a visit is two processes."""

    def take(self, subject: Any, reference: Any, asked: Asked) -> Taken:
        """One visit; trtexec warms up by itself, and cannot tell whether another process ran."""
        runs = subject.run.times_ms(asked.samples * asked.repeats) if asked.samples else []
        means = np.reshape(runs, (-1, asked.repeats)).mean(axis=1).tolist()
        return Taken(means, 0, reference.run.times_ms(REFERENCES), 0)


def _specs(onnx: Path) -> list[list[TensorSpec]]:
    """Inputs and outputs of an ONNX file."""
    from ..backends.onnxruntime import OnnxRuntime

    with OnnxRuntime.load(onnx) as model:
        return [list(model.inputs), list(model.outputs)]
