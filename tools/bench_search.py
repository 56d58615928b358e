"""Seconds and peak memory of the exact search at the sizes that the project promises; losses and times are made up.

    python tools/bench_search.py [--blocks 12 --heads 7 --mlp 13 --tokens 16] [--speedup 3] [--slack 0.002]

Without sizes: 12 blocks x 7 x 13 x 16 (promised: 2 s) and 40 x 25 x 17 x 24 (20 s, 1 GiB), a process each.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np

from vitprune.search.choices import Block, Choice, Either, Move, Stay
from vitprune.search.solver import solve

SIZES = ((12, 7, 13, 16), (40, 25, 17, 24))  # blocks, heads, MLP widths, token levels; heads and widths with their 0


def made_up(blocks: int, heads: int, widths: int, levels: int) -> list[Block]:
    """Blocks whose times fall with tokens, heads and width, and whose losses rise with what is gone."""
    rng = np.random.default_rng(0)
    tokens = np.linspace(1, 0.25, levels)

    def half(count: int, most_ms: float) -> list[list[Choice]]:
        kept = np.linspace(1, 0, count)
        loss = np.cumsum(np.concatenate([[0], rng.exponential(0.02, count - 1)])) * rng.exponential(1)
        ms = tokens[:, None] * (0.2 + 0.8 * kept) * (kept > 0) * most_ms * rng.uniform(0.98, 1.02, (levels, count))
        return [[Choice(float(loss[j]), float(row[j]), count - 1 - j) for j in range(count)] for row in ms]

    made: list[Block] = []
    for _ in range(blocks):
        curve = np.cumsum(np.concatenate([[0], rng.exponential(0.01, levels - 1)]))
        steps = {
            (i, j): Choice(float(curve[j] - curve[i]), 0.2 * tokens[i], j)
            for i in range(levels)
            for j in range(i + 1, levels)
        }
        attention = half(heads, 1.9)
        rest = [Stay([row[:-1] for row in attention]), Move(steps)]
        made.append([Either([rest, [Stay([row[-1:] for row in attention])]]), Stay(half(widths, 2.7))])
    return made


def one(sizes: tuple[int, int, int, int], speedup: float, slack: float) -> None:
    blocks, constant = made_up(*sizes), [0.8] * sizes[3]
    dense = 0.8 + 4.6 * sizes[0]
    budgets = np.linspace(dense / speedup, dense, 10)
    begun, busy = time.perf_counter(), time.process_time()
    frontier = solve(blocks, constant, [float(ms) for ms in budgets], slack=slack)
    solved, busy = time.perf_counter() - begun, time.process_time() - busy
    found = [frontier.best(float(ms)) for ms in budgets]
    answered = time.perf_counter() - begun - solved
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{' x '.join(map(str, sizes))}: {solved:.2f} s ({busy:.2f} s of processor), "
        f"10 budgets read off in {answered:.2f} s, peak {peak:.0f} MiB, "
        f"bucket {frontier.bucket_ms * 1000:.3f} us, roundings at most {100 * frontier.slack_ms / budgets[0]:.3f}% of "
        f"the smallest budget ({budgets[0]:.1f} of {dense:.1f} ms, loss {found[0].loss:.3f}), "
        f"{len(frontier.points())} points"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("blocks", "heads", "mlp", "tokens"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--speedup", type=float, default=3.0, help="of the smallest budget against the dense model")
    parser.add_argument("--slack", type=float, default=0.002, help="share of the smallest budget lost to rounding")
    given = parser.parse_args()
    asked = (given.blocks, given.heads, given.mlp, given.tokens)
    if all(asked):
        one(asked, given.speedup, given.slack)
        return
    for sizes in SIZES:  # a process each, so that the peaks are their own
        flags = [f"--{name}={size}" for name, size in zip(("blocks", "heads", "mlp", "tokens"), sizes, strict=True)]
        rest = [f"--speedup={given.speedup}", f"--slack={given.slack}"]
        subprocess.run([sys.executable, __file__, *flags, *rest], check=True)


if __name__ == "__main__":
    main()
