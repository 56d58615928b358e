"""Where images lie: class folders, a .zip or .tar of them, or one of timm's dataset readers. Nothing is unpacked.

A source lists its images by path, sorted; the class of an image is the first folder of its path.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import sys
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

from PIL import Image

from vitprune.errors import DamagedFile, InputError, MissingError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".jp2", ".avif")
PART_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "calibration", "recovery"}
MAX_FILE_BYTES = 2**28  # no image worth reading is larger; a member of an archive may claim anything
MAX_UNPACKED_BYTES = 2**31  # of a compressed tar, which cannot be read at random and is held in memory


class Entry(NamedTuple):
    """One image of a source."""

    name: str  # path inside the source, for people: control characters are escaped
    folder: str | None  # the folder that names its class


class Source(ABC):
    """Images by number.

    Attributes:
        where: the source as its user wrote it, for messages.
        entries: the images, sorted by path.
        targets: the class number of each image, where the source counts its classes itself.
        target_names: what those classes are called, where it says so.
    """

    where: str
    entries: Sequence[Entry]
    targets: Sequence[int] | None = None
    target_names: Sequence[str] | None = None

    @abstractmethod
    def size_bytes(self, index: int) -> int:
        """Length of what ``read`` gives."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The file of image ``index``, undecoded."""

    def open(self, index: int) -> Image.Image:
        """The image, of which Pillow has read the header only."""
        return Image.open(io.BytesIO(self.read(index)))


def open_source(source: str | Path, split: str | None = None, root: str | Path | None = None) -> Source:
    """The images of ``source``.

    Args:
        source: a folder, an archive (``photos.zip``), a folder inside one (``photos.zip/test``), or ``timm:READER``
            with a reader name of timm's ``create_dataset``, such as ``timm:torch/cifar10``.
        split: a folder inside the source; with a reader, its split.
        root: where a reader keeps its data.

    Raises:
        InputError: there is no such thing, or no image in it.
        DamagedFile: the archive is cut off.
        MissingError: timm, or what its reader needs, is not installed.
    """
    if str(source).startswith("timm:"):
        return _Reader(str(source)[len("timm:") :], split or "train", root)
    path, inside = Path(source), ""
    while not path.exists() and path != path.parent:
        path, inside = path.parent, f"{path.name}/{inside}"
    prefix = inside + (split.strip("/") + "/" if split else "")
    if path.is_dir() and not inside:
        return _Folder(path, prefix)
    if path.is_file():
        return _Zip(path, prefix) if zipfile.is_zipfile(path) else _Tar(path, prefix)
    raise InputError(f"{source}: there is no such folder or archive of images")


@final
class _Folder(Source):
    def __init__(self, root: Path, prefix: str) -> None:
        self.where = str(root / prefix)
        self._root = root
        paths, self.entries = _layout(_walk(root), str(root), prefix)
        self._paths = paths

    def size_bytes(self, index: int) -> int:
        return (self._root / self._paths[index]).stat().st_size

    def read(self, index: int) -> bytes:
        _check_size(self.size_bytes(index))
        return (self._root / self._paths[index]).read_bytes()


