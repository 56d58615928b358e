"""The one file that is copied to a board: the runner with what it imports, as a program that Python runs from a zip."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import vitprune
import vitprune_deploy

HERE, LIBRARY = (Path(package.__path__[0]) for package in (vitprune_deploy, vitprune))
OURS = ("__init__.py", "files.py", "processor.py", "backends/*.py", "latency/__init__.py", "latency/fingerprint.py",
        "latency/gate.py", "latency/machine.py", "latency/visits.py", "remote/__init__.py", "remote/runner.py",
        "remote/_tools.py")  # fmt: skip
THEIRS = ("__init__.py", "errors.py", "parts.py")
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same sources make the same file
# In the Python of 2008 and later, so that the sentence comes out whatever the board has
MAIN = """\
import json, sys

def refuse(why):
    print(json.dumps({"error": ["missing", why]}))
    sys.exit(1)

if sys.version_info < (3, 8):
    refuse("its Python is %d.%d, and 3.8 or newer is needed; name another one with "
           "`vitprune-deploy devices add NAME ADDRESS --python PATH`" % sys.version_info[:2])
try:
    import numpy
except ImportError:
    refuse("its Python (%s) has no numpy; run `%s -m pip install numpy` there" % (sys.executable, sys.executable))
from vitprune_deploy.remote.runner import main
main()
"""


def bundle() -> bytes:
    """The file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(_sources().items()):
            entry = zipfile.ZipInfo(name, LONG_AGO)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, text)
    return buffer.getvalue()


def name_of(file: bytes) -> str:
    """What it is called on a board, where several versions may lie."""
    return f"runner-{hashlib.sha256(file).hexdigest()[:16]}.pyz"


def _sources() -> dict[str, str]:
    found = {"__main__.py": MAIN}
    for package, root, patterns in (("vitprune_deploy", HERE, OURS), ("vitprune", LIBRARY, THEIRS)):
        for pattern in patterns:
            for path in root.glob(pattern):
                found[f"{package}/{path.relative_to(root).as_posix()}"] = path.read_text(encoding="utf-8")
    return found
