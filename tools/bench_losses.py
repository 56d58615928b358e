"""Time and memory of measuring losses: ``python tools/bench_losses.py [MODEL]``.

Random weights and images: neither matters for the time. Prints wall seconds and processor seconds per part; on a busy
machine the latter over the number of threads is what a quiet one would take. The peak is that of the whole process.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from vitprune.model.timm import from_timm
from vitprune.search.losses import Sizes, measure_losses


def main() -> None:
    args = _arguments()
    torch.manual_seed(0)
    model = from_timm(args.model).model.eval()
    config = model.config
    images = torch.randn(args.images, config.channels, *config.image_size)
    heads, units = max(b.heads for b in config.blocks), max(b.mlp for b in config.blocks)
    patches = [round(config.patches * 0.82**step) for step in range(1, 9)]
    sizes = Sizes(tuple(range(heads + 1)), tuple(round(units * step / 12) for step in range(13)), tuple(patches))

    clock = _Clock()
    with tempfile.TemporaryDirectory() as store:
        measure_losses(
            model,
            images,
            sizes,
            criterion=args.criterion,
            token_method=args.tokens,
            probes=args.probes,
            progress=clock.progress,
            store=Path(store) if args.store else None,
        )
    clock.print()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    print(f"peak RSS {peak:.2f} GiB; {args.model}, {args.images} images, {args.probes} probes")
    print(f"{args.criterion}, {args.tokens} at {patches}; heads {sizes.heads}, units {sizes.mlp}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {load}")


PARTS = {
    "attn ranked": "moments, heads ranked",
    "mlp ranked": "units ranked",
    "attn units": "KL of fewer heads",
    "mlp units": "KL of fewer units",
    "patches": "KL of fewer tokens",
}


class _Clock:
    """Seconds between two reports of progress, by what the later one was about."""

    def __init__(self) -> None:
        self.last = self._now()
        self.first = self.last
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def progress(self, done: int, total: int, what: str) -> None:
        now = self._now()
        part = next((name for key, name in PARTS.items() if key in what), what)
        for i, seconds in enumerate((now[0] - self.last[0], now[1] - self.last[1], 1)):
            self.spent[part][i] += seconds
        self.last = now

    def print(self) -> None:
        for part, (wall, processor, steps) in self.spent.items():
            print(f"{part:<24} {wall:7.1f} s wall {processor:7.1f} s processor {steps:5.0f} steps")
        wall, processor = (last - first for last, first in zip(self.last, self.first, strict=True))
        print(f"{'all':<24} {wall:7.1f} s wall {processor:7.1f} s processor")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="deit_small_patch16_224")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--probes", type=int, default=64)
    parser.add_argument("--criterion", default="obs")
    parser.add_argument("--tokens", default="evit", help="token method")
    parser.add_argument("--store", action="store_true", help="keep compensated weights on disk")
    return parser.parse_args()


if __name__ == "__main__":
    main()
