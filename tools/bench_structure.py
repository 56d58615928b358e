"""Every score, and every learned method, at the same measured speed-ups of one model: as it comes, and trained.

    python tools/bench_structure.py --out /tmp/structure
    python tools/bench_structure.py --out /tmp/structure --scores random obs taylor/greedy --speedups 2 --one-shot

A score is a criterion of ``vitprune/criteria`` with the exact allocation, or ``criterion/allocation``; no tokens are
removed. Each plan is landed on this device as a build lands it, and each engine is judged on the whole test set, also
against random's on the same images. Learned methods train for --learning steps first. Finished rows stay in
OUT/rows.jsonl: run it again after an interruption. They are written as a page of the documentation with --page
vitprune/criteria/COMPARISON.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from _common import Rows, export, noise, open_profile, right, searched, settings_of, timed
from vitprune import parts
from vitprune.macs import macs
from vitprune.model.vit import Vit
from vitprune.search.counts import Counts
from vitprune.search.latency import LatencyTable
from vitprune_deploy.build.bench import Bench, load_vit, save_vit
from vitprune_deploy.build.make import slim_model
from vitprune_deploy.build.sizes import dense_counts
from vitprune_deploy.build.training import train
from vitprune_deploy.latency.fingerprint import device_fingerprint, machine_state
from vitprune_deploy.profile.checks import DIM_METHODS
from vitprune_deploy.validate import Paired

PUBLISHED = ["savit/savit", "nvit/nvit", "taylor/global", "taylor/per_kind", "taylor/uniform", "taylor/greedy"]
BLOCKS_ALONE = ["prune.heads.enabled=false", "prune.mlp.enabled=false"]
STATES = ("as it comes", "trained")
TABLE, RETIMED = "latency_table.json", "times.json"
SHORT = [
    "prune.tokens.method=none",
    "prune.tokens.levels=2",
    "measure.max_seconds=40",
    "search.evaluations=24",
    "search.max_seconds=10",
    "recover.max_steps={recovery}",
    "recover.max_seconds=3600",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quickstart")
    parser.add_argument("--scores", nargs="*", default=[*map(usual, parts.names("vitprune.criteria")), *PUBLISHED])
    parser.add_argument("--learned", nargs="*", default=parts.names("vitprune.structure"))
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0])
    parser.add_argument("--recovery", type=int, default=400, help="steps of training")
    parser.add_argument("--learning", type=int, default=600, help="steps in which a method learns")
    parser.add_argument("--one-shot", action="store_true", help="train nothing")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as vitprune-deploy takes it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--retime", type=float, metavar="SECONDS", help="time all finished engines again, in one run")
    parser.add_argument("--page", type=Path, help="where to write all finished rows as Markdown")
    options = parser.parse_args()
    comparison = Comparison(options)
    comparison.run()
    if options.retime:
        comparison.retime(options.retime)
    text = comparison.page()
    print(f"\n{text}")
    if options.page:
        options.page.write_text(text, encoding="utf-8")


def usual(criterion: str) -> str:
    """A criterion as it is compared: one that ranks whole blocks knows nothing of the halves that are searched."""
    return "bi/global" if criterion == "bi" else criterion


class Comparison:
    """All rows. What was pruned, its engine and its answers are kept under the row's name."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out.resolve()
        self.overrides = [*(text.format(recovery=options.recovery) for text in SHORT), *options.set]
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows = Rows(self.out / "rows.jsonl", settings_of(self._profile(2.0, []), learning=options.learning))
        self.kept = self.out / self.rows.key  # so that engines of other settings are never mixed in
        self.kept.mkdir(exist_ok=True)

    def run(self) -> None:
        for name in [*self.options.scores, *(f"{name}/learned" for name in self.options.learned)]:
            for speedup in self.options.speedups:
                first = self.rows.get(f"{name} {speedup:g}x {STATES[0]}", partial(self._pruned, name, speedup))
                print(line(first), flush=True)
                if not self.options.one_shot:
                    again = partial(self._trained, name, speedup, first)
                    print(line(self.rows.get(f"{name} {speedup:g}x {STATES[1]}", again)), flush=True)

    def _profile(self, speedup: float, more: list[str]) -> Any:
        return open_profile(self.options.profile, [*self.overrides, *more], speedup)

    def _bench(self, speedup: float, more: list[str], until: str) -> Bench:
        """The product's own pipeline, in one folder for all rows: the table is measured once."""
        return searched(self._profile(speedup, more), self.out / "work", until)

    def _pruned(self, name: str, speedup: float) -> dict[str, Any]:
        """A row as it comes: of a score not trained, of a learned method with the weights that it learned beside."""
        bench = self._bench(speedup, self._overrides(name), "search")
        found, slim = bench.json("search", "search.json"), slim_model(bench)[0]
        times = {"ms": found["chosen"]["measured_ms"], "dense_ms": found["dense_ms"]}
        table, counts = LatencyTable.from_dict(bench.json("measure", TABLE)), found["chosen"]["counts"]
        said = table.predict_ms(dense_counts(bench)) / table.predict_ms(Counts.from_dict(counts))
        return self._judged(f"{name} {speedup:g}x", bench, slim, {**times, "predicted": said, "how": found["status"]})

    def _overrides(self, name: str) -> list[str]:
        """What a profile says to get a score, or a learned method."""
        criterion, _, rule = name.partition("/")
        if rule == "learned":
            dims = ["prune.head_dims.enabled=true"] if criterion in DIM_METHODS else []
            return [f"prune.learned.method={criterion}", f"prune.learned.max_steps={self.options.learning}", *dims]
        more = [f"prune.criterion={criterion}", f"prune.allocation={rule or 'exact'}"]
        return more + (BLOCKS_ALONE if criterion == "bi" else [])

    def _trained(self, name: str, speedup: float, first: dict[str, Any]) -> dict[str, Any]:
        """The same plan after the short training; its latency is that of the same graph."""
        bench, row = self._bench(speedup, [], "images"), f"{name} {speedup:g}x"
        folder = self.kept / f"{file_name(row)} training"
        folder.mkdir(exist_ok=True)
        train(bench, load_vit(self.kept, file_name(row)), folder)
        times = {key: first[key] for key in ("ms", "dense_ms", "predicted", "how")}
        return self._judged(f"{row} {STATES[1]}", bench, load_vit(folder, "model"), times)

    def _judged(self, row: str, bench: Bench, slim: Vit, known: dict[str, Any]) -> dict[str, Any]:
        """The accuracy of a pruned model's engine on the whole test set; which images are right is kept beside it."""
        answers = right(bench, self._engine(row, slim, bench))
        np.save(self.kept / f"{file_name(row)}.npy", answers)
        save_vit(slim, self.kept, file_name(row))
        config = slim.config
        return {
            "top1": 100 * float(answers.mean()),
            "macs": macs(config) / macs(bench.dense.config),
            "heads": [block.heads for block in config.blocks],
            "mlp": [block.mlp for block in config.blocks],
            "dims": [[block.qk_dim, block.v_dim] for block in config.blocks],
            **known,
            "machine": machine_state(),
        }

    def _engine(self, row: str, model: Vit, bench: Bench) -> Path:
        path = self.kept / f"{file_name(row)}.onnx"
        return export(model, path, bench.profile, (model.config.channels, *model.config.image_size))

    def retime(self, seconds: float) -> None:
        """All engines in one interleave with the dense one: rows that were landed hours apart compare."""
        bench = self._bench(2.0, [], "images")
        names = dict.fromkeys(plan_of(row) for row in self.rows.rows)
        paths = {"dense": self._engine("dense", bench.dense, bench)}
        paths |= {name: self.kept / f"{file_name(name)}.onnx" for name in names}
        dense, *found = timed(paths, bench.profile, bench.profile.seed, seconds)
        print(noise([dense, *found]))
        times = {name: dense.value_ms / one.value_ms for name, one in zip(names, found, strict=True)}
        (self.kept / RETIMED).write_text(json.dumps(times))

    def page(self) -> str:
        """All finished rows as Markdown, a table for each speed-up, best first."""
        device = device_fingerprint("onnxruntime", "cpu", 2)
        text = ABOUT.format(
            cpu=device["cpu"],
            cores=device["cores"],
            profile=self.options.profile,
            recovery=self.options.recovery,
            learning=self.options.learning,
            timed="in one run in which all engines take turns" if self._retimed else "as each of them was landed",
        )
        for speedup in self.options.speedups:
            rows = [row for row in self.rows.rows.values() if row["row"].split()[1] == f"{speedup:g}x"]
            text += f"\n## {speedup:g}x asked\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
            text += "".join(f"| {' | '.join(self._cells(row))} |\n" for row in ranked(rows))
            below = [row["row"] for row in ranked(rows) if self._gain(row)[1] <= 0]
            text += f"\nNot above random: {', '.join(map(short_name, below)) or 'none'}.\n"
        return text

    @cached_property
    def _retimed(self) -> dict[str, float]:
        """Speed-ups of ``retime``; none where that was not asked for."""
        path = self.kept / RETIMED
        return json.loads(path.read_text()) if path.is_file() else {}

    def _cells(self, row: dict[str, Any]) -> tuple[str, ...]:
        name, _, state = row["row"].split(maxsplit=2)
        criterion, _, rule = name.partition("/")
        gain, low, high = self._gain(row)
        against = "" if math.isnan(gain) else f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]{' no' if low <= 0 else ''}"
        speedup = self._retimed.get(plan_of(row["row"]), row["dense_ms"] / row["ms"])
        figures = f"{row['top1']:.2f}", f"{speedup:.2f}", f"{row['predicted']:.2f}"
        whole = max(dims for one in self.rows.rows.values() for dims in one["dims"])
        plan = shape(row, whole)
        return f"`{criterion}`", rule or "exact", state, *figures, f"{100 * row['macs']:.0f}", against, plan

    def _gain(self, row: dict[str, Any]) -> tuple[float, float, float]:
        """Points of top-1 above random's on the same images with their 95% interval; NaN of random, or without it."""
        _, speedup, state = row["row"].split(maxsplit=2)
        files = [self.kept / f"{file_name(answers_of(one))}.npy" for one in (f"random {speedup} {state}", row["row"])]
        if row["row"].startswith("random ") or not files[0].is_file():
            return math.nan, math.nan, math.nan
        found = Paired.of(*(np.load(file) for file in files))
        return -found.drop, -found.high, -found.low


