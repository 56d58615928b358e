"""What a board behind ssh adds to a latency table: the same parts, visited as often, here and there in turn.

    python tools/bench_remote.py --host ssh://me@board --parts 40

The parts are MLP halves of DeiT-S; each is exported, sent, loaded, and visited in a few rounds. Here means in this
process, so with this machine as its own board (an sshd on the loopback address) the difference is the path alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from vitprune.model.timm import from_timm
from vitprune_deploy.latency.pieces import TOKENS, PieceFiles
from vitprune_deploy.latency.protocol import measure
from vitprune_deploy.latency.wholes import onnxruntime_loader, subject
from vitprune_deploy.remote.board import board
from vitprune_deploy.remote.device import Device, Here

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True)
    parser.add_argument("--parts", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, there = from_timm("deit_small_patch16_224").model, board(options.host)
    with tempfile.TemporaryDirectory() as folder:
        files = PieceFiles(model, Path(folder), 1, "fp32", "onnxruntime")
        paths = [files.mlp(8 * (number + 1)) for number in range(options.parts)]
        print(f"{options.parts} parts, {ROUNDS} rounds each, {options.threads} threads; seconds")
        for repeat in range(options.repeats):
            for name, device in (("here", Here()), ("there", there)):
                loading, visiting = timed(device, paths, options.threads)
                print(f"{name}, time {repeat + 1}: {loading:.2f} to load, {visiting:.2f} to visit")


def timed(device: Device, paths: list[Path], threads: int) -> tuple[float, float]:
    """Seconds that loading the parts and that visiting them takes."""
    load = onnxruntime_loader(threads, None, partial(device.load, "onnxruntime"))
    begun = time.monotonic()
    subjects: list[Any] = [subject(path.stem, path, load, {TOKENS.name: 197}) for path in paths]
    loaded = time.monotonic()
    measure(subjects, subjects[-1], relative_half_width=1e-9, max_rounds=ROUNDS)
    return loaded - begun, time.monotonic() - loaded


if __name__ == "__main__":
    main()
