"""What runs on a board: it answers requests, a line of JSON in, a line of JSON out.

It needs Python 3.8, numpy, and the runtime that is measured; no other package. It travels as one file (``bundle``) with
the backends and the measuring that the workstation has itself, so a board is measured by the very same code.

A request says what to ``do``. Files have been put into the folder before, and are called by their SHA-256; what stays
loaded is called by numbers that the workstation gives out, so that it can ask for the same again after a broken
connection. The last line is {"result": ...} or {"error": [kind, sentence]}.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import select
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from vitprune import parts
from vitprune.errors import DamagedFile, InputError, MissingError, NotSupported, VitpruneError

from ..backends import _apart
from ..backends.base import Backend, TensorSpec
from ..files import sha256_file
from ..latency.fingerprint import device_fingerprint
from ..latency.machine import Asked, Machine
from ..latency.visits import Subject
from ._tools import raw_state

KINDS = {"missing": MissingError, "damaged": DamagedFile, "unsupported": NotSupported, "input": InputError}
IDLE_S = 600.0  # after which a runner that holds the board for nobody ends
POLL_S = 5.0
LET_GO = 75  # the code it ends with then: nothing failed, and it may be started again


class Runner:
    """The models that are loaded here, and the folder that files are put into."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, Lock(folder / "lock")
        self._models: dict[int, Backend] = {}
        self._subjects: dict[int, Subject] = {}
        self._machine = Machine()
        for name in ("files", "views", "built"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def answer(self, request: Mapping[str, Any]) -> Any:
        """What the request comes to, as plain data."""
        given = {name: value for name, value in request.items() if name != "do"}
        return getattr(self, f"do_{request['do']}")(**given)

    @property
    def holds(self) -> bool:
        """Whether the board is kept from others."""
        return self._lock.held

    def do_hello(self, distributions: list[str], modules: list[str]) -> dict[str, Any]:
        """What the board is and has."""
        found = {}
        for name in distributions:
            with contextlib.suppress(PackageNotFoundError):
                found[name] = version(name)
        return {
            "device": device_fingerprint("none"),
            "python": ".".join(map(str, sys.version_info[:3])),
            "versions": found,
            "modules": [name for name in modules if find_spec(name) is not None],
            "gates": self._machine.gates,
            "memory": _apart.STATUS.exists(),
        }

    def do_missing(self, sums: list[str]) -> list[str]:
        """Those of the files that are not here yet; the others are marked as used."""
        lacking = []
        for name in sums:
            file = self._folder / "files" / name
            if file.is_file():
                os.utime(file)
            else:
                lacking.append(name)
        return lacking

    def do_keep(self, sums: list[str]) -> None:
        """Take files that have arrived under a temporary name, if they are whole."""
        for name in sums:
            arrived = self._folder / "files" / f"{name}.part"
            if sha256_file(arrived) != name:
                arrived.unlink()
                raise DamagedFile(f"{arrived} did not arrive whole; run the same command again")
            arrived.replace(self._folder / "files" / name)

    def do_make_room(self, wanted_mb: float, spare_mb: float, most_mb: float) -> float:
        """Remove the files that were used longest ago until ``wanted_mb`` more, of 10^6 bytes, are within ``most_mb``.

        And until the disk has that much room and ``spare_mb``; what it has then, in MB.
        """
        shutil.rmtree(self._folder / "views", ignore_errors=True)  # further names of the files, which hold their room
        (self._folder / "views").mkdir()
        files = sorted((self._folder / "files").iterdir(), key=lambda file: file.stat().st_mtime)
        kept_mb = sum(file.stat().st_size for file in files) / 1e6
        for file in files:
            if kept_mb + wanted_mb <= most_mb and self._free_mb() >= wanted_mb + spare_mb:
                break
            kept_mb -= file.stat().st_size / 1e6
            file.unlink()
        return self._free_mb()

    def _free_mb(self) -> float:
        return shutil.disk_usage(self._folder).free / 1e6

    def do_load(self, key: int, backend: str, model: str, files: Mapping[str, str], load: Mapping[str, Any]) -> Any:
        """Load a model under the number ``key``; ``files`` are its name and those of what lies beside it."""
        self._lock.take()
        kind = parts.load("vitprune_deploy.backends", backend, Backend)  # type: ignore[type-abstract]
        loaded = kind.load(self._view(model, files), **load)
        self._models[key] = loaded
        return {
            "runtime": loaded.runtime,
            "provider": loaded.provider,
            "inputs": [list(spec) for spec in loaded.inputs],
            "outputs": [list(spec) for spec in loaded.outputs],
        }

    def do_bind(self, key: int, name: str, model: int, feed: Mapping[str, str]) -> None:
        """Make a subject of a loaded model, which runs on the arrays of ``feed``."""
        arrays = {tensor: self._array(which) for tensor, which in feed.items()}
        self._subjects[key] = Subject.of(name, self._models[model], arrays)

    def do_run(self, model: int, images: str) -> dict[str, Any]:
        """The first output for the images."""
        return packed(self._models[model].run(self._array(images)))

    def do_once(self, subject: int) -> float:
        """Milliseconds of one run."""
        return self._subjects[subject].run()

    def do_take(self, subject: int | None, reference: int, asked: list[Any]) -> list[Any]:
        """One visit; see ``latency.machine``."""
        wanted = None if subject is None else self._subjects[subject]
        return list(self._machine.take(wanted, self._subjects[reference], Asked(*asked)))

    def do_quiet(self, limit_s: float) -> float:
        """Wait until nothing else runs."""
        return self._machine.wait_for_quiet(limit_s)

    def do_drop(self, models: list[int], subjects: list[int]) -> None:
        """Let go of what was loaded; when nothing is left, others may have the board."""
        for key in subjects:
            self._subjects.pop(key, None)
        for key in models:
            if key in self._models:
                self._models.pop(key).close()
        if not self._models:
            self._lock.release()

    def do_build(self, module: str, files: Mapping[str, str], model: str, options: dict[str, Any]) -> dict[str, Any]:
        """Build a TensorRT plan; where it lies, what its sidecar says, and its sum."""
        from ..backends.tensorrt import EngineOptions, Shapes, build_engine

        with self._lock.for_a_while():
            profiles = [
                {name: Shapes(*map(tuple, shapes)) for name, shapes in one.items()} for one in options["profiles"]
            ]
            timings = self._folder / "timings" if options["timing_cache"] else None
            wanted = {**options, "profiles": tuple(profiles), "timing_cache": timings, "module": module,
                      "compute_capabilities": tuple(options["compute_capabilities"])}  # fmt: skip
            plan = self._folder / "built" / "engine.plan"
            sidecar = build_engine(self._view(model, files), plan, EngineOptions(**wanted))
            plan.replace(self._folder / "files" / sidecar["sha256"])
        return sidecar

    def do_layers(self, model: int) -> Any:
        """What TensorRT's inspector says of a loaded engine."""
        engine: Any = self._models[model]
        return engine.layers()

    def do_memory(
        self, backend: str, model: str, files: Mapping[str, str], load: Mapping[str, Any], shape: list[int], dtype: str
    ) -> float | None:
        """What ``_apart.memory_mb`` finds."""
        with self._lock.for_a_while():
            return _apart.memory_mb(backend, self._view(model, files), shape, dtype, load)

    def do_apart(
        self, backend: str, model: str, files: Mapping[str, str], load: Mapping[str, Any], batches: str
    ) -> dict[str, Any]:
        """What a second process answers to batches [n, B, C, H, W]."""
        with _apart.answering(backend, self._view(model, files), self._array(batches), load) as wait:
            try:
                return packed(wait())
            except RuntimeError as error:
                return {"refused": str(error)}

    def do_state(self) -> dict[str, Any]:
        """What the board is doing now."""
        return raw_state()

    def close(self) -> None:
        """Free everything."""
        self.do_drop(list(self._models), list(self._subjects))

    def _view(self, model: str, files: Mapping[str, str]) -> Path:
        """The model under its own name, with what belongs to it beside it."""
        folder = self._folder / "views" / hashlib.sha256("".join(sorted(files.values())).encode()).hexdigest()
        folder.mkdir(exist_ok=True)
        for name, which in files.items():
            with contextlib.suppress(FileExistsError):
                os.link(self._folder / "files" / which, folder / Path(name).name)
        return folder / model

    def _array(self, which: str) -> np.ndarray:
        return np.asarray(np.load(self._folder / "files" / which))


class Lock:
    """Keeps two measurers of one board apart. It is the kernel's, so it ends with the process that holds it."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, -1

    @property
    def held(self) -> bool:
        """Whether this process has it."""
        return self._file >= 0

    def take(self) -> None:
        """Have it, or keep it.

        Raises:
            MissingError: another process has it; the sentence says since when.
        """
        if self.held:
            return
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            other = os.read(file, 200).decode(errors="replace")
            os.close(file)
            raise MissingError(
                f"somebody else is measuring on this board ({other or 'just begun'}); wait until they are done. "
                f"One whose connection is lost lets go within {IDLE_S / 60:.0f} minutes"
            ) from error
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
        self._file = file

    def release(self) -> None:
        """Let others have it."""
        if self.held:
            os.close(self._file)
            self._file = -1

    @contextlib.contextmanager
    def for_a_while(self) -> Any:
        """Have it in the block, and as before behind it."""
        before = self.held
        self.take()
        try:
            yield
        finally:
            if not before:
                self.release()


def packed(array: np.ndarray) -> dict[str, Any]:
    """An array as plain data."""
    text = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": text}


def unpacked(plain: Mapping[str, Any]) -> np.ndarray:
    """The array that was ``packed``."""
    numbers = np.frombuffer(base64.b64decode(plain["data"]), plain["dtype"])
    return numbers.reshape(plain["shape"]).copy()


def spec_of(plain: Any) -> TensorSpec:
    """An input or output, as ``do_load`` lists it."""
    name, shape, dtype = plain
    return TensorSpec(name, tuple(shape), dtype)


def kind_of(error: BaseException) -> str:
    """What an error is called in an answer."""
    return next((kind for kind, known in KINDS.items() if isinstance(error, known)), "bug")


def main() -> None:
    """Answer requests until there are no more."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what runtimes print goes where it does no harm
    runner = Runner(Path(sys.argv[1]).expanduser())
    try:
        while True:
            line = _next_line(sys.stdin.buffer.raw, runner)  # type: ignore[union-attr]
            if not line:
                return
            channel.write(json.dumps(_answered(runner, line)) + "\n")
            channel.flush()
    finally:
        runner.close()


def _answered(runner: Runner, line: bytes) -> dict[str, Any]:
    """The answer, whatever happens."""
    try:
        return {"result": runner.answer(json.loads(line))}
    except VitpruneError as error:
        return {"error": [kind_of(error), str(error)]}
    except MemoryError:
        return {"error": ["missing", "the board has too little memory left for this model"]}
    except OSError as error:
        return {"error": ["missing", f"the board could not use {error.filename}: {error.strerror}"]}
    except Exception:  # the workstation shows it as its own bug
        return {"error": ["bug", traceback.format_exc()]}


def _next_line(stream: IO[bytes], runner: Runner) -> bytes:
    """The next request; empty when the workstation is gone.

    Raises:
        SystemExit: it has left the board locked without a word.
    """
    line, idle_s = b"", 0.0
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], POLL_S)
        idle_s = 0.0 if ready else idle_s + POLL_S
        if idle_s >= IDLE_S and runner.holds:
            sys.exit(LET_GO)
        if ready:
            piece = stream.read(1 << 16)
            if not piece:
                return b""
            line += piece
    return line


if __name__ == "__main__":
    main()
