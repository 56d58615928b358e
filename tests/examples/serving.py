"""The example service as a process of its own, on a port that the system chose."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
SERVICE = ROOT / "deploy" / "examples" / "service"
STARTS_S = 60
ENDS_S = 30


class Server(NamedTuple):
    """A running service."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to one request, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def infer(self, request: Any, name: str, binary: bytes = b"") -> tuple[int, Any]:
        """Status and JSON of the answer to an inference request."""
        head = json.dumps(request).encode()
        sent = {"Inference-Header-Content-Length": str(len(head))} if binary else {}
        status, _, body = self.ask("POST", f"/v2/models/{name}/infer", head + binary, sent)
        return status, json.loads(body)

    def metrics(self) -> dict[str, float]:
        """Metrics by name and labels."""
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


def environment() -> dict[str, str]:
    """That of a user who has installed the package."""
    paths = [str(ROOT), str(ROOT / "deploy"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Server]:
    """The service for an output folder; it is told to end with the block."""
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        with log.open("wb") as file:
            command = [sys.executable, str(SERVICE), str(folder), "--port", "0", "--threads", "1", *arguments]
            process = subprocess.Popen(command, stderr=file, stdout=file, env=environment())
        try:
            yield Server(_port(process, log), process, log)
        finally:
            process.terminate()
            process.wait(ENDS_S)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + STARTS_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())
        if found:
            return int(found[1])
        time.sleep(0.05)
    raise AssertionError(f"the service did not start:\n{log.read_text()}")
