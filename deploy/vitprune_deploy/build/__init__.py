"""The pipeline from a profile to a validated engine: a list of stages, each with inputs, outputs and a cache key."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..artifact import MANIFEST, Manifest, hash_files
from ..console import Console, to_file
from ..files import copy_atomic, sweep, write_atomic, writing
from ..profile import Profile
from .bench import Bench
from .pipeline import run

__all__ = ["Bench", "build", "run"]

log = logging.getLogger(__name__)


def build(
    profile: Profile,
    out: Path,
    console: Console,
    *,
    fresh: bool = False,
    others: Sequence[Bench] = (),
    lead: Bench | None = None,
) -> Manifest:
    """Run every stage, and leave in ``out`` what a service needs; the manifest comes last, when the rest is there.

    Args:
        profile, out, console, fresh: of the build.
        others, lead: of several devices with one plan; see ``pipeline.run``.

    Raises:
        VitpruneError: something is wrong with the input or the machine; the same command goes on from there.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        handler = to_file(str(out / "build.log"))
        try:
            bench = run(profile, out, console, fresh=fresh, others=others, lead=lead)
            return _deliver(bench, out)
        finally:
            logging.getLogger("vitprune_deploy").removeHandler(handler)
            handler.close()


def _deliver(bench: Bench, out: Path) -> Manifest:
    """Copy what the stages made to where the manifest says it is."""
    files = _delivered(bench)
    write_atomic(out / "profile.yaml", bench.profile.to_yaml())
    for name, source in files.items():
        copy_atomic(source, out / name)
    manifest = Manifest.load(bench.folders["report"])
    manifest = manifest.model_copy(update={"files": hash_files(out, ["profile.yaml", *files])})
    manifest.write(out)
    log.info("%s: %s", out / MANIFEST, manifest.verdict)
    return manifest


def _delivered(bench: Bench) -> dict[str, Path]:
    """Name in the output folder -> the stage's file."""
    folders = bench.folders
    files = {
        "latency_table.json": folders["measure"] / "latency_table.json",
        "report.html": folders["report"] / "report.html",
    }
    files |= {name: folders["search"] / name for name in ("plan.yaml", "frontier.json")}
    files |= {name: folders["recover"] / name for name in ("model.json", "model.safetensors")}
    files |= {path.name: path for path in sorted(folders["export"].glob("model*.onnx*"))}
    files |= {path.name: path for path in sorted(folders["validate"].glob("golden.*"))}
    engines = [*folders["engines"].glob("model.*"), *folders["int8"].glob("model.*")]
    files |= {f"engine/{path.name}": path for path in sorted(engines)}
    return files
