"""How long the latency table of a model takes, and how narrow its intervals are.

python tools/bench_table.py --model deit_small_patch16_224 --batch 1 --threads 2
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from bench_prediction import request_for
from vitprune.model.timm import from_timm
from vitprune_deploy.latency.fingerprint import machine_state
from vitprune_deploy.latency.table import measure_table
from vitprune_deploy.latency.wholes import onnxruntime_loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm architecture")
    parser.add_argument("--model-args", type=json.loads, default={}, help="further timm arguments, as JSON")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--provider", default="cpu", help="onnxruntime's execution provider")
    parser.add_argument("--method", default="evit")
    parser.add_argument("--seconds", type=float, default=240.0)
    options = parser.parse_args()
    model = from_timm(options.model, **options.model_args).model.eval()
    request = request_for(model, options.batch, options.threads, options.method, options.seconds)
    phases: dict[str, float] = {}
    begun = time.monotonic()

    def note(done: int, total: int, what: str) -> None:
        phases["exporting" if done <= 600 else "parts" if done <= 800 else "whole models"] = time.monotonic() - begun

    with tempfile.TemporaryDirectory() as work:
        result = measure_table(
            model,
            request,
            onnxruntime_loader(options.threads, {"provider": options.provider}),
            Path(work),
            progress=note,
        )
    seconds = time.monotonic() - begun
    widths = [100 * piece.half_width for piece in result.pieces]
    wholes = [whole.measurement for whole in result.wholes]
    print(f"{options.model}, batch {options.batch}, {options.threads} threads: {seconds:.1f} s; ended: "
          + ", ".join(f"{name} {end:.1f} s" for name, end in phases.items()))  # fmt: skip
    print(f"{len(widths)} parts of {len(result.table.attn) + len(result.table.mlp)} half blocks and more measured")
    print(f"half widths of parts: median {np.median(widths):.1f}%, largest {np.max(widths):.1f}%; "
          f"{sum(p.unstable for p in result.pieces)} unstable, gated: {result.pieces[0].gated}")  # fmt: skip
    for one in wholes:
        print(f"{one.name:>8} {one.value_ms:9.3f} ms +-{100 * one.half_width:.1f}%, {one.rounds} rounds")
    print(
        f"correction {result.table.correction}, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
    )
    print(machine_state())


if __name__ == "__main__":
    main()
