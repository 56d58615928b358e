"""Every token method at the same measured speed-ups of one model: as it comes, and after the same short training.

    python tools/bench_tokens.py --out /tmp/tokens
    python tools/bench_tokens.py --out /tmp/tokens --methods evit tome --speedups 2

Each row is a build of the profile with that token method alone: heads, MLP and depth stay whole, counts are searched on
this device, and the engine is judged on the whole test set. A method whose weights must be trained has no row as it
comes. Finished rows stay in OUT/rows.jsonl: run it again after an interruption. They are written as a page of the
documentation with --page vitprune/tokens/COMPARISON.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from _common import Rows, open_profile, searched, settings_of
from vitprune import parts
from vitprune.tokens.base import Reducer
from vitprune_deploy.latency.fingerprint import device_fingerprint, machine_state

TOKENS_ALONE = ["prune.heads.enabled=false", "prune.mlp.enabled=false", "prune.depth.enabled=false"]
SHORT = [
    "prune.tokens.levels=16",
    "measure.max_seconds=40",
    "search.max_seconds=10",
    "recover.max_seconds={recovery}",
    "runtime.also_build=[]",
    "validation.max_seconds=15",
    "validation.parity_images=8",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quickstart")
    parser.add_argument("--methods", nargs="+", default=parts.names("vitprune.tokens"))
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0])
    parser.add_argument("--recovery", type=float, default=60.0, help="seconds of training")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as vitprune-deploy takes it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="where to write all finished rows as Markdown")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    short = [text.format(recovery=options.recovery) for text in SHORT]
    overrides = [*TOKENS_ALONE, *short, *options.set]
    rows = Rows(options.out / "rows.jsonl", settings_of(open_profile(options.profile, overrides, 2.0)))
    for name in options.methods:
        learns = parts.load("vitprune.tokens", name, Reducer).stand_in is not None
        for speedup in options.speedups:
            for trained in (True,) if learns else (False, True):
                method = [f"prune.tokens.method={name}", f"recover.enabled={str(trained).lower()}"]
                make = partial(row, options, [*overrides, *method], speedup, options.out.resolve() / name)
                found = rows.get(f"{name} {speedup:g}x {'trained' if trained else 'as it comes'}", make)
                print(line(found), flush=True)
    print(f"\n{HEAD}\n" + "\n".join(line(found) for found in rows.rows.values()))
    if options.page:
        options.page.write_text(page(rows.rows.values(), options), encoding="utf-8")


def row(options: argparse.Namespace, overrides: list[str], speedup: float, folder: Path) -> dict[str, Any]:
    """One build, and what became of it."""
    bench = searched(open_profile(options.profile, overrides, speedup), folder, until="validate")
    found, search = bench.json("validate", "figures.json"), bench.json("search", "search.json")
    times = found["dense_latency"], found["pruned_latency"]
    return {
        "top1": found["accuracy"]["pruned"]["percent"],
        "dense_top1": found["accuracy"]["dense"]["percent"],
        "agreement": found["accuracy"]["agreement"]["percent"],
        "speedup": times[0]["p50"] / times[1]["p50"],
        "ms": times[1]["p50"],
        "predicted": search["dense_ms"] / search["chosen"]["predicted_ms"],
        "patches": search["chosen"]["counts"]["patches"],
        "drift": times[0]["reference_drift"],
        "machine": machine_state(),
    }


def page(rows: Iterable[dict[str, Any]], options: argparse.Namespace) -> str:
    """All finished rows as Markdown, a table for each speed-up, best first."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for found in rows:
        tables.setdefault(found["row"].split()[1], []).append(found)
    device = device_fingerprint("onnxruntime", "cpu", 2)
    dense = {f"{found['dense_top1']:.2f}" for table in tables.values() for found in table}
    text = ABOUT.format(
        cpu=device["cpu"], cores=device["cores"], profile=options.profile, seconds=options.recovery,
        dense=" or ".join(sorted(dense)),
    )  # fmt: skip
    for asked, table in sorted(tables.items()):
        best = sorted(table, key=lambda found: -found["top1"])
        text += f"\n## {asked} asked\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
        text += "".join(f"| {' | '.join(cells(found))} |\n" for found in best)
        without = [f"`{name}`" for name in parts.names("vitprune.tokens") if f"{name} {asked}" not in had(table)]
        text += f"\nNot run: {', '.join(without)}.\n" if without else ""
    return text


def had(table: list[dict[str, Any]]) -> set[str]:
    """The methods that have rows, with what was asked of them."""
    return {" ".join(found["row"].split()[:2]) for found in table}


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    name, _, state = found["row"].split(maxsplit=2)
    figures = (f"{found[key]:.2f}" for key in ("top1", "agreement", "speedup", "predicted"))
    return f"`{name}`", state, *figures, f"{100 * found['drift']:.0f}", " ".join(map(str, found["patches"]))


COLUMNS = ("method", "weights", "top-1 (%)", "agreement (%)", "speed-up", "predicted", "drift (%)", "patches")
ABOUT = """# Token methods compared

Written by `tools/bench_tokens.py` from builds of `profiles/{profile}.yaml` in which tokens alone are removed: heads,
MLP and depth stay whole, the last block is computed for the class token alone, counts are searched on the machine that
measures, and every engine is judged on the 10,000 test images. The dense model's top-1 is {dense}%. *Trained*:
{seconds:g} seconds of distillation, alike for all; that is no training in their authors' sense, and methods with
weights of their own suffer from it. Where training found nothing better on images held out, it kept the weights that
it began with, and both rows are of one model. *Predicted* is the search's word for the speed-up. *Drift* is the
spread (90th minus 10th percentile) of the reference while the engines were timed in turn: {cpu}, {cores} cores,
shared with others; where it is large, speed-ups are uncertain by several percent. One model of 100 patches and 6
blocks ranks no methods for others.
"""
HEAD = f"{'row':32} {'top-1':>6} {'agree':>6} {'speed-up':>8} {'predicted':>9} {'ms':>7} {'drift':>6}  patches"


def line(found: dict[str, Any]) -> str:
    return (
        f"{found['row']:32} {found['top1']:6.2f} {found['agreement']:6.2f} {found['speedup']:8.3f} "
        f"{found['predicted']:9.3f} {found['ms']:7.2f} {100 * found['drift']:5.0f}%  {found['patches']}"
    )


if __name__ == "__main__":
    main()
