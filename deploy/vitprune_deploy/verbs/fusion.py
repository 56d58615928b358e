"""What runtimes make of attention, for ``inspect``: of a file as it stands, of a folder as its build noted it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vitprune.errors import VitpruneError

from ..validate.fusion import Attention, fusion_rows, head_sizes, in_onnxruntime, in_openvino, refused_heads
from .answer import table

RUNTIMES: Mapping[str, Callable[[Path], tuple[Attention, ...]]] = {
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
}


def of_file(path: Path, model: Any) -> dict[str, Any]:
    """Attention in each runtime that is installed, and what TensorRT would refuse, as plain data.

    Args:
        path: the ONNX file.
        model: the same, as an ``onnx.ModelProto``.
    """
    found: dict[str, Any] = {}
    for name, read in RUNTIMES.items():
        if find_spec(name) is None:
            continue
        try:
            found[name] = {"attention": [one.to_dict() for one in read(path)], "unread": None}
        except VitpruneError as error:  # what a runtime does not take is no fault of the file
            found[name] = {"attention": [], "unread": str(error)}
    return {"runtimes": found, "warnings": refused_heads(head_sizes(model))}


def file_text(found: Mapping[str, Any]) -> list[str]:
    """What ``of_file`` found, in paragraphs."""
    parts = []
    for name, one in found["runtimes"].items():
        attention = [Attention.from_dict(plain) for plain in one["attention"]]
        rows = [["-" if a.block is None else a.block, a.became(), a.moved()] for a in attention]
        if rows:
            parts.append(table(rows, head=["block", f"attention in {name}", "moved around it"], right=[0]))
        elif one["unread"]:
            parts.append(f"attention in {name}: not known, {one['unread']}")
    return [*parts, *_warned(found["warnings"])]


def of_folder(
    manifest: Mapping[str, Any], config: Mapping[str, Any] | None, profile: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Paragraphs and warnings: what the build noted in ``manifest``, and the sizes in its ``model.json``.

    Args:
        profile: its ``profile.yaml`` as plain data; empty where that is not known.
    """
    noted = manifest.get("fusion") or {}
    blocks = enumerate((config or {}).get("blocks", ()))
    sizes = [(number, block["qk_dim"], block["v_dim"]) for number, block in blocks if block["heads"]]
    warnings = [*noted.get("warnings", ()), *refused_heads(sizes), *missed_multiples(config or {}, profile)]
    rows = fusion_rows(noted)
    head = ["block", f"attention in {noted.get('runtime')}: dense", "pruned", "moved around it"]
    return [*([table(rows, head=head, right=[0])] if rows else []), *_warned(warnings)], warnings


MULTIPLES = (("heads", "heads", "heads", ("heads",)), ("mlp", "mlp", "MLP units", ("mlp",)),
             ("head_dims", "head_dim", "dims of a head", ("qk_dim", "v_dim")))  # fmt: skip
CHANNELS = 8  # what matrix products of all runtimes favour at least, of the residual stream


def missed_multiples(config: Mapping[str, Any], profile: Mapping[str, Any]) -> list[str]:
    """A sentence for each kind of size of which blocks have no multiple that the profile asks for.

    Args:
        config: a ``model.json``, as plain data.
        profile: a resolved profile, as plain data.
    """
    prune, alignment = profile.get("prune", {}), profile.get("device", {}).get("alignment", {})
    found = []
    for section, key, what, names in MULTIPLES:
        multiple = (prune.get(section) or {}).get("multiple") or alignment.get(key) or 1
        odd = [
            f"{block[name]} in block {number}"
            for number, block in enumerate(config.get("blocks", ()))
            for name in names
            if block[name] % multiple and (block["heads"] or name == "mlp")
        ]
        if odd:
            found.append(f"{what} are multiples of {multiple} where kernels favour it, and there are {', '.join(odd)}")
    if prune.get("embedding") and config.get("dim", 0) % CHANNELS:
        found.append(f"channels are multiples of {CHANNELS} where kernels favour it, and there are {config['dim']}")
    return found


def _warned(warnings: list[str]) -> list[str]:
    return ["\n".join(f"warning: {warning}" for warning in warnings)] if warnings else []