@final
class _Zip(Source):
    def __init__(self, path: Path, prefix: str) -> None:
        self.where = str(path / prefix)
        self._path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        try:
            members = {info.filename: info for info in self._archive().infolist() if not info.is_dir()}
        except (zipfile.BadZipFile, OSError) as error:
            raise DamagedFile(f"{path} is not a readable zip archive ({error})") from None
        paths, self.entries = _layout(members, str(path), prefix)
        self._members = [members[p] for p in paths]

    def size_bytes(self, index: int) -> int:
        return self._members[index].file_size

    def read(self, index: int) -> bytes:
        _check_size(self.size_bytes(index))
        return self._archive().read(self._members[index])

    def _archive(self) -> zipfile.ZipFile:
        """The open archive. Threads may share it; a forked worker must not, since processes share the file offset."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(self._path)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}


@final
class _Tar(Source):
    def __init__(self, path: Path, prefix: str) -> None:
        self.where = str(path / prefix)
        self._path = path
        self._bytes: list[bytes] | None = None
        try:
            offsets = self._offsets()
            held = None if offsets else self._unpack()
        except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = str(error).partition(":\n")[0]  # tarfile lists what each compression has to say, a line each
            raise DamagedFile(f"{path} is not a readable zip or tar archive ({reason})") from None
        paths, self.entries = _layout(offsets or held or {}, str(path), prefix)
        if held is None:
            self._offset_size = [offsets[p] for p in paths]
        else:
            self._bytes = [held[p] for p in paths]

    def size_bytes(self, index: int) -> int:
        return self._offset_size[index][1] if self._bytes is None else len(self._bytes[index])

    def read(self, index: int) -> bytes:
        if self._bytes is not None:
            return self._bytes[index]
        offset, size = self._offset_size[index]
        _check_size(size)
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _offsets(self) -> dict[str, tuple[int, int]]:
        """Offset and size of each file of a tar that is not compressed; empty for one that is."""
        found: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(self._path, "r:") as archive:
                for member in archive:
                    if member.isreg():
                        found[member.name] = member.offset_data, member.size
                    elif member.islnk() and member.linkname in found:  # a file that tar met before, by another name
                        found[member.name] = found[member.linkname]
        except tarfile.ReadError:
            return {}
        return found

    def _unpack(self) -> dict[str, bytes]:
        """The images of a compressed tar, in memory."""
        held: dict[str, bytes] = {}
        total = 0
        with tarfile.open(self._path) as archive:
            for member in archive:
                if member.islnk() and member.linkname in held:
                    held[member.name] = held[member.linkname]
                wanted = member.isreg() and _is_image(member.name) and member.size <= MAX_FILE_BYTES
                total += member.size if wanted else 0
                if total > MAX_UNPACKED_BYTES:
                    raise InputError(
                        f"{self._path} unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB, too much to hold in "
                        "memory; unpack it, or pack it as .zip or .tar"
                    )
                file = archive.extractfile(member) if wanted else None
                if file is not None:
                    held[member.name] = file.read()
        return held


@final
class _Reader(Source):
    """One of timm's dataset readers, with images by number; iterable ones (tfds, wds, hfids) have none."""

    def __init__(self, name: str, split: str, root: str | Path | None) -> None:
        try:
            from timm.data import create_dataset  # base installs have no timm
        except ImportError:
            raise MissingError('timm\'s readers need timm; run pip install "vitprune[prune]"') from None
        self.where = f"timm:{name} ({split})"
        try:
            options: dict[str, Any] = {"root": None if root is None else str(root), "input_img_mode": None}
            with contextlib.redirect_stdout(sys.stderr):  # readers print what they lack, and stdout is for data
                made: Any = create_dataset(name, split=split, **options)
            count = len(made)
        except ImportError as error:
            raise MissingError(f"{self.where}: {error}") from None
        except TypeError:
            if root is None:
                raise InputError(f"{self.where} needs data.root, the folder of its data") from None
            raise InputError(f"{self.where} can only be read in order; use a reader with images by number") from None
        except Exception as error:  # each reader raises its own
            raise InputError(f"{self.where} cannot be opened: {error or type(error).__name__}") from None
        if not count:
            raise InputError(f"{self.where} holds no images")
        self._data = made
        self._reader = getattr(made, "reader", None)  # torchvision's datasets have none
        self.targets = self._targets(count)
        self.target_names = self._target_names()
        self.entries = [Entry(_printable(self._name(i)), None) for i in range(count)]

    def size_bytes(self, index: int) -> int:
        return len(self.read(index))

    def read(self, index: int) -> bytes:
        if self._reader is None:
            return self.open(index).tobytes()
        file, _, *_ = self._reader[index]
        with file:
            return file.read()

    def open(self, index: int) -> Image.Image:
        if self._reader is None:
            return self._data[index][0]
        return Image.open(io.BytesIO(self.read(index)))

    def _targets(self, count: int) -> list[int]:
        targets = getattr(self._data, "targets", None)
        if targets is not None:
            return [int(t) for t in targets]
        samples = getattr(self._reader, "samples", None)
        if samples is not None:
            return [int(sample[1]) for sample in samples]
        return [int((self._reader or self._data)[i][1]) for i in range(count)]

    def _target_names(self) -> list[str] | None:
        names = getattr(self._data, "classes", None)
        numbers = getattr(self._reader, "class_to_idx", None)
        if names is None and numbers:
            names = sorted(numbers, key=lambda name: numbers[name])
        return None if names is None else [str(name) for name in names]

    def _name(self, index: int) -> str:
        return f"{index:08d}" if self._reader is None else str(self._reader.filename(index))


def _walk(root: Path) -> list[str]:
    """Paths of all files below ``root``, relative, with /. Links to folders are followed, circles are not."""
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        below = Path(folder).relative_to(root).as_posix()
        found += [name if below == "." else f"{below}/{name}" for name in files]
    return found


def _layout(paths: Iterable[str], where: str, prefix: str) -> tuple[list[str], list[Entry]]:
    """Those of ``paths`` that are images under ``prefix``, sorted, and what they are called."""
    clean = {path.removeprefix("./"): path for path in paths if _is_image(path)}
    below = sorted(p.removeprefix(prefix) for p in clean if p.startswith(prefix))
    if not below:
        folders = sorted({p.split("/")[0] for p in clean if "/" in p})
        if prefix and folders:
            raise InputError(f"{where} has no images in {prefix!r}; it has {_some(folders)}")
        raise InputError(f"{where} holds no images; wanted files in class folders, as in cat/1.jpg")
    prefix += _lone_folder(below)
    below = sorted(p.removeprefix(prefix) for p in clean if p.startswith(prefix))
    folders = sorted({p.split("/")[0] for p in below if "/" in p})
    if folders and all(folder.lower() in PART_NAMES for folder in folders):
        raise InputError(f"{where} holds parts, not classes: {', '.join(folders)}; set split to one of them")
    entries = [Entry(_printable(p), _printable(p.split("/")[0]) if "/" in p else None) for p in below]
    return [clean[prefix + p] for p in below], entries


def _lone_folder(paths: list[str]) -> str:
    """The folders that wrap everything, as in ``photos-v2/`` around all classes; the innermost is never one."""
    wrap = ""
    while True:
        tops = {p.removeprefix(wrap).split("/")[0] for p in paths}
        inner = {p.removeprefix(wrap).count("/") for p in paths}
        if len(tops) > 1 or min(inner) < 2:
            return wrap
        wrap += f"{tops.pop()}/"


def _is_image(path: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.removeprefix("./").split("/"))
    return path.lower().endswith(EXTENSIONS) and not hidden


def _check_size(size_bytes: int) -> None:
    if size_bytes > MAX_FILE_BYTES:
        raise OSError(f"{size_bytes:,} bytes, more than an image may have ({MAX_FILE_BYTES:,})")


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
