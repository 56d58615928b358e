"""The output folder: files that are whole or absent, and the manifest that names them.

A file is written under a temporary name, flushed to the disk and renamed, so a kill at any moment leaves the old or
the new. Hashes show damage; they say nothing about who made a file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitprune.errors import DamagedFile, InputError, MissingError

SCHEMA = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_NEARLY_FULL_BYTES = 1_000_000
_REBUILD = "run the build again, it renews what is damaged"


def sha256_file(path: Path) -> str:
    """The SHA-256 of the file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_sha256(value: object) -> str:
    """The SHA-256 of plain data (mappings, lists, text, finite numbers, booleans, None); key order plays no part."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A name to write a file to; it becomes ``path`` when the block ends, and vanishes when the block fails.

    Raises:
        MissingError: the disk is full.
        InputError: the folder cannot be written to.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all. Raises as ``atomic_path`` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def copy_atomic(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all. Raises as ``atomic_path`` does."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of ``folder`` when the block ends, and vanishes when the block fails.

    Raises as ``atomic_path`` does.
    """
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{folder.name}-", dir=folder.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            for path in temporary.rglob("*"):
                flush(path)
            remove_folder(folder)
            temporary.rename(folder)
            flush(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove ``folder``, if it is there: out of the way in one step, since removing file by file may be cut short."""
    if folder.exists():
        doomed = tempfile.mkdtemp(prefix=f"{TEMPORARY}{folder.name}-", dir=folder.parent)
        folder.rename(Path(doomed) / folder.name)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed runs left half-written in ``folder``; only while no other run writes there.

    Args:
        name: of the one folder whose leftovers go; None: those of all files and folders.
    """
    for leftover in folder.glob(f"{TEMPORARY}*"):
        if name is not None and leftover.name.rpartition("-")[0] != f"{TEMPORARY}{name}":
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the file or folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what a full or closed disk does to the block into a sentence.

    Raises:
        MissingError: the disk is full.
        InputError: ``folder`` cannot be written to.
    """
    try:
        yield
    except (MissingError, InputError, DamagedFile):
        raise
    except Exception as error:
        if _is_full(error, folder):
            raise MissingError(
                f"no room left on the disk of {folder}; free some and run the same command again"
            ) from error
        if isinstance(error, OSError) and error.errno in _CLOSED and _is_about(error, folder):
            raise InputError(f"{folder} cannot be written to ({error.strerror}); choose another folder") from error
        raise


def _is_full(error: Exception, folder: Path) -> bool:
    """Libraries report a full disk as errors of their own, so the disk is asked as well."""
    if (isinstance(error, OSError) and error.errno in _FULL) or "No space left" in str(error):
        return True
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < _NEARLY_FULL_BYTES
    return False


def _is_about(error: OSError, folder: Path) -> bool:
    """The error names ``folder``, something in it or a folder around it."""
    name = Path(str(error.filename))
    return name == folder or name in folder.parents or folder in name.parents


class _Part(BaseModel):
    """A part of the manifest; keys that a later version adds are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Latency(_Part):
    """Milliseconds for one batch; a percentile without enough samples behind it is None."""

    p50: float | None
    p90: float | None = None
    p99: float | None = None
    samples: int


class Figures(_Part):
    """What one model is and does: ``dense`` is the user's, in the runtime and precision of the product.

    Attributes:
        params: number of weights.
        macs: multiply-accumulates for one image.
        top1: percent of the test images, None without labels.
        predicted_latency_ms: what the search expected.
    """

    params: int
    macs: int
    top1: float | None
    latency_ms: Latency
    predicted_latency_ms: float | None = None


class BudgetFigures(_Part):
    """The budget as resolved to milliseconds."""

    latency_ms: float
    percentile: int
    batch: int
    image_size: tuple[int, int]


class Parity(_Part):
    """How far engine and torch are apart; ``top1_agreement`` in percent, None for a model without a classifier."""

    max_abs: float
    top1_agreement: float | None


class EngineEntry(_Part):
    """An engine, built or also run here."""

    runtime: str
    precision: str
    status: Literal["built", "run"]


class Manifest(_Part):
    """What an output folder holds, and how it was judged."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    verdict: Literal["pass", "fail", "unstable"]
    reasons: tuple[str, ...]
    device: dict[str, Any]
    versions: dict[str, str]
    dense: Figures
    pruned: Figures
    budget: BudgetFigures
    parity: Parity
    engines: tuple[EngineEntry, ...]
    files: dict[str, str]
    files_note: str = "the sums show damage; they do not show who made a file"

    def write(self, folder: Path) -> None:
        """Write it to ``folder``, whole or not at all. Raises as ``atomic_path`` does."""
        plain = self.model_dump(mode="json", by_alias=True)
        write_atomic(folder / MANIFEST, json.dumps(plain, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of ``folder``; its files are not looked at.

        Raises:
            InputError: no such folder, or a newer version wrote it.
            DamagedFile: there is none, or it is cut off.
        """
        path = folder / MANIFEST
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder")
        if not path.is_file():
            raise DamagedFile(f"{path} is missing: the build did not finish; run the same command again")
        try:
            plain = json.loads(path.read_bytes())
            if isinstance(plain, dict) and isinstance(plain.get("schema"), int) and plain["schema"] > SCHEMA:
                raise InputError(
                    f"{path} is of schema {plain['schema']}, this vitprune reads up to {SCHEMA}: update it"
                )
            return cls.model_validate(plain)
        except ValidationError as error:
            key = ".".join(map(str, error.errors()[0]["loc"]))
            raise DamagedFile(f"{path} is damaged at {key or 'its start'}; {_REBUILD}") from error
        except (ValueError, RecursionError) as error:
            raise DamagedFile(f"{path} is cut off or no JSON; {_REBUILD}") from error

    def file(self, folder: Path, name: str) -> Path:
        """The file ``name`` of ``folder``, which is what the manifest says.

        Raises:
            DamagedFile: it is missing, changed, or not named by the manifest.
        """
        if name not in self.files:
            raise DamagedFile(f"{folder / MANIFEST} names no {name}; {_REBUILD}")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DamagedFile(f"{folder / MANIFEST} names {name}, which lies outside; it was not made by a build")
        if not (folder / name).is_file():
            raise DamagedFile(f"{folder / name} is missing; {_REBUILD}")
        if sha256_file(folder / name) != self.files[name]:
            raise DamagedFile(f"{folder / name} is cut off or changed since it was built; {_REBUILD}")
        return folder / name


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """``names`` in ``folder`` with their SHA-256, as a manifest lists them."""
    return {name: sha256_file(folder / name) for name in sorted(names)}


def verify(folder: Path) -> Manifest:
    """The manifest of ``folder``, all of whose files are what it says. Raises as ``load`` and ``file`` do."""
    manifest = Manifest.load(folder)
    for name in manifest.files:
        manifest.file(folder, name)
    return manifest
