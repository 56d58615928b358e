"""How close to its budget a searched engine lands, when it is measured again with fresh rounds and another seed.

    python tools/bench_landing.py --out /tmp/landing --profile quickstart
    python tools/bench_landing.py --out /tmp/landing-deit --model deit_small_patch16_224 --random-weights

The product's own pipeline does it all: table, losses, search, landing. Stages that OUT has from an earlier run, or from
a build into OUT, are not repeated. With random weights, images are noise and units are ranked by magnitude: latency
does not depend on either. Rows stay in OUT/landing.jsonl.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from _common import WINDOW, Ratio, Rows, export, noise, open_profile, searched, settings_of, timed
from vitprune_deploy.build.make import slim_model
from vitprune_deploy.latency.fingerprint import machine_state
from vitprune_deploy.profile import Profile

NOISE_IMAGES = 40
NOISE_SIDE = 256  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quickstart")
    parser.add_argument("--checkpoint", type=Path, help="weights in place of the profile's")
    parser.add_argument("--model", help="timm architecture, in place of a profile; needs --random-weights")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--batch", type=int, default=1, help="with --model")
    parser.add_argument("--threads", type=int, default=2, help="with --model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as vitprune-deploy takes it")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.25, 1.5, 2.0, 3.0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=90.0, help="at most, for measuring a landed engine again")
    options = parser.parse_args()
    if bool(options.model) != options.random_weights:
        parser.error("--model and --random-weights go together; weights of your own come with a profile")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    name = str(random_profile(options, out)) if options.model else options.profile
    overrides = [*options.set]
    if options.checkpoint:
        overrides.append(f"model.checkpoint={options.checkpoint.resolve()}")
    rows = Rows(out / "landing.jsonl", settings_of(open_profile(name, overrides, 2)))
    for speedup in options.speedups:
        profile = open_profile(name, overrides, speedup)
        rows.get(f"{speedup:g}x", partial(land, profile, speedup, out, options.seconds))
    show(rows, [f"{speedup:g}x" for speedup in options.speedups])


def random_profile(options: argparse.Namespace, out: Path) -> Path:
    """A profile of a model with random weights, and noise for images."""
    folder, rng = out / "noise" / "all", np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NOISE_IMAGES):
        pixels = rng.integers(0, 256, (NOISE_SIDE, NOISE_SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png", compress_level=1)
    few = {"images": NOISE_IMAGES // 4}
    plain = {
        "extends": "devices/x86-cpu",
        "model": {"name": options.model, "pretrained": False},
        "data": {"source": "noise", "labelled": False, "calibration": {"images": NOISE_IMAGES // 2}, "recovery": few,
                 "test": few},
        "input": {"batch": {"min": options.batch, "opt": options.batch, "max": options.batch}},
        "budget": {"speedup": 2, "batch": options.batch, "threads": options.threads},
        "accuracy": {"min_agreement": 50},  # asked for by the schema; nothing is validated
        "prune": {"criterion": "magnitude", "tokens": {"method": "evit"}},
        "search": {"probe_images": 8, "holdout_images": 8, "evaluations": 8},
    }  # fmt: skip
    path = out / "random.yaml"
    path.write_text(yaml.safe_dump(plain, sort_keys=False))
    return path


def land(profile: Profile, speedup: float, out: Path, seconds: float) -> dict[str, Any]:
    """Search and landing for one speed-up, then the engine and the dense one measured anew."""
    bench = searched(profile, out)
    found, (slim, _) = bench.json("search", "search.json"), slim_model(bench)
    image = (bench.dense.config.channels, *bench.dense.config.image_size)
    models = {"dense": bench.dense, "landed": slim}
    paths = {name: export(model, out / f"again-{name}.onnx", profile, image) for name, model in models.items()}
    times = timed(paths, profile, profile.seed + 1000, seconds)
    for path in paths.values():
        path.unlink()
    return {
        "status": found["status"],
        "reason": found["reason"],
        "landing": found["chosen"]["measured_ms"] / found["budget_ms"],
        "rounds": max(row["round"] for row in found["measured"]),
        "again": Ratio.of(times[1], times[0], speedup),
        "dense_ms": times[0].value_ms,
        "visits": times[1].rounds,
        "unstable": any(one.unstable for one in times),
        "noise": noise(times),
        "machine": machine_state(),
    }


def show(rows: Rows, names: list[str]) -> None:
    """One line for each speed-up: as landing measured it and measured again, as shares of the budget."""
    low, high = WINDOW
    print(f"\n{'asked':>6} {'status':>8} {'rounds':>6} {'landing':>8} {'again':>8} {'95%':>18}  in [{low}, {high}]")
    for name in names:
        row = rows.rows[name]
        again = Ratio(*row["again"])
        inside = "yes" if low <= again.value <= high else "within noise" if touches(again) else "NO"
        inside += ", unstable" if row["unstable"] else ""
        print(f"{name:>6} {row['status']:>8} {row['rounds']:6} {row['landing']:8.4f} {again.value:8.4f} "
              f"[{again.low:8.4f},{again.high:8.4f}]  {inside}")  # fmt: skip
    for name in names:
        row = rows.rows[name]
        print(f"{name}: {row['reason']}; dense {row['dense_ms']:.2f} ms, {row['visits']} rounds, {row['noise']}, "
              f"{row['machine']}")  # fmt: skip


def touches(ratio: Ratio) -> bool:
    """Whether the interval reaches into the window."""
    return ratio.low <= WINDOW[1] and ratio.high >= WINDOW[0]


if __name__ == "__main__":
    main()
