"""Talks to the process in which TensorRT parses and builds, and turns whatever becomes of it into a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import vitprune
import vitprune_deploy
from vitprune.errors import DamagedFile, InputError, MissingError, NotSupported, VitpruneError

MODULES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


class Progress(Protocol):
    """Whoever shows how far a build is."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Of the steps of ``phase`` so many are done."""


def ask(
    action: str,
    module: str,
    request: Mapping[str, Any],
    *,
    subject: str = "",
    timeout_s: float,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What the child process answers to ``action``.

    Args:
        subject: the file that it is about, for messages.

    Raises:
        InputError: the request does not fit, or time ran out.
        NotSupported: TensorRT does not take the graph, or it crashed.
        DamagedFile: the file is no ONNX file.
        MissingError: the module, a driver, memory or room on the disk is missing.
    """
    line = json.dumps({"action": action, "module": module, **request}) + "\n"
    with tempfile.TemporaryFile() as talk, _child(talk, line) as child:
        for message in _messages(child.stdout, time.monotonic() + timeout_s):
            if message is None:
                raise InputError(f"{subject}: {MODULES[module]} took longer than {timeout_s:g} s; raise its time limit")
            if "progress" in message and progress is not None:
                progress(*message["progress"])
            if "error" in message:
                raise _error(module, subject, *message["error"])
            if "result" in message:
                return message["result"]
        raise _crash(module, subject, child.wait(), talk)


def sentence(module: str, why: str) -> str:
    """Why a module is of no use here, with the command that brings it if it is not installed."""
    way = f"; run `pip install 'vitprune[{EXTRAS[module]}]'`" if why.startswith("cannot be imported") else ""
    return f"{MODULES[module]} {why}{way}"


@contextlib.contextmanager
def _child(talk: IO[bytes], line: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process, which has been asked; it ends with the block at the latest."""
    roots = [str(Path(package.__path__[0]).parent) for package in (vitprune, vitprune_deploy)]
    path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}._trt_build"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=talk,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # type: ignore[union-attr]
            stdin.write(line.encode())
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def _messages(stream: IO[bytes] | None, deadline: float) -> Iterator[dict[str, Any] | None]:
    """The messages of the child as they come; None as the last one if the deadline comes first."""
    lines: queue.Queue[bytes | None] = queue.Queue()

    def read() -> None:
        with contextlib.suppress(ValueError, OSError):  # closed by the other side
            for line in stream or ():
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()  # a pipe has no time limit of its own on every system
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            yield None
            return
        if line is None:
            return
        yield json.loads(line)


def _error(module: str, subject: str, kind: str, message: str) -> VitpruneError:
    """Our exception for a refusal of the child."""
    if kind == "damaged":
        return DamagedFile(f"{subject} {message}")
    place = f"{subject}: " if subject else ""
    kinds: dict[str, type[VitpruneError]] = {"missing": MissingError, "input": InputError, "refused": NotSupported}
    return kinds[kind](place + sentence(module, message))


def _crash(module: str, subject: str, code: int, talk: IO[bytes]) -> VitpruneError:
    """Our exception for a child that ended without an answer."""
    if code == -signal.SIGKILL:  # nobody but the kernel does that
        return MissingError(f"{subject}: {MODULES[module]} was killed, most likely for want of memory")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    talk.seek(0)
    last = talk.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    return NotSupported(f"{subject}: {MODULES[module]} crashed ({name}); its last line: {last[0][:200]}")
