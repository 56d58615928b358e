"""Files that are whole or absent: written under a temporary name, flushed to the disk and renamed.

A kill at any moment leaves the old or the new. Hashes show damage; they say nothing about who made a file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vitprune.errors import DamagedFile, InputError, MissingError

TEMPORARY = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_NEARLY_FULL_BYTES = 1_000_000


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
