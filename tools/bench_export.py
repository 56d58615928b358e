"""The dense export against timm's own and against ONNX Runtime's transformer optimiser: node counts and speed.

    python tools/bench_export.py [--model deit_small_patch16_224] [--batch 1] [--rounds 41] [--threads 2]

The weights are random: they play no part. Every round times all files in a new random order, each right after one
untimed run of its own; what is compared are ratios within a round, so that a machine that drifts does no harm. The
interval is a bootstrap of the median ratio (95%). A ratio below 1 says that ours takes less time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import timm
import torch

from vitprune.model.timm import convert
from vitprune_deploy.backends.onnxruntime import OnnxRuntime
from vitprune_deploy.export.onnx import export_onnx

RESAMPLES = 2000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm's name")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        files = export_all(timm.create_model(arguments.model).eval(), Path(folder))
        times_ms = measure(files, arguments.batch, arguments.rounds, arguments.threads)
        report(arguments, files, times_ms)


def export_all(model: torch.nn.Module, folder: Path) -> dict[str, Path]:
    """The three files, ours first."""
    files = {name: folder / f"{name.replace(' ', '_')}.onnx" for name in ("ours", "timm", "timm optimised")}
    ours = convert(model)
    export_onnx(ours, files["ours"])
    example = torch.zeros(2, ours.config.channels, *ours.config.image_size)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
            input_names=["images"],
            output_names=["logits"],
            opset_version=20,
            verbose=False,
        )
        program.save(str(files["timm"]))
    optimise(files["timm"], files["timm optimised"], ours.config.blocks[0].heads, ours.config.dim)
    return files


def optimise(source: Path, target: Path, heads: int, dim: int) -> None:
    """What onnxruntime.transformers makes of a file."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    better = optimizer.optimize_model(
        str(source),
        model_type="vit",
        num_heads=heads,
        hidden_size=dim,
        optimization_options=FusionOptions("vit"),
        opt_level=0,
    )
    better.save_model_to_file(str(target))


def measure(files: dict[str, Path], batch: int, rounds: int, threads: int) -> dict[str, np.ndarray]:
    """Milliseconds of each file in each round."""
    random = np.random.default_rng(0)
    sessions = {name: OnnxRuntime.load(path, threads=threads) for name, path in files.items()}
    shape = [size if isinstance(size, int) else batch for size in sessions["ours"].inputs[0].shape]
    images = random.standard_normal(shape).astype(np.float32)
    runs = {name: session.bind({"images": images}) for name, session in sessions.items()}
    times_ms = {name: np.empty(rounds) for name in files}
    for number in range(rounds):
        for name in random.permutation(list(files)):
            runs[name]()
            times_ms[name][number] = runs[name]()
    return times_ms


def report(arguments: argparse.Namespace, files: dict[str, Path], times_ms: dict[str, np.ndarray]) -> None:
    """Print nodes, medians and the ratio of ours to each with its interval."""
    random = np.random.default_rng(0)
    print(f"{arguments.model}, batch {arguments.batch}, {arguments.threads} threads, {arguments.rounds} rounds")
    print(f"{'file':16s} {'nodes':>6s} {'median ms':>10s} {'ours / it':>10s}   95% interval")
    for name, path in files.items():
        nodes = sum(Counter(node.op_type for node in onnx.load(path).graph.node).values())
        ratio = times_ms["ours"] / times_ms[name]
        medians = np.median(random.choice(ratio, (RESAMPLES, len(ratio))), axis=1)
        low, high = np.percentile(medians, [2.5, 97.5])
        median_ms = np.median(times_ms[name])
        print(f"{name:16s} {nodes:6d} {median_ms:10.2f} {np.median(ratio):10.3f}   {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
