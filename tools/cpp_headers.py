"""The headers that deploy/cpp needs, on any Debian: ``python tools/cpp_headers.py [FOLDER]`` prints their prefix.

ONNX Runtime's, nlohmann_json and stb_image are packages of Debian 13. They are fetched from the archive that this
machine's apt uses and unpacked into FOLDER; nothing is installed, and apt's own lists stay as they are. Give the prefix
to CMake as ``CMAKE_PREFIX_PATH``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vitprune.errors import MissingError

RELEASE = "trixie"  # Debian 13, the first with ONNX Runtime
PACKAGES = ("libonnxruntime-dev", "nlohmann-json3-dev", "libstb-dev")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitprune" / f"cpp-headers-{RELEASE}"
APT = Path("/etc/apt")


class Archive(NamedTuple):
    """Where Debian's packages come from."""

    uri: str
    keyring: str | None


def main() -> int:
    try:
        print(headers(Path(sys.argv[1]) if len(sys.argv) > 1 else CACHE))
    except MissingError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


def headers(folder: Path = CACHE) -> Path:
    """The prefix under which the headers lie, in ``folder``; they are fetched if they are not there yet.

    Raises:
        MissingError: this is no Debian, or its archive cannot be reached.
    """
    if not folder.is_dir():
        for program in ("apt-get", "dpkg"):
            if shutil.which(program) is None:
                raise MissingError(f"there is no {program} here, by which headers could be fetched")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as work:
            unpacked = _fetch(archive(), Path(work))
            unpacked.replace(folder)
    return folder / "usr"


def archive() -> Archive:
    """The archive of the main packages in apt's configuration.

    Raises:
        MissingError: it names none.
    """
    for found in _entries():
        if "security" not in found.uri:
            return found
    raise MissingError(f"apt's configuration in {APT} names no archive")


def _entries() -> Iterator[Archive]:
    """Archives in the order of apt's files."""
    for file in sorted((APT / "sources.list.d").glob("*.sources")):
        for stanza in file.read_text().split("\n\n"):
            lines = [line.partition(":") for line in stanza.splitlines() if line[:1] not in ("#", " ", "")]
            keys = {name.strip().lower(): value.split() for name, _, value in lines}
            if "main" in keys.get("components", ()) and keys.get("enabled") != ["no"]:
                yield Archive(keys["uris"][0], next(iter(keys.get("signed-by", ())), None))
    for file in (APT / "sources.list", *sorted((APT / "sources.list.d").glob("*.list"))):
        for line in file.read_text().splitlines() if file.is_file() else ():
            found = re.match(r"deb\s+(\[.*?\]\s+)?(\S+)\s+\S+\s+(.*)", line)
            if found and "main" in found[3].split():
                yield Archive(found[2], None)


def _fetch(source: Archive, work: Path) -> Path:
    """The unpacked packages, in a folder of ``work``."""
    signed = f"[signed-by={source.keyring}] " if source.keyring else ""
    (work / "sources.list").write_text(f"deb {signed}{source.uri} {RELEASE} main\n")
    for name in ("lists/partial", "cache/archives/partial", "debs", "unpacked"):
        (work / name).mkdir(parents=True)
    places = {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
        "APT::Sandbox::User": "root",  # the folder is ours alone
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", "-qq", *(word for key, value in places.items() for word in ("-o", f"{key}={value}"))]
    _run([*apt, "update"], work)
    _run([*apt, "download", *PACKAGES], work / "debs")
    for package in (work / "debs").glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(work / "unpacked")], work)
    return work / "unpacked"


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        why = " ".join((done.stderr or done.stdout).split()[-60:])
        raise MissingError(f"headers of Debian's {RELEASE} cannot be had: {command[0]} says: {why}")


if __name__ == "__main__":
    raise SystemExit(main())
