"""Latency, throughput and memory of the example service on this machine.

    python tools/bench_service.py out/quickstart [--clients 1 8 64] [--seconds 20] [--requests 10000] [--threads N]

Clients are threads of this program, so they share the machine's processors with the service; each sends one
preprocessed image after the other on a connection that it keeps, and every answer is compared with that of the engine
in this process. Beside it stands what the engine takes without the service. After that, 8 clients send so many
requests, and the memory of the service is read after every tenth of them; the first tenth is warm-up.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitprune_deploy.latency.fingerprint import device_fingerprint, machine_state
from vitprune_deploy.runtime import Model, load

ROOT = Path(__file__).parent.parent
SERVICE = ROOT / "deploy" / "examples" / "service"
NAME = "model"
IMAGES = 32  # different ones, which take turns
MEMORY_CLIENTS = 8
TOLERANCE = 1e-3  # of a logit: batches of another size take other kernels; another image is off by O(1)
WARM_UP_S = 2.0


class Load(NamedTuple):
    """What a number of clients saw.

    Attributes:
        clients: that sent at once.
        latencies_ms: of each request, from sending to the whole answer.
        seconds: from the first request to the last answer.
    """

    clients: int
    latencies_ms: np.ndarray
    seconds: float


class Requests:
    """Bodies of requests, and what is to be answered."""

    def __init__(self, model: Model) -> None:
        shape = (1, *model.preprocess.input_size)
        self.inputs = np.random.default_rng(0).standard_normal((IMAGES, *shape)).astype(np.float32)
        self.logits = np.concatenate([model.predict(one).logits for one in self.inputs])
        size = {"binary_data_size": self.inputs[0].nbytes}
        tensor = {"name": model.backend.inputs[0].name, "datatype": "FP32", "shape": shape, "parameters": size}
        self.head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()

    def send(self, connection: http.client.HTTPConnection, number: int) -> float:
        """Milliseconds of one request; its answer is compared outside of them."""
        which = number % IMAGES
        body = self.head + self.inputs[which].tobytes()
        start = time.perf_counter()
        headers = {"Inference-Header-Content-Length": str(len(self.head))}
        connection.request("POST", f"/v2/models/{NAME}/infer", body, headers)
        response = connection.getresponse()
        answer = response.read()
        taken_ms = 1000 * (time.perf_counter() - start)
        if response.status != 200:
            raise SystemExit(f"the service answered {response.status}: {answer.decode()}")
        end = int(response.headers["Inference-Header-Content-Length"])
        error = np.abs(np.frombuffer(answer[end:], np.float32) - self.logits[which]).max()
        if error > TOLERANCE:
            raise SystemExit(f"a wrong answer: a logit is off by {error}")
        return taken_ms


def main() -> None:
    """Print the table and the course of the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of clients")
    parser.add_argument("--requests", type=int, default=10_000, help="over which memory is watched")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    with load(arguments.folder, threads=arguments.threads) as model:
        requests = Requests(model)
        circumstances = device_fingerprint(model.backend.runtime, model.backend.provider, arguments.threads)
        bare = {batch: bare_ms(model, requests, batch) for batch in (1, min(8, model.max_batch))}
    print(f"{arguments.folder}: {circumstances['cpu']}, {circumstances['cores']} cores, {circumstances['runtime']}")
    print(f"{circumstances['provider']}, threads {arguments.threads or 'all'}; {machine_state()}")
    for batch, ms in bare.items():
        print(f"engine alone, batch {batch}: p50 {ms:.2f} ms, {1000 * batch / ms:.1f} images/s")
    options = [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    with serving(arguments.folder, options) as (port, process):
        print("clients  requests    p50 ms    p99 ms  requests/s  images a batch")
        for clients in arguments.clients:
            show(port, requests, clients, arguments.seconds)
        watch_memory(port, process.pid, requests, arguments.requests)


def bare_ms(model: Model, requests: Requests, batch: int) -> float:
    """Median milliseconds of a batch in this process, while nothing else is asked for."""
    inputs = np.concatenate(list(requests.inputs[:batch]))
    taken = []
    end = time.monotonic() + 2 * WARM_UP_S
    while time.monotonic() < end:
        start = time.perf_counter()
        model.predict(inputs)
        taken.append(1000 * (time.perf_counter() - start))
    return float(np.median(taken[len(taken) // 2 :]))


def show(port: int, requests: Requests, clients: int, seconds: float) -> None:
    """A row of the table."""
    under_load(port, requests, clients, WARM_UP_S)
    before = metrics(port)
    found = under_load(port, requests, clients, seconds)
    after = metrics(port)
    names = ("vitprune_batch_images_sum", "vitprune_batch_images_count")
    images, batches = (after[name] - before[name] for name in names)
    p50, p99 = np.percentile(found.latencies_ms, [50, 99])
    count = len(found.latencies_ms)
    print(f"{clients:7d} {count:9d} {p50:9.1f} {p99:9.1f} {count / found.seconds:11.1f} {images / batches:15.2f}")


def under_load(port: int, requests: Requests, clients: int, seconds: float) -> Load:
    """``clients`` send for so many seconds."""
    end = time.monotonic() + seconds

    def work(client: int) -> list[float]:
        connection, taken, number = connect(port), [], client
        while time.monotonic() < end:
            taken.append(requests.send(connection, number))
            number += 1
        connection.close()
        return taken

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        latencies = [ms for taken in pool.map(work, range(clients)) for ms in taken]
    return Load(clients, np.array(latencies), time.perf_counter() - start)


def watch_memory(port: int, pid: int, requests: Requests, count: int) -> None:
    """Send ``count`` requests, and print the service's resident memory on the way."""
    share = count // (10 * MEMORY_CLIENTS)

    def work(client: int) -> None:
        connection = connect(port)
        for number in range(share):
            requests.send(connection, client + number)
        connection.close()

    course = []
    for _ in range(10):
        with ThreadPoolExecutor(MEMORY_CLIENTS) as pool:
            list(pool.map(work, range(MEMORY_CLIENTS)))
        course.append(resident_mb(pid))
    sent = 10 * MEMORY_CLIENTS * share
    text = " ".join(f"{mb:.1f}" for mb in course)
    print(f"resident memory over {sent} requests of {MEMORY_CLIENTS} clients: {text} MB")
    print(f"growth after the first tenth: {course[-1] - course[0]:+.1f} MB")


@contextmanager
def serving(folder: Path, options: list[str]) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Port and process of the service, which ends with the block."""
    with tempfile.NamedTemporaryFile() as log:
        command = [sys.executable, str(SERVICE), str(folder), "--port", "0", "--name", NAME, *options]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", Path(log.name).read_text())):
                if process.poll() is not None:
                    raise SystemExit(Path(log.name).read_text())
                time.sleep(0.1)
            yield int(found[1]), process
        finally:
            process.terminate()
            process.wait(60)


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=120)


def metrics(port: int) -> dict[str, float]:
    connection = connect(port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / (1 << 20)


if __name__ == "__main__":
    main()
