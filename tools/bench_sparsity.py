"""Every weight-saliency method in one shot, at the same sparsities of one model: top-1 on the whole test set.

    python tools/bench_sparsity.py --out /tmp/sparsity
    python tools/bench_sparsity.py --out /tmp/sparsity --methods cap sparsegpt --levels 0.75 2:4

Nothing is trained afterwards. A level is a share of zeros in all linear layers of the blocks, or 2:4 in those of the
MLPs. The second-order methods are compared with magnitude image by image: 95% bootstrap interval of the difference, and
McNemar's exact test. Finished rows stay in OUT/rows.jsonl: run it again after an interruption. They are written as a
page of the documentation with --page vitprune/weights/COMPARISON.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from _common import Rows, open_profile, searched, settings_of
from vitprune import parts
from vitprune.errors import InputError
from vitprune.sparsify import sparsify
from vitprune.weights.base import WeightMethod
from vitprune.weights.magnitude import Magnitude
from vitprune_deploy.build.bench import Bench
from vitprune_deploy.data import batches
from vitprune_deploy.validate.accuracy import Paired

LEVELS = ("0.75", "2:4", "0.5", "0.9")
BASELINES = {"magnitude": Magnitude(), "magnitude-global": Magnitude(scope="global")}
OF_INPUTS = ("wanda",)  # weighs by what a layer reads, without curvature


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quickstart")
    parser.add_argument("--methods", nargs="+", default=[*BASELINES, *second_order(), *OF_INPUTS])
    parser.add_argument("--levels", nargs="+", default=list(LEVELS))
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="where to write all finished rows as Markdown")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    profile = open_profile(options.profile, [], 2.0)
    bench = searched(profile, options.out.resolve() / "work", until="images")
    tested = test_images(bench, options.out / "test.pt")
    rows = Rows(options.out / "rows.jsonl", settings_of(profile, images=options.images, seed=options.seed))
    rows.get("dense", partial(judged, bench.dense, tested))
    for level in options.levels:
        for name in options.methods:
            print(line(rows.get(f"{name} {level}", partial(row, bench, name, level, tested, options))), flush=True)
    if options.page:
        options.page.write_text(page(rows.rows, options), encoding="utf-8")


def second_order() -> list[str]:
    """The methods of the folder that know a curvature."""
    return [name for name in parts.names("vitprune.weights") if name not in (*BASELINES, *OF_INPUTS)]


def test_images(bench: Bench, kept: Path) -> tuple[Tensor, Tensor]:
    """All test images as the model takes them, [N, C, H, W], and their classes [N]; decoded once."""
    if not kept.is_file():
        found = list(batches(bench.images.test, bench.preprocess, 250))
        torch.save(tuple(torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True)), kept)
    images, labels = torch.load(kept, weights_only=True)
    return images, labels


def row(
    bench: Bench, name: str, level: str, tested: tuple[Tensor, Tensor], options: argparse.Namespace
) -> dict[str, Any]:
    """One model with zeros, and what became of it."""
    method = BASELINES.get(name) or parts.load("vitprune.weights", name, WeightMethod)()
    pattern, share = (level, None) if ":" in level else ("unstructured", float(level))
    begun = time.process_time()
    try:
        sparse = sparsify(bench.dense, bench.calibration[: options.images], method, pattern, share, seed=options.seed)
    except InputError as error:
        return {"why": str(error)}
    seconds = time.process_time() - begun
    return {"sparsity": sparse.sparsity, "cpu_seconds": seconds, **judged(sparse.model, tested)}


@torch.inference_mode()
def judged(model: nn.Module, tested: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Top-1 in percent, and which images are right, as the hex digits of their bits."""
    images, labels = tested
    right = torch.cat([model(part).argmax(1) for part in images.split(250)]) == labels
    top1, hexadecimal = 100 * float(right.float().mean()), np.packbits(right.numpy()).tobytes().hex()
    return {"top1": top1, "images": len(right), "right": hexadecimal}


def compared(rows: Mapping[str, Any], name: str, level: str) -> Paired | None:
    """A method against the better of the baselines at a level, whose drop is then below 0; None: a row is missing."""
    mine = rows.get(f"{name} {level}", {})
    theirs = [one for base in BASELINES if "top1" in (one := rows.get(f"{base} {level}", {}))]
    if "top1" not in mine or not theirs:
        return None
    best = max(theirs, key=lambda one: one["top1"])
    return Paired.of(bits(best), bits(mine))


