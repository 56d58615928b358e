"""What an output folder holds, for a person: its figures before and after, its limits, and what stays of each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact import Manifest
from .answer import milliseconds, table


def account(manifest: Manifest, folder: Path) -> str:
    """The verdict with its reasons, the figures, and where the files are."""
    zeros = (manifest.weights or {}).get("notes", [])
    return "\n".join([f"{manifest.verdict}{':' if manifest.reasons else ''}", *(f"  {r}" for r in manifest.reasons), "",
                      comparison(manifest), "", *zeros, files_line(manifest, folder)])  # fmt: skip


def comparison(manifest: Manifest) -> str:
    """Dense and pruned side by side, with the budget."""
    dense, pruned, budget = manifest.dense, manifest.pruned, manifest.budget
    rows: list[list[str]] = []
    for name in ("p50", "p90", "p99"):
        before, after = getattr(dense.latency_ms, name), getattr(pruned.latency_ms, name)
        limit = f"<= {milliseconds(budget.latency_ms)}" if name == f"p{budget.percentile}" else ""
        rows.append([f"latency {name} (ms), batch {budget.batch}", milliseconds(before), milliseconds(after), limit])
    if budget.percentile not in (50, 90, 99):
        rows.append([f"latency p{budget.percentile} (ms)", "", "", f"<= {milliseconds(budget.latency_ms)}"])
    rows.append(["predicted latency (ms)", "", milliseconds(pruned.predicted_latency_ms), ""])
    rows.append(["top-1 (%)", percent(dense.top1), percent(pruned.top1), ""])
    rows.append(["parameters (million)", f"{dense.params / 1e6:.3f}", f"{pruned.params / 1e6:.3f}", ""])
    rows.append(["multiply-accumulates (million)", f"{dense.macs / 1e6:.1f}", f"{pruned.macs / 1e6:.1f}", ""])
    rows.append(["largest difference from torch", "", f"{manifest.parity.max_abs:.2g}", ""])
    return table(rows, head=["", "dense", "pruned", "budget"], right=[1, 2, 3])


def files_line(manifest: Manifest, folder: Path) -> str:
    """The names of the files, and the folder."""
    return f"{'  '.join(manifest.files)}  in  {folder}"


def block_rows(counts: Mapping[str, Sequence[int]], title: str) -> str:
    """Heads, their dims, MLP units and patch tokens that each block keeps, blocks side by side."""
    blocks = range(len(counts["heads"]))
    names = (("heads", "heads"), ("q/k dims", "qk"), ("v dims", "v"), ("MLP units", "mlp"), ("patches left", "patches"))
    rows = [[label, *counts[key]] for label, key in names if key in counts]
    return table(rows, head=[f"{title}: block", *map(str, blocks)], right=range(1, len(blocks) + 1))


def block_counts(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Heads, MLP units and patches of each block of a ``model.json``; dims of heads where they are not the original."""
    sizes = zip(config["image_size"], config["patch_size"], strict=True)
    height, width = (pixels // patch for pixels, patch in sizes)
    patches, found = height * width, {"heads": [], "mlp": [], "patches": []}  # type: tuple[int, dict[str, list[int]]]
    for block in config["blocks"]:
        patches = patches if block.get("patches") is None else block["patches"]
        for key, value in (("heads", block["heads"]), ("mlp", block["mlp"]), ("patches", patches)):
            found[key].append(value)
    whole = [round(block["scale"] ** -2) for block in config["blocks"]]  # dims of a head before any were pruned
    pairs = list(zip(config["blocks"], whole, strict=True))
    if any(block["heads"] and {block["qk_dim"], block["v_dim"]} != {size} for block, size in pairs):
        for key, name in (("qk", "qk_dim"), ("v", "v_dim")):
            found[key] = [block[name] if block["heads"] else 0 for block in config["blocks"]]
    return found


def percent(value: float | None) -> str:
    """With two decimals; '-' where it is not known."""
    return "-" if value is None else f"{value:.2f}"
