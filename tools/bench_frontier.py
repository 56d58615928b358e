"""The joint search against tokens only, heads and MLP only, and Torch-Pruning, at the same measured latency.

    python tools/bench_frontier.py --out /tmp/frontier
    python tools/bench_frontier.py --out /tmp/frontier --checkpoint model.safetensors --speedups 2

Nothing is trained. Every method is tuned on the profile's calibration images alone and judged on the whole test set;
every engine is exported by the same exporter (``vitprune_deploy.export.onnx``: torch.onnx with dynamo), at the budget's
batch. In the end all engines of a speed-up are timed again, interleaved with the dense one. Finished rows stay in
OUT/rows.jsonl: run it again after an interruption. OUT can be a new folder or that of an earlier run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import _torch_pruning
from _common import Ratio, Rows, export, noise, open_profile, right, searched, settings_of, timed
from _one_number import Family, Tuner
from vitprune import parts
from vitprune.model.vit import fingerprint
from vitprune.plan import BlockPlan, Plan
from vitprune.search.counts import TokenMethod
from vitprune.surgery import prune
from vitprune.tokens.base import Reducer
from vitprune_deploy.build.bench import Bench
from vitprune_deploy.build.make import slim_model
from vitprune_deploy.build.sizes import sizes
from vitprune_deploy.latency.fingerprint import machine_state
from vitprune_deploy.validate import Paired, Share

OURS = {"joint": [], "heads and MLP": ["prune.tokens.method=none"]}
TOKEN_SHARES = (0.2, 0.45, 0.7, 1.0)  # surveyed: of the largest share that one application can remove


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quickstart")
    parser.add_argument("--checkpoint", type=Path, help="weights in place of the profile's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as vitprune-deploy takes it")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, for one interleaved measurement")
    parser.add_argument("--loss-images", type=int, help="calibration images to tune baselines on (default: all)")
    options = parser.parse_args()
    Frontier(options).run()


class Frontier:
    """All rows of the table. Each method and speed-up is one, and so is each survey and each final measurement."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out.resolve()
        self.overrides = list(options.set)
        if options.checkpoint:
            self.overrides.append(f"model.checkpoint={options.checkpoint.resolve()}")
        self.out.mkdir(parents=True, exist_ok=True)
        profile = open_profile(options.profile, self.overrides, options.speedups[0])
        self.rows = Rows(self.out / "rows.jsonl", settings_of(profile, loss_images=options.loss_images))
        self.engines = self.out / self.rows.key  # so that engines of other settings are never mixed in
        self.engines.mkdir(exist_ok=True)

    def run(self) -> None:
        self.bench = self._search("joint", self.options.speedups[0], until="images")
        self.dense = self.engines / "dense.onnx"
        self.tuner = Tuner(self.bench, self.dense, self.engines, self.options.loss_images, self.options.seconds)
        dense = self.rows.get("dense", lambda: self._judged(export_to(self.bench.dense, self.dense, self.bench)))
        baselines: dict[str, Callable[[], list[Family]]] = {
            "tokens only": partial(token_families, self.bench),
            "Torch-Pruning": partial(_torch_pruning.families, self.bench),
        }
        for speedup in self.options.speedups:
            for method in OURS:
                self.rows.get(f"{method} {speedup:g}x", partial(self._ours, method, speedup))
            for method, families in baselines.items():
                self.rows.get(f"{method} {speedup:g}x", partial(self._baseline, method, families, speedup))
            methods = ["joint", "heads and MLP", *baselines]
            self.rows.get(f"times {speedup:g}x", partial(self._times, methods, speedup))
        print(f"\ndense: top-1 {dense['top1']:.2f}% of {dense['images']} test images; {machine_state()}")
        for speedup in self.options.speedups:
            self._print(methods, speedup)

    def _search(self, method: str, speedup: float, until: str = "search") -> Bench:
        profile = open_profile(self.options.profile, [*self.overrides, *OURS[method]], speedup)
        return searched(profile, self.out / method.replace(" ", "-"), until)

    def _ours(self, method: str, speedup: float) -> dict[str, Any]:
        """A row of our own search, not recovered."""
        bench = self._search(method, speedup)
        found, (slim, _) = bench.json("search", "search.json"), slim_model(bench)
        path = export_to(slim, self.engines / f"{method} {speedup:g}x.onnx", bench)
        how = f"{found['status']}, {found['method'] or 'no token method'}"
        return {"how": how, "counts": found["chosen"]["counts"], **self._judged(path)}

    def _baseline(self, method: str, families: Callable[[], list[Family]], speedup: float) -> dict[str, Any]:
        """A row of a baseline: the best of its families, at the share that lands."""
        print(f"{method}, {speedup:g}x", flush=True)
        made = families()
        curves = self.rows.get(f"survey of {method}", lambda: {"curves": self.tuner.survey(made)})["curves"]
        points = {name: [(share, time) for share, time in curve] for name, curve in curves.items()}
        landed = self.tuner.land(made, points, 1 / speedup, f"{method} {speedup:g}x")
        if landed is None:
            fastest = max(1 / time for curve in points.values() for _, time in curve)
            return {"file": None, "how": f"not reached; the fastest one surveyed makes {fastest:.2f}x"}
        how = f"{landed.family}, share {landed.share:.3f}, calibration loss {landed.loss:.3f}"
        return {"how": how, **self._judged(landed.path)}

    def _judged(self, path: Path) -> dict[str, Any]:
        """The engine's accuracy on the whole test set; which images are right is kept beside it."""
        answers = right(self.bench, path)
        np.save(path.with_suffix(".npy"), answers)
        return {"file": path.name, "top1": 100 * float(answers.mean()), "images": len(answers)}

    def _times(self, methods: Sequence[str], speedup: float) -> dict[str, Any]:
        """All engines of a speed-up and the dense one, interleaved, with rounds that no method was tuned on."""
        files = {m: self.rows.rows[f"{m} {speedup:g}x"]["file"] for m in methods}
        paths = {"dense": self.dense} | {m: self.engines / file for m, file in files.items() if file}
        found = timed(paths, self.bench.profile, self.bench.profile.seed + 1000, self.options.seconds)
        ratios = {one.name: Ratio.of(found[0], one) for one in found[1:]}
        unstable = [one.name for one in found if one.unstable]
        circumstances = {"unstable": unstable, "noise": noise(found), "machine": machine_state()}
        return {"ratios": ratios, "dense_ms": found[0].value_ms, **circumstances}

    def _print(self, methods: Sequence[str], speedup: float) -> None:
        times = self.rows.rows[f"times {speedup:g}x"]
        print(f"\n{speedup:g}x (dense {times['dense_ms']:.2f} ms; {times['noise']}; {times['machine']})")
        print(f"{'method':14} {'speed-up':>8} {'95%':>13} {'top-1':>6} {'95%':>15}  joint better by (points, 95%)")
        joint = np.load((self.engines / f"joint {speedup:g}x.onnx").with_suffix(".npy"))
        for method in methods:
            row = self.rows.rows[f"{method} {speedup:g}x"]
            if not row["file"]:
                print(f"{method:14} {row['how']}")
                continue
            ratio, answers = Ratio(*times["ratios"][method]), np.load((self.engines / row["file"]).with_suffix(".npy"))
            share = Share.of(int(answers.sum()), len(answers))
            line = f"{method:14} {ratio.value:8.3f} [{ratio.low:.3f},{ratio.high:.3f}] {share.percent:6.2f}"
            line += f" [{share.low:6.2f},{share.high:6.2f}]  {'' if method == 'joint' else compared(joint, answers)}"
            print(f"{line}  ({row['how']}{'; time unstable' if method in times['unstable'] else ''})")


