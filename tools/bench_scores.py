"""Time and memory of every score on one model: ``python tools/bench_scores.py [MODEL] [--criteria obs nvit ...]``.

Random weights and images: neither matters for the time. Each score runs in a process of its own, and its peak is that
of the whole process, torch, weights and images included. Wall seconds and processor seconds are printed: on a busy
machine the latter over the number of threads is what a quiet one would take. Obs makes compensated weights at three
sizes, the others leave weights alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from vitprune import parts
from vitprune.model.timm import from_timm
from vitprune.search.losses import Sizes, load_criterion, rank_units


def main() -> None:
    options = _arguments()
    if options.one:
        print(json.dumps(scored(options.model, options.one, options.images)))
        return
    print(f"| score | wall s | processor s | peak GiB |\n|{' --- |' * 4}")
    for name in options.criteria:
        command = [sys.executable, __file__, options.model, "--images", str(options.images), "--one", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr}")
        found = json.loads(done.stdout)
        print(f"| `{name}` | {found['wall']:.0f} | {found['processor']:.0f} | {found['gib']:.2f} |", flush=True)
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    threads = torch.get_num_threads()
    print(f"{options.model}, {options.images} images, torch {torch.__version__}, {threads} threads, load {load}")


def scored(name: str, criterion: str, images: int) -> dict[str, Any]:
    """What one score took."""
    torch.manual_seed(0)
    model = from_timm(name).model.eval()
    config = model.config
    pictures = torch.randn(images, config.channels, *config.image_size)
    heads, units = max(b.heads for b in config.blocks), max(b.mlp for b in config.blocks)
    sizes = Sizes((heads, heads // 2), (units, units * 3 // 4, units // 2, units // 4))
    if load_criterion(criterion).whole_blocks:
        sizes = Sizes((heads, 0), (units, 0))
    began, processor = time.perf_counter(), time.process_time()
    rank_units(model, pictures, criterion, sizes)
    return {
        "wall": time.perf_counter() - began,
        "processor": time.process_time() - processor,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="deit_small_patch16_224")
    parser.add_argument("--criteria", nargs="+", default=parts.names("vitprune.criteria"))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
