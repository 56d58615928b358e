"""How well a latency table predicts whole models: random plans of a model's shapes, predicted and measured.

    python tools/bench_prediction.py --model deit_small_patch16_224 --batch 1 8 --threads 2

Weights are random: latency does not depend on their values. Prints one row for each plan and the errors in the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vitprune import parts
from vitprune.model.timm import from_timm
from vitprune.search.counts import TokenMethod
from vitprune.search.problem import ladder, multiples
from vitprune.tokens.base import Reducer
from vitprune_deploy.latency.fingerprint import machine_state
from vitprune_deploy.latency.table import Request, Result, make_levels, measure_table
from vitprune_deploy.latency.wholes import export_whole, measure_models, onnxruntime_loader, random_counts, slim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm architecture")
    parser.add_argument("--model-args", type=json.loads, default={}, help="further timm arguments, as JSON")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--provider", default="cpu", help="onnxruntime's execution provider")
    parser.add_argument("--method", default="evit", help="token method of the random plans")
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=240.0, help="for the table, and again for the plans")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    model = from_timm(options.model, **options.model_args).model.eval()
    for batch in options.batch:
        with tempfile.TemporaryDirectory() as work:
            run(model, batch, options, Path(work))


def request_for(model: Any, batch: int, threads: int, method: str, seconds: float) -> Request:
    """A table of the sizes that a profile would ask for by default."""
    config, block = model.config, model.config.blocks[0]
    kind: Any = Reducer
    return Request(
        batch=batch,
        threads=threads,
        tokens=ladder(config.patches, 16, max(1, config.patches // 16)),
        heads=multiples(block.heads, 1, 1),
        mlp=multiples(block.mlp, max(8, block.mlp // 12), 1),
        methods=(TokenMethod.of(method, parts.load("vitprune.tokens", method, kind)),),
        seconds=seconds,
    )


def run(model: Any, batch: int, options: argparse.Namespace, work: Path) -> None:
    """One batch size: the table, the plans, and how they compare."""
    request = request_for(model, batch, options.threads, options.method, options.seconds)
    load, begun = onnxruntime_loader(options.threads, {"provider": options.provider}), time.monotonic()
    result = measure_table(model, request, load, work)
    seconds = time.monotonic() - begun
    levels, rng = make_levels(model.config, request), np.random.default_rng(options.seed)
    depth = len(model.config.blocks)
    plans = [
        result.wholes[0].counts,
        *(random_counts(levels, depth, request.method, rng) for _ in range(options.plans)),
    ]
    paths = {
        name: export_whole(slim(model, counts, request.method), work / f"plan_{name}.onnx", batch=batch)
        for name, counts in zip(["dense", *map(str, range(options.plans))], plans, strict=True)
    }
    measured = measure_models(paths, load, batch=batch, max_seconds=options.seconds, seed=options.seed)
    print(f"\n{options.model}, batch {batch}, {options.threads} threads, table in {seconds:.0f} s, {machine_state()}")
    print_errors(result, request, plans, measured)


def print_errors(result: Result, request: Request, plans: list[Any], measured: list[Any]) -> None:
    """Predicted against measured, at the speed that the machine had when the table was measured."""
    table, dense_ms = result.table, result.wholes[0].measurement.value_ms
    scale = dense_ms / measured[0].value_ms
    a, b, kappa = table.correction
    print(f"a {a:.3f} ms, b {b:.3f}, kappa {kappa:.4f} ms/MB; dense {dense_ms:.2f} ms")
    print(f"{'plan':>6} {'measured':>9} {'+-%':>5} {'gated':>5} {'predicted':>9} {'error %':>8} {'bare sum %':>10}")
    errors = []
    for counts, one in zip(plans, measured, strict=True):
        real, guess = one.value_ms * scale, table.predict_ms(counts, request.method)
        bare = 100 * (table.sum_ms(counts, request.method) / real - 1)
        error = 100 * (guess / real - 1)
        errors.append(abs(error))
        row = f"{one.name:>6} {real:9.3f} {100 * one.half_width:5.1f} {one.gated!s:>5} {guess:9.3f} {error:8.2f}"
        print(f"{row} {bare:10.2f}{'  unstable' if one.unstable else ''}")
    print(f"random plans: mean error {np.mean(errors[1:]):.2f}%, maximum {np.max(errors[1:]):.2f}%")


if __name__ == "__main__":
    main()