def bits(found: Mapping[str, Any]) -> np.ndarray:
    """Which images are right, bool [N]."""
    packed = np.frombuffer(bytes.fromhex(found["right"]), np.uint8)
    return np.unpackbits(packed, count=found["images"]).astype(bool)


def page(rows: Mapping[str, Any], options: argparse.Namespace) -> str:
    """All finished rows as Markdown, a table for each level, best first."""
    dense = rows["dense"]
    text = ABOUT.format(
        profile=options.profile, images=options.images, seed=options.seed, dense=dense["top1"], tested=dense["images"]
    )
    known = [*BASELINES, *second_order(), *OF_INPUTS]
    for level in sorted({row.split()[1] for row in rows if row != "dense"}):
        there = [name for name in known if "top1" in rows.get(f"{name} {level}", {})]
        best = sorted(there, key=lambda name: -rows[f"{name} {level}"]["top1"])
        text += f"\n## {titled(level)}\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
        text += "".join(f"| {' | '.join(cells(rows, name, level))} |\n" for name in best)
        text += "".join(f"\n{sentence}\n" for sentence in sentences(rows, level, there, known))
    return text


def titled(level: str) -> str:
    return f"{level} in the MLPs" if ":" in level else f"{100 * float(level):g}% zeros"


def cells(rows: Mapping[str, Any], name: str, level: str) -> tuple[str, ...]:
    found = rows[f"{name} {level}"]
    pair = None if name in BASELINES else compared(rows, name, level)
    against = "" if pair is None else f"{-pair.drop:+.2f} ({-pair.high:+.2f} to {-pair.low:+.2f})"
    p_value = "" if pair is None else f"{pair.p_value:.2g}"
    return f"`{name}`", f"{found['top1']:.2f}", against, p_value, f"{found['cpu_seconds']:.1f}"


def sentences(rows: Mapping[str, Any], level: str, there: Sequence[str], known: Sequence[str]) -> list[str]:
    """Which second-order methods are not above magnitude, and which methods have no row, with the reason."""
    said = []
    pairs = {name: compared(rows, name, level) for name in there if name in second_order()}
    below = [f"`{name}`" for name, pair in pairs.items() if pair is not None and pair.high >= 0]
    if pairs:
        said.append(
            f"Not above magnitude by the paired 95% interval: {', '.join(below)}."
            if below
            else "Every second-order method that was run is above magnitude by the paired 95% interval."
        )
    said += [
        f"`{name}` refuses: {rows[f'{name} {level}']['why']}."
        for name in known
        if "why" in rows.get(f"{name} {level}", {})
    ]
    left = [f"`{name}`" for name in known if f"{name} {level}" not in rows]
    return said + ([f"Not run: {', '.join(left)}."] if left else [])


def line(found: Mapping[str, Any]) -> str:
    if "why" in found:
        return f"{found['row']:26} {found['why']}"
    return f"{found['row']:26} {found['top1']:6.2f} {100 * found['sparsity']:5.1f}% zeros {found['cpu_seconds']:7.1f} s"


COLUMNS = ("method", "top-1 (%)", "points above magnitude (95%)", "McNemar's p", "CPU seconds")
ABOUT = """# Weight-saliency methods compared

Written by `tools/bench_sparsity.py`: the model of `profiles/{profile}.yaml`, whose dense top-1 is {dense:.2f}%, loses
weights in one shot, by each method with its defaults, and is judged on the {tested:,} test images in fp32 by torch;
nothing is trained afterwards. {images} calibration images of the training part, seed {seed}, classes drawn from the
model's own output where gradients are needed. Shares of zeros are over all linear layers of the blocks, 2:4 over those
of the MLPs.
*Points above magnitude*: against the better of the two rows of magnitude at that level (uniform per layer, and one
threshold for all), paired image by image, with the 95% bootstrap interval over images. *CPU seconds* are of the
pruning, statistics included, on one thread of a machine that others used. `magnitude`, `wanda`, `obd` and `obd_fisher`
leave the remaining weights as they are, the others change them to make up for what is gone. One small model ranks no
methods for others.
"""


if __name__ == "__main__":
    main()
