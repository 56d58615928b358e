"""An engine in a process of its own: what memory it takes, and what it answers there."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitprune import parts

from .base import Backend

LONGEST_S = 600.0  # that the other process may take
RUNS = 3  # of which memory is the most
STATUS = Path("/proc/self/status")
MODULE = "vitprune_deploy.backends._apart"


def memory_mb(backend: str, model: Path, shape: Sequence[int], dtype: str, load: Mapping[str, Any]) -> float | None:
    """Most memory that loading and running ``model`` adds to a fresh process, in MB of 10^6 bytes; Linux only.

    On a GPU it is the memory of the host.

    Args:
        backend: name of the runtime's file in ``backends``.
        model: the model file.
        shape, dtype: of one batch.
        load: further arguments of ``Backend.load``.
    """
    if not STATUS.exists():
        return None
    what = {"do": "memory", "backend": backend, "model": str(model), "shape": list(shape), "dtype": dtype, "load": load}
    done = subprocess.run(_command(what), capture_output=True, text=True, env=_environment())
    return float(done.stdout) / 1000 if done.returncode == 0 else None


@contextlib.contextmanager
def answering(
    backend: str, model: Path, batches: np.ndarray, load: Mapping[str, Any]
) -> Iterator[Callable[[], np.ndarray]]:
    """A process that runs ``batches`` [n, B, C, H, W], as a function that waits for what they get, [n, B, ...].

    It ends with the block at last. The function raises RuntimeError where no answers come.
    """
    with tempfile.TemporaryDirectory(prefix="vitprune-") as folder:
        given, answers = Path(folder) / "batches.npy", Path(folder) / "answers.npy"
        np.save(given, batches)
        what = {"do": "answer", "backend": backend, "model": str(model), "load": load,
                "batches": str(given), "answers": str(answers)}  # fmt: skip
        with subprocess.Popen(
            _command(what), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=_environment()
        ) as process:

            def wait() -> np.ndarray:
                _, said = process.communicate(timeout=LONGEST_S)
                if process.returncode:
                    raise RuntimeError((said.strip().splitlines() or [f"it ended with code {process.returncode}"])[-1])
                return np.asarray(np.load(answers))

            try:
                yield wait
            finally:
                process.kill()


def main() -> None:
    """What was asked for on the command line."""
    what = json.loads(sys.argv[1])
    kind = parts.load("vitprune_deploy.backends", what["backend"], Backend)  # type: ignore[type-abstract]
    (_measure if what["do"] == "memory" else _answer)(kind, what)


def _measure(kind: type[Backend], what: Mapping[str, Any]) -> None:
    """Print kilobytes: VmHWM and not getrusage, whose peak a child inherits from its parent."""
    inputs = np.ones(what["shape"], what["dtype"])
    with contextlib.suppress(ImportError):
        __import__(what["backend"])
    before = _kilobytes("VmRSS")
    with kind.load(Path(what["model"]), **what["load"]) as engine:
        for _ in range(RUNS):
            engine.run(inputs)
    sys.stdout.write(f"{(_kilobytes('VmHWM') - before) * 1.024}\n")


def _answer(kind: type[Backend], what: Mapping[str, Any]) -> None:
    """Write what the batches of a file get into another."""
    batches = np.load(what["batches"])
    with kind.load(Path(what["model"]), **what["load"]) as engine:
        dtype = engine.inputs[0].dtype
        np.save(what["answers"], np.stack([engine.run(batch.astype(dtype)) for batch in batches]))


def _kilobytes(key: str) -> int:
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(key)).split()[1])


def _command(what: Mapping[str, Any]) -> list[str]:
    return [sys.executable, "-m", MODULE, json.dumps(what)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


if __name__ == "__main__":
    main()
