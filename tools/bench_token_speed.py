"""How much of the arithmetic that a token method saves shows as time: its speed-up over its ratio of MACs.

    python tools/bench_token_speed.py --model deit_small_patch16_224 --batch 1 8 --threads 2

Weights are random: latency does not depend on their values. All engines of a batch size are measured interleaved with
the dense one. Counts are those of a published schedule; the last block is computed for all tokens, as there, and what
it saves to compute it for the class token alone has a row of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from _common import Ratio
from vitprune import parts
from vitprune.macs import macs
from vitprune.model.timm import from_timm
from vitprune.surgery import dense_plan, prune, reduce_tokens
from vitprune.tokens.base import Reducer
from vitprune_deploy.latency.fingerprint import machine_state
from vitprune_deploy.latency.wholes import export_whole, measure_models, onnxruntime_loader

KEEPING = {3: 138, 6: 97, 9: 68}  # of methods without a published schedule
LIKE = 3.0e9  # MACs of DeiT-S under EViT and DynamicViT at 0.7: of each method, the schedule that comes nearest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm architecture")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--provider", default="cpu", help="onnxruntime's execution provider")
    parser.add_argument("--seconds", type=float, default=120.0, help="at most, for one batch size")
    options = parser.parse_args()
    dense = from_timm(options.model).model.eval()
    whole = dense_plan(dense)
    last = replace(whole, blocks=(*whole.blocks[:-1], replace(whole.blocks[-1], patches=0)))
    models = {"dense": dense, "dense, last block for class token": prune(dense, last)}
    for name in parts.names("vitprune.tokens"):
        schedules = parts.load("vitprune.tokens", name, Reducer).schedules
        found = {s: reduce_tokens(dense, name, s) for s in schedules} or {"0.7": reduce_tokens(dense, name, KEEPING)}
        share = macs(dense.config) / 4.6e9 * LIKE
        schedule = min(found, key=lambda s: abs(macs(found[s].config) - share))
        models[f"{name} {schedule}"] = found[schedule]
    for batch in options.batch:
        run(models, batch, options)


def run(models: dict[str, object], batch: int, options: argparse.Namespace) -> None:
    """One batch size: every method's engine, interleaved."""
    load = onnxruntime_loader(options.threads, {"provider": options.provider})
    with tempfile.TemporaryDirectory() as work:
        paths = {
            name: export_whole(model, Path(work) / f"{number}.onnx", batch=batch)
            for number, (name, model) in enumerate(models.items())
        }
        found = measure_models(paths, load, batch=batch, max_seconds=options.seconds)
    whole = macs(models["dense"].config)
    print(f"\n{options.model}, batch {batch}, {options.threads} threads, {options.provider}, {machine_state()}")
    print(f"{'method':34} {'ms':>8} {'speed-up':>8} {'95%':>13} {'MACs':>6} {'share':>6}")
    for (name, model), one in zip(models.items(), found, strict=True):
        ratio, saved = Ratio.of(found[0], one), whole / macs(model.config)
        line = f"{name:34} {one.value_ms:8.2f} {ratio.value:8.3f} [{ratio.low:.3f},{ratio.high:.3f}] {saved:6.3f}"
        print(f"{line} {ratio.value / saved:6.3f}{'  unstable' if one.unstable else ''}")


if __name__ == "__main__":
    main()
