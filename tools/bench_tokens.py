"""Every token method by itself on a profile's model and data: its counts searched at a measured speed-up.

    python tools/bench_tokens.py --out /tmp/tokens
    python tools/bench_tokens.py --out /tmp/tokens --methods evit tome --speedups 2 --set recover.max_seconds=60

Heads, MLP width and depth stay as they are. Each method is judged as it comes out of the search, and once more after
the recovery training of the profile, the same for all; engines of a speed-up are timed again, interleaved with the
dense one. Finished rows stay in OUT/rows.jsonl: run it again after an interruption.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from _common import Ratio, Rows, answered, export, noise, open_profile, searched, settings_of, timed
from vitprune import parts
from vitprune_deploy.build.bench import Bench
from vitprune_deploy.build.make import slim_model
from vitprune_deploy.latency.fingerprint import machine_state

TOKENS_ONLY = ["prune.heads.enabled=false", "prune.mlp.enabled=false", "prune.depth.enabled=false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quickstart")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as vitprune-deploy takes it")
    parser.add_argument("--methods", nargs="+", default=parts.names("vitprune.tokens"))
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, for one interleaved measurement")
    Tokens(parser.parse_args()).run()


class Tokens:
    """All rows of the table."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        profile = open_profile(options.profile, options.set, options.speedups[0])
        self.rows = Rows(self.out / "rows.jsonl", settings_of(profile))
        self.engines = self.out / self.rows.key  # so that engines of other settings are never mixed in
        self.engines.mkdir(exist_ok=True)

    def run(self) -> None:
        bench = self._built(self.options.methods[0], self.options.speedups[0], "images")
        dense = self.rows.get("dense", lambda: self._judged(bench, bench.dense, "dense"))
        for speedup in self.options.speedups:
            names = []
            for method in self.options.methods:
                names += [f"{method} {speedup:g}x", f"{method} {speedup:g}x trained"]
                self.rows.get(names[-2], partial(self._searched, method, speedup, names[-2]))
                self.rows.get(names[-1], partial(self._trained, method, speedup, names[-1]))
            self.rows.get(f"times {speedup:g}x", partial(self._times, bench, names, speedup))
            self._print(dense, names, speedup)

    def _built(self, method: str, speedup: float, until: str) -> Bench:
        overrides = [*self.options.set, *TOKENS_ONLY, f"prune.tokens.method={method}"]
        return searched(open_profile(self.options.profile, overrides, speedup), self.out / method, until)

    def _searched(self, method: str, speedup: float, name: str) -> dict[str, Any]:
        bench = self._built(method, speedup, "search")
        found, (slim, _) = bench.json("search", "search.json"), slim_model(bench)
        predicted = found["chosen"]["predicted_ms"] / found["dense_predicted_ms"]
        counts = found["chosen"]["counts"]["patches"]
        how = {"status": found["status"], "patches": counts, "predicted": predicted}
        return {**how, **self._judged(bench, slim, name)}

    def _trained(self, method: str, speedup: float, name: str) -> dict[str, Any]:
        bench = self._built(method, speedup, "recover")
        return self._judged(bench, bench.pruned, name)

    def _judged(self, bench: Bench, model: nn.Module, name: str) -> dict[str, Any]:
        """The model's engine on the whole test set."""
        shape = (bench.dense.config.channels, *bench.dense.config.image_size)
        path = export(model, self.engines / f"{name}.onnx", bench.profile, shape)
        answers, labels = answered(bench, path)
        first = self.rows.rows.get("dense", {"answers": answers.tolist()})["answers"]
        agreement = 100 * float((answers == first).mean())
        kept = {"answers": answers.tolist()} if name == "dense" else {}
        return {"top1": 100 * float((answers == labels).mean()), "agreement": agreement, "images": len(labels), **kept}

    def _times(self, bench: Bench, names: list[str], speedup: float) -> dict[str, Any]:
        """The searched engines and the dense one, interleaved; training changes no time."""
        untrained = [name for name in names if not name.endswith("trained")]
        paths = {name: self.engines / f"{name}.onnx" for name in ["dense", *untrained]}
        found = timed(paths, bench.profile, bench.profile.seed + 1000, self.options.seconds)
        ratios = {one.name: Ratio.of(found[0], one) for one in found[1:]}
        return {"ratios": ratios, "dense_ms": found[0].value_ms, "noise": noise(found), "machine": machine_state()}

    def _print(self, dense: dict[str, Any], names: list[str], speedup: float) -> None:
        times = self.rows.rows[f"times {speedup:g}x"]
        print(f"\n{speedup:g}x: dense {dense['top1']:.2f}% of {dense['images']} images, {times['dense_ms']:.2f} ms; "
              f"{times['noise']}; {times['machine']}")  # fmt: skip
        print(f"{'method':20} {'speed-up':>8} {'95%':>13} {'predicted':>9} {'top-1':>6} {'agrees':>6} {'trained':>7}")
        for name, trained in zip(names[::2], names[1::2], strict=True):
            row, after, ratio = self.rows.rows[name], self.rows.rows[trained], Ratio(*times["ratios"][name])
            line = f"{name:20} {ratio.value:8.3f} [{ratio.low:.3f},{ratio.high:.3f}] {1 / row['predicted']:9.3f}"
            line += f" {row['top1']:6.2f} {row['agreement']:6.2f} {after['top1']:7.2f}"
            print(f"{line}  ({row['status']}, {row['patches']})")


if __name__ == "__main__":
    main()
