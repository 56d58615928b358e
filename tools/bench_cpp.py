"""The C++ runtime against Python's on one folder: images a second, from 8-bit pixels to logits.

    python tools/bench_cpp.py FOLDER IMAGES [--batch 1 8] [--rounds 61] [--threads 2]

FOLDER is what ``vitprune-deploy build`` left, IMAGES a folder of PNG or JPEG files, decoded beforehand. Every round
lets both predict for about half a second, in random order; what is compared are ratios within a round, so that a
machine that drifts does no harm. The interval is a bootstrap of the median ratio (95%). Above 1, C++ is the faster.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from cpp_headers import headers
from vitprune_deploy.latency.fingerprint import machine_state
from vitprune_deploy.runtime import load

ROOT = Path(__file__).parent.parent
RESAMPLES = 5000
SECONDS = 0.5
MOST_IMAGES = 64
Run = Callable[[int], float]  # a number of batches -> the milliseconds that they took


def main() -> None:
    """Print a row for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.images.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg"))
    paths = paths[:: max(1, len(paths) // MOST_IMAGES)][:MOST_IMAGES]
    with tempfile.TemporaryDirectory() as build:
        program = compiled(Path(build))
        print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, {len(paths)} images")
        for batch in arguments.batch:
            report(batch, measure(program, arguments, paths, batch))
    print(machine_state())


def compiled(build: Path) -> Path:
    """The program that times predictions, optimised."""
    source = ["cmake", "-S", ROOT / "tests/cpp", "-B", build, "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run([*source, f"-DCMAKE_PREFIX_PATH={headers()}"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", build, "--target", "timing"], check=True, stdout=subprocess.DEVNULL)
    return build / "timing"


def measure(program: Path, arguments: argparse.Namespace, paths: list[Path], batch: int) -> np.ndarray:
    """Milliseconds of one batch, float64 [rounds, 2]: C++, Python."""
    spec = find_spec("onnxruntime")
    library = next(Path(str(spec and spec.origin)).parent.glob("capi/libonnxruntime.so.*"))
    command = [program, arguments.folder, arguments.threads, batch, *paths]
    worker = subprocess.Popen(
        [*map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"VITPRUNE_ONNXRUNTIME": str(library)},
    )
    with worker, load(arguments.folder, threads=arguments.threads) as model:
        runs: list[Run] = [by_cpp(worker), by_python(model, paths, batch)]
        number = max(1, round(1000 * SECONDS / max(run(10) / 10 for run in runs)))
        rng, rows = np.random.default_rng(0), []
        for _ in range(arguments.rounds):
            row = np.zeros(2)
            for which in rng.permutation(2):
                row[which] = runs[which](number) / number
            rows.append(row)
        worker.stdin.close()  # type: ignore[union-attr]
    return np.array(rows)


def by_cpp(worker: subprocess.Popen[str]) -> Run:
    """Has the C++ process predict."""

    def run(number: int) -> float:
        worker.stdin.write(f"{number}\n")  # type: ignore[union-attr]
        worker.stdin.flush()  # type: ignore[union-attr]
        return float(worker.stdout.readline())  # type: ignore[union-attr]

    return run


def by_python(model, paths: list[Path], batch: int) -> Run:
    """Predicts here, from the same pixels in the same order."""
    pixels = [np.asarray(Image.open(path)) for path in paths]
    position = 0

    def run(number: int) -> float:
        nonlocal position
        start = time.perf_counter()
        for _ in range(number):
            model.predict([pixels[(position + i) % len(pixels)] for i in range(batch)])
            position += batch
        return 1000 * (time.perf_counter() - start)

    return run


def report(batch: int, times_ms: np.ndarray) -> None:
    """A line: images a second of both, and the ratio with its interval."""
    ratios = times_ms[:, 1] / times_ms[:, 0]
    draws = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    cpp, python = 1000 * batch / np.median(times_ms, axis=0)
    print(f"batch {batch}: C++ {cpp:.1f}, Python {python:.1f} images/s; "
          f"ratio {np.median(ratios):.4f} ({low:.4f} to {high:.4f}), {len(ratios)} rounds")  # fmt: skip


if __name__ == "__main__":
    main()