def compared(joint: np.ndarray, other: np.ndarray) -> str:
    """The paired difference, and what it says."""
    paired = Paired.of(joint, other)
    verdict = "better" if paired.low > 0 else "WORSE" if paired.high < 0 else "no difference"
    return f"{paired.drop:+.2f} [{paired.low:+.2f},{paired.high:+.2f}] {verdict}, p {paired.p_value:.2g}"


def export_to(model: nn.Module, path: Path, bench: Bench) -> Path:
    return export(model, path, bench.profile, (bench.dense.config.channels, *bench.dense.config.image_size))


def token_families(bench: Bench) -> list[Family]:
    """Uniform schedules: the same share removed at each of a few usual blocks, for each token method."""
    depth, patches = len(bench.dense.config.blocks), bench.dense.config.patches
    usual = {
        "quarters": (depth // 4, depth // 2, 3 * depth // 4),  # as EViT and DynamicViT place them
        "thirds from the first": (0, depth // 3, 2 * depth // 3),
        "second and middle": (1, depth // 2),
        "all but the last": tuple(range(depth - 1)),  # as ToMe
    }
    found = []
    for method in bench.token_methods():
        fewest = TokenMethod.of(method.name, parts.load("vitprune.tokens", method.name, Reducer)).fewest
        most = 1 - fewest(patches, bench.dense.config.prefix) / patches
        shares = tuple(share * most for share in TOKEN_SHARES)
        for name, blocks in usual.items():
            make = partial(reduced, bench, method.name, fewest, frozenset(blocks))
            found.append(Family(f"{method.name}, {name}", make, shares))
    return found


def reduced(bench: Bench, method: str, fewest: Callable[[int, int], int], cuts: frozenset[int], share: float) -> Any:
    """The dense model with ``share`` of its patch tokens removed at each block of ``cuts``.

    Its last block is computed for the class token alone, where those of the searched plans are.
    """
    config, made = bench.dense.config, []
    exact, left = float(config.patches), config.patches
    for number, block in enumerate(config.blocks):
        out = None
        if number in cuts:
            exact = max(1.0, exact * (1 - share))
            out = max(round(exact), fewest(left, config.prefix))
            left, exact = out, max(exact, float(out))
        if number + 1 == len(config.blocks) and 0 in sizes(bench).patches:
            out = 0
        made.append(BlockPlan(tuple(range(block.heads)), tuple(range(block.mlp)), out))
    return prune(bench.dense, Plan(fingerprint(bench.dense), config.patches, method, tuple(made)))


if __name__ == "__main__":
    main()
