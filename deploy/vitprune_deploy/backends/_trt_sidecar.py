"""The JSON file beside a plan: a plan tells nothing about itself without the GPU that it was built for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitprune.errors import DamagedFile, InputError

from ..files import sha256_file

SCHEMA = 2
PRODUCTS = {"tensorrt": "trt", "tensorrt_rtx": "rtx"}


def engine_name(stem: str, sidecar: Mapping[str, Any]) -> str:
    """The name of a plan: what a machine must have to load it, its precision, and the batches that it takes.

    As in 'model.sm89.trt11.4.fp16.b1-8.plan'; 'sm86plus' for compute capability 8.6 and later ones.
    """
    gpus = "-".join(one.replace(".", "").replace("+", "plus") for one in sidecar["compute_capabilities"])
    version = ".".join(sidecar["version"].split(".")[:2])
    first = [next(iter(profile.values())) for profile in sidecar["profiles"]]
    least, most = min(shapes[0][0] for shapes in first), max(shapes[2][0] for shapes in first)
    batch = f"b{least}" if least == most else f"b{least}-{most}"
    parts = [stem, f"sm{gpus}", f"{PRODUCTS[sidecar['runtime']]}{version}", sidecar["precision"], batch, "plan"]
    return ".".join(filter(None, parts))


def sidecar_path(plan: Path) -> Path:
    """The JSON file that belongs to a plan."""
    return plan.with_suffix(".json")


def read_sidecar(plan: Path) -> dict[str, Any]:
    """What was noted when the plan was built, once it is clear that it is about this very file.

    Raises:
        InputError: there is no plan, or it has no sidecar.
        DamagedFile: either of them is not what was built.
    """
    before = plan.with_name(f"{plan.name}.json")  # where vitprune 0.1 had it
    path = before if before.is_file() else sidecar_path(plan)
    for file in (plan, path):
        if not file.is_file():
            raise InputError(f"{file}: there is no such file; build the engine again")
    try:
        sidecar = json.loads(path.read_text())
        sha256, _ = sidecar["sha256"], sidecar["runtime"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged ({error}); build the engine again") from error
    if sha256 != sha256_file(plan):
        raise DamagedFile(f"{plan} is cut off or not the engine that {path.name} describes; build the engine again")
    return sidecar
