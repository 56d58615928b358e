"""A board that ssh reaches, as a device: its runner is started there, fed with files, and asked."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import logging
import posixpath
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from vitprune.errors import DamagedFile, InputError, MissingError, VitpruneError

from ..backends._trt_sidecar import sidecar_path
from ..backends.base import Backend
from ..files import sha256_file, write_atomic
from . import registry
from .bundle import bundle, name_of
from .connection import Connection, Lost, Talk
from .device import Device
from .runner import KINDS, unpacked
from .trtexec_board import TrtexecBoard

if TYPE_CHECKING:
    from ..backends.tensorrt import EngineOptions

MOST_MB = 8000.0  # of files that are kept there for the next time
SPARE_MB = 200.0  # of its disk that is left free
AGAIN_S = (2.0, 5.0, 15.0, 40.0)  # between attempts to have a lost connection back: a board starts in a minute
HELLO_S = 60.0
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-qnn", "openvino", "tensorrt",
                 "tensorrt-cu13", "tensorrt-cu12", "tensorrt_rtx", "numpy")  # fmt: skip
MODULES = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "pycuda", "cuda")

log = logging.getLogger(__name__)
T = TypeVar("T")


@cache
def board(name: str) -> Device:
    """The board of that name or address; its connection is made when it is first asked, and shared."""
    registered = registry.lookup(name)
    found = TrtexecBoard(registered) if registered.runner == "trtexec" else Board(registered)
    atexit.register(found.close)
    return found


class Board(Device):
    """A device at the other end of a connection.

    A connection that is lost is made again a few times, and what was loaded is loaded again; then Lost is raised.
    """

    def __init__(self, registered: registry.Device) -> None:
        self.address = str(registered.host)
        self._registered = registered
        self._turn = threading.RLock()
        self._connection: Connection | None = None
        self._talk: Talk | None = None
        self._held: dict[int, dict[str, Any]] = {}  # requests that left something loaded, to be made again
        self._numbers = count(1)
        self._sums: dict[tuple[str, int, int], str] = {}
        self._sources: dict[str, Path] = {}  # where files that the board was given lie here, by sum
        self._scratch = tempfile.TemporaryDirectory(prefix="vitprune-")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the board is and has."""
        found: dict[str, Any] = self.ask("hello", distributions=DISTRIBUTIONS, modules=MODULES)
        return found

    def fingerprint(self, runtime: str, provider: str = "cpu", threads: int | None = None) -> dict[str, Any]:
        """As ``latency.fingerprint.device_fingerprint`` there."""
        name, _, version = runtime.partition(" ")
        more = {"runtime": name, "runtime_version": version, "provider": provider, "threads": threads}
        return {**self.facts["device"], **more}

    def state(self) -> dict[str, Any]:
        """What the board's tools say of its clocks, power and heat; ``state.read_state`` understands it."""
        found: dict[str, Any] = self.ask("state")
        return found

    def version(self, distributions: Sequence[str]) -> str | None:
        """The version of the first of these packages that the board has."""
        versions = self.facts["versions"]
        return next((versions[name] for name in distributions if name in versions), None)

    def has(self, module: str) -> bool:
        """Whether the board's Python has a module."""
        return module in self.facts["modules"]

    def load(
        self, backend: str, path: Path, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Backend:
        """A model file, sent to the board if it is not there, and loaded."""
        from .backend import RemoteBackend

        request = {**self._model(backend, path), "load": {"threads": threads, "options": dict(options or {})}}
        key = next(self._numbers)
        return RemoteBackend(self, key, self.hold(key, "load", **request))

    def build(self, onnx: Path, plan: Path, options: EngineOptions) -> dict[str, Any]:
        """Build the engine there, since a plan belongs to its GPU, and bring it and its sidecar back."""
        plain = dataclasses.asdict(options)
        plain["profiles"] = [{name: list(shapes) for name, shapes in one.items()} for one in options.profiles]
        plain |= {"timing_cache": options.timing_cache is not None}
        asked = {"module": plain.pop("module"), **self._files(onnx), "model": onnx.name}
        sidecar: dict[str, Any] = self.ask("build", options=plain, **asked)
        self._insist(lambda: self._fetch(f"{self._folder}/files/{sidecar['sha256']}", plan))
        if sha256_file(plan) != sidecar["sha256"]:
            raise DamagedFile(f"{plan} did not arrive whole from {self.address}; run the same command again")
        write_atomic(sidecar_path(plan), json.dumps(sidecar, indent=1) + "\n")
        return sidecar

    def memory_mb(self, backend: str, model: Path, inputs: np.ndarray, **load: Any) -> float | None:
        """As ``_apart.memory_mb`` there."""
        shape = {"shape": list(inputs.shape), "dtype": inputs.dtype.name}
        found: float | None = self.ask("memory", **self._model(backend, model), load=load, **shape)
        return found

    @contextlib.contextmanager
    def answering(
        self, backend: str, model: Path, batches: np.ndarray, load: Mapping[str, Any]
    ) -> Iterator[Callable[[], np.ndarray]]:
        """A second process of the board, which runs when it is waited for."""

        def wait() -> np.ndarray:
            plain = self.ask("apart", **self._model(backend, model), load=dict(load), batches=self.put_array(batches))
            if "refused" in plain:
                raise RuntimeError(plain["refused"])
            return unpacked(plain)

        yield wait

    def hold(self, key: int, do: str, **request: Any) -> Any:
        """Ask for something that stays loaded under the number ``key``, also over a connection that is made again."""
        found = self.ask(do, key=key, **request)
        self._held[key] = {"do": do, "key": key, **request}
        return found

    def drop(self, models: Sequence[int] = (), subjects: Sequence[int] = ()) -> None:
        """Let go of what is loaded; a board that is gone has let go itself."""
        for key in (*models, *subjects):
            self._held.pop(key, None)
        if self._talk is not None:
            with contextlib.suppress(Lost):
                self._say({"do": "drop", "models": list(models), "subjects": list(subjects)})

    def number(self) -> int:
        """One that nothing else on the board is called by."""
        return next(self._numbers)

    def put_array(self, array: np.ndarray, *, kept: bool = False) -> str:
        """Have an array on the board; what it is called there. It is kept here too where something held reads it."""
        path = Path(self._scratch.name) / f"{next(self._numbers)}.npy"
        np.save(path, array)
        try:
            (found,) = self.put([path]).values()
        finally:
            if not kept:
                path.unlink()
                self._sources = {which: source for which, source in self._sources.items() if source != path}
        return found

    def put(self, paths: Iterable[Path]) -> dict[str, str]:
        """Have files on the board: their names, and what they are called there. Only what it lacks is sent."""
        sums = {path: self._sum(path) for path in paths}
        self._sources |= {which: path for path, which in sums.items()}
        self._insist(lambda: self._put({which: path for path, which in sums.items()}))
        return {path.name: which for path, which in sums.items()}

    def ask(self, do: str, **request: Any) -> Any:
        """What the board answers.

        Raises:
            Lost: the connection was lost, and could not be had back.
            VitpruneError: what went wrong there.
        """
        return self._insist(lambda: self._say({"do": do, **request}))

    def close(self) -> None:
        """End the runner and the connection."""
        with self._turn:
            self._hang_up()

    def _insist(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, over a connection that is made again where it is lost."""
        with self._turn:
            self._start()
            pauses = iter(AGAIN_S)
            while True:
                try:
                    return work()
                except Lost as error:
                    self._have_back(error, pauses)

    def _have_back(self, error: Lost, pauses: Iterator[float]) -> None:
        """Make the connection again, behind as many of the pauses as it takes; a board that starts needs some."""
        self._hang_up()
        for pause_s in pauses:
            log.warning("%s; trying again in %g s", error, pause_s)
            time.sleep(pause_s)
            try:
                self._start()
                return
            except MissingError:  # not there yet, or its lock not free yet
                self._hang_up()
        raise error

    @cached_property
    def _folder(self) -> str:
        """The runner's folder, as a path there."""
        assert self._connection
        return posixpath.join(self._connection.home(), self._registered.folder)

    @cached_property
    def _runner(self) -> bytes:
        """The program, put together once."""
        return bundle()

    def _start(self) -> None:
        """Have the runner running, with everything loaded that was so before."""
        if self._talk is not None:
            return
        if self._connection is None:
            self._connection = Connection.open(self._registered.host)
        folder, program = self._folder, f"{self._folder}/{name_of(self._runner)}"
        self._connection.run(f"mkdir -p {shlex.quote(folder)}", timeout_s=HELLO_S)
        if self._connection.run(f"test -e {shlex.quote(program)}", timeout_s=HELLO_S).code:
            local = Path(self._scratch.name) / "runner.pyz"
            local.write_bytes(self._runner)
            self._connection.send(local, program)
        command = shlex.join([self._registered.python, program, folder])
        self._talk = self._connection.start(f"exec {command}")
        for request in list(self._held.values()):
            self._put_again([*request.get("files", {}).values(), *request.get("feed", {}).values()])
            self._say(request)

    def _say(self, request: Mapping[str, Any]) -> Any:
        """The answer to one request of a runner that runs."""
        assert self._talk
        answer = json.loads(self._talk.ask(json.dumps(request), None))
        if "error" in answer:
            raise self._error(*answer["error"])
        return answer["result"]

    def _error(self, kind: str, text: str) -> VitpruneError:
        known = KINDS.get(kind)
        if known is None:
            raise RuntimeError(f"the runner on {self.address} failed:\n{text}")
        return known(f"{self.address}: {text}")

    def _hang_up(self) -> None:
        for one in (self._talk, self._connection):
            if one is not None:
                with contextlib.suppress(VitpruneError):
                    one.close()
        self._talk = self._connection = None

    def _put(self, sources: Mapping[str, Path]) -> None:
        """Send those of the files, by sum, that the board lacks."""
        assert self._connection
        lacking = self._say({"do": "missing", "sums": sorted(sources)})
        if lacking:
            self._make_room(sum(sources[which].stat().st_size for which in lacking) / 1e6)
            for which in lacking:
                self._connection.send(sources[which], f"{self._folder}/files/{which}.part")
            self._say({"do": "keep", "sums": lacking})

    def _put_again(self, sums: Iterable[str]) -> None:
        """Have files on a board that may have lost them: one that starts anew has forgotten what was in its memory."""
        here = {which: self._sources[which] for which in sums if which in self._sources}
        self._put({which: path for which, path in here.items() if path.is_file()})

    def _fetch(self, remote: str, path: Path) -> None:
        assert self._connection
        self._connection.fetch(remote, path)

    def _make_room(self, wanted_mb: float) -> None:
        """Have room for files; those of earlier times give way.

        Raises:
            MissingError: the disk is too full.
        """
        room = {"wanted_mb": wanted_mb, "spare_mb": SPARE_MB, "most_mb": MOST_MB}
        free_mb = self._say({"do": "make_room", **room})
        if free_mb < wanted_mb + SPARE_MB:
            raise MissingError(
                f"{self.address}: its disk has {free_mb:.0f} MB left, and {wanted_mb:.0f} MB are to be put there; "
                "free some and run the same command again"
            )

    def _model(self, backend: str, path: Path) -> dict[str, Any]:
        """A model file and what belongs to it, as requests name them."""
        return {"backend": backend, "model": path.name, **self._files(path)}

    def _files(self, path: Path) -> dict[str, Any]:
        beside = [sidecar_path(path)] if path.suffix == ".plan" else list(path.parent.glob(f"{path.name}.data*"))
        if not path.is_file():
            raise InputError(f"{path}: there is no such model file")
        return {"files": self.put([path, *(one for one in beside if one.is_file())])}

    def _sum(self, path: Path) -> str:
        """The file's SHA-256, found out once."""
        facts = path.stat()
        key = (str(path), facts.st_size, facts.st_mtime_ns)
        if key not in self._sums:
            self._sums[key] = sha256_file(path)
        return self._sums[key]
