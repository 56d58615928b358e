"""Stages of a build that run only when what they depend on has changed, or what they left is damaged.

A stage works in a temporary folder that is renamed when all in it is on the disk: a kill leaves the old or the new.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitprune.errors import InputError

from .artifact import hash_files
from .files import atomic_folder, canonical_sha256, remove_folder, sweep, write_atomic, writing


class Done(NamedTuple):
    """A finished stage.

    Attributes:
        folder: where its outputs are.
        sha256: of all outputs together, for the keys of later stages.
        ran: it ran now; False: what an earlier run left was used.
    """

    folder: Path
    sha256: str
    ran: bool


class Stages:
    """The stages of one build, each with a folder in ``folder``; used as a context, it keeps other builds out.

    A stage runs when its key, plain data of all that its outputs depend on, differs from that of the run before, or
    when an output is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None

    def __enter__(self) -> Stages:
        """Take the folder.

        Raises:
            InputError: another process has it.
        """
        import fcntl  # POSIX only, as building is; reading an artefact is not

        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise InputError(
                f"{self.folder}: another build is at work here (process {owner}); wait for it, or choose another --out"
            ) from error
        self._lock = handle
        sweep(self.folder)
        with contextlib.suppress(OSError):  # a full disk: the first stage says so, and who is at work matters less
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def run(self, name: str, key: Mapping[str, Any], outputs: Sequence[str], work: Callable[[Path], None]) -> Done:
        """Have ``work`` write the files ``outputs`` into the folder it is given, unless an earlier run did so.

        Raises:
            MissingError: the disk is full.
        """
        sha256 = canonical_sha256(key)
        folder = self.folder / f"{name}-{sha256[:16]}"
        found = self.find(name, key)
        if found is not None:
            return found
        with atomic_folder(folder) as temporary:  # in place of a damaged one, else it would have been found
            work(temporary)
            files = _seal(temporary, outputs, name)
            write_atomic(temporary / "stage.json", json.dumps({"key": key, "files": files}, indent=1))
        self._forget_others(name, folder)
        return Done(folder, canonical_sha256(files), ran=True)

    def find(self, name: str, key: Mapping[str, Any]) -> Done | None:
        """The finished stage ``name`` with that key and undamaged outputs, or None."""
        folder = self.folder / f"{name}-{canonical_sha256(key)[:16]}"
        try:
            stored = json.loads((folder / "stage.json").read_bytes())
            files = stored["files"]
            whole = canonical_sha256(stored["key"]) == canonical_sha256(key) and files == hash_files(folder, files)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Done(folder, canonical_sha256(files), ran=False) if whole else None

    def forget(self) -> None:
        """Remove the outputs of all stages: the next run starts afresh."""
        for path in self.folder.glob("*/stage.json"):
            remove_folder(path.parent)

    def _forget_others(self, name: str, keep: Path) -> None:
        """Remove what the stage left under other keys."""
        for path in self.folder.glob(f"{name}-*/stage.json"):
            if path.parent != keep and path.parent.name.rpartition("-")[0] == name:
                remove_folder(path.parent)


def _seal(folder: Path, outputs: Sequence[str], stage: str) -> dict[str, str]:
    """The hashes of all files in ``folder``."""
    lacking = [name for name in outputs if not (folder / name).is_file()]
    if lacking:
        raise RuntimeError(f"stage {stage} did not write {', '.join(lacking)}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hash_files(folder, [path.relative_to(folder).as_posix() for path in files])