def answers_of(row: str) -> str:
    """What the answers of a row are kept under."""
    return row.removesuffix(f" {STATES[0]}")


def plan_of(row: str) -> str:
    """Rows of the same plan have the same graph."""
    return answers_of(row).removesuffix(f" {STATES[1]}")


def file_name(row: str) -> str:
    return row.replace("/", " by ")


def short_name(row: str) -> str:
    name, _, state = row.split(maxsplit=2)
    return f"`{name}` {state}"


def ranked(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["top1"])


def shape(row: dict[str, Any], whole: list[int] | None = None) -> str:
    """Heads/units of each block, and dims of queries and of values where these are not ``whole``."""
    blocks = zip(row["heads"], row["mlp"], row["dims"], strict=True)
    return " ".join(f"{h}/{m}" + (f"/{d[0]}+{d[1]}" if d != whole else "") for h, m, d in blocks)


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['row']:34} {row['top1']:6.2f} {row['dense_ms'] / row['ms']:6.3f}x (predicted {row['predicted']:.3f}x) "
        f"{100 * row['macs']:4.0f}% of MACs  {row['how']:10} {shape(row)}"
    )


COLUMNS = (
    "score", "allocation", "weights", "top-1 (%)", "speed-up", "predicted", "MACs (%)", "above random (points, 95%)",
    "heads/units/dims",
)  # fmt: skip
ABOUT = """# Scores compared

Written by `tools/bench_structure.py` from the model and images of `profiles/{profile}.yaml`: heads, MLP and depth are
pruned, all tokens stay, each plan is landed on the machine that measures, and every engine (ONNX Runtime) is judged on
the 10,000 test images. *Trained*: {recovery} steps of distillation, alike for all. *Exact*: the search shares the
budget by measured losses and times, and the score says which units of a half go; the other allocations are the
published ones of `vitprune/search/allocation.py`, which go by scores alone. *Learned*: the method has trained weights
and widths for {learning} steps before its row *as it comes*. *Speed-up*: measured
{timed}; *predicted*: the latency table's word. *Above random*: points of top-1 more than random's engine has on the
same images, with the paired 95% interval; *no* where it is not clear of 0. {cpu}, {cores} cores, shared with others:
speed-ups are uncertain by several percent. One small model ranks no scores for others.
"""


if __name__ == "__main__":
    main()
