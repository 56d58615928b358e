"""Time and memory of the weight-saliency methods: ``python tools/bench_weights.py [--methods cap sparsegpt]``.

Random weights and images: neither matters for the time. Each figure is of a process of its own, in which one pruning
is made (``recompute=1``); the peak is that of the whole process, torch and the images included. On a busy machine
processor seconds over the number of threads are what a quiet one would take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time

ROW = "{:<12} {:<6} {:>5} {:>6} {:>6} {:<13} {:>9} {:>9} {:>9}"
IN_BLOCKS = ("woodfisher", "cap", "mfac", "cap_fast")


def main() -> None:
    args = _arguments()
    if args.one:
        print(json.dumps(_measured(args)))
        return
    print(ROW.format("method", "model", "depth", "block", "images", "pattern", "wall s", "cpu s", "peak GiB"))
    for model, method in itertools.product(args.models, args.methods):
        for block in args.blocks if method in IN_BLOCKS else [0]:
            command = [sys.executable, __file__, "--one", "--models", model, "--methods", method]
            options = {"blocks": block, "images": args.images, "depth": args.depth}
            options |= {"pattern": args.pattern, "sparsity": args.sparsity}
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            found = json.loads(subprocess.run(command + words, check=True, stdout=subprocess.PIPE).stdout)
            figures = (f"{found['wall']:.0f}", f"{found['cpu']:.0f}", f"{found['peak']:.2f}")
            of = (method, model, args.depth, block or "-", args.images, args.pattern)
            print(ROW.format(*of, *figures), flush=True)
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    print(f"{found['threads']} threads, torch {found['torch']}, load {load}")


def _measured(args: argparse.Namespace) -> dict[str, float | str]:
    """Seconds, and the peak of memory in GiB, of one pruning."""
    import torch

    from vitprune import parts
    from vitprune.model.timm import from_timm
    from vitprune.sparsify import sparsify
    from vitprune.weights.base import Pattern, WeightMethod

    torch.manual_seed(0)
    (name,), (method,), (block,) = args.models, args.methods, args.blocks
    model = from_timm(f"deit_{name}_patch16_224", depth=args.depth).model.eval()
    images = torch.randn(args.images, 3, 224, 224)
    kind = parts.load("vitprune.weights", method, WeightMethod)
    pattern = Pattern.parse(args.pattern)
    began, used = time.perf_counter(), time.process_time()
    sparsify(
        model,
        images,
        kind(block=block) if block else kind(),
        pattern,
        None if pattern.of else args.sparsity,
        recompute=1,
    )
    return {
        "wall": time.perf_counter() - began,
        "cpu": time.process_time() - used,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "base"], help="of DeiT")
    parser.add_argument("--methods", nargs="+", default=["woodfisher", "cap", "sparsegpt"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[64, 192], help="weights of a block")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--depth", type=int, default=12, help="blocks of the model")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
