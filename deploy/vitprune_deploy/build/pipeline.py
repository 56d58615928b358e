"""The list of stages, and what runs them in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import vitprune

from ..artifact import hash_files
from ..console import Console
from ..files import canonical_sha256
from ..profile import Profile
from ..stages import Stages
from . import choose, int8, judge, learned, make, prepare, screen, sparse
from .bench import INT8, METHODS, RANKINGS, Bench
from .sparse import WEIGHTS

log = logging.getLogger(__name__)

WORK = ".work"  # in the output folder: what stages keep for the next run


@dataclass(frozen=True)
class Stage:
    """One step of a build.

    Attributes:
        name: as progress and the work folder call it.
        needs: earlier stages whose outputs it reads: it runs again when one of them changes.
        outputs: files that it writes into its folder.
        settings: what else its outputs depend on, as plain data.
        packages: distributions whose version they depend on.
        work: writes the outputs into the folder that it is given.
    """

    name: str
    needs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: Callable[[Bench], Mapping[str, Any]]
    packages: tuple[str, ...]
    work: Callable[[Bench, Path], None]


STAGES = (
    Stage(
        "model", (), ("dense.json", "dense.safetensors", "preprocess.json", "classes.json"),
        prepare.model_settings, ("torch", "timm"), prepare.prepare_model,
    ),
    Stage("images", ("model",), ("images.json",), prepare.images_settings, (), prepare.prepare_images),
    Stage("methods", ("model", "images"), (METHODS,), screen.screen_settings, ("torch",), screen.screen),
    Stage("measure", ("model", "methods"), ("latency_table.json",), choose.table_settings, ("torch",), choose.measure),
    Stage(
        "losses", ("model", "images", "methods"), (f"{RANKINGS}/rankings.json",), choose.loss_settings, ("torch",),
        choose.survey_losses,
    ),
    Stage("learn", ("model", "images", "measure"), (learned.LEARNING,), learned.settings, ("torch",), learned.learn),
    Stage(
        "search", ("model", "images", "methods", "measure", "losses", "learn"),
        ("plan.yaml", "frontier.json", "search.json"),
        choose.search_settings, ("torch",), choose.search,
    ),
    Stage(
        "weights", ("model", "images", "methods", "losses", "search"), (WEIGHTS,), sparse.weight_settings, ("torch",),
        sparse.prune_weights,
    ),
    Stage(
        "recover", ("model", "images", "methods", "losses", "search", "weights"),
        ("model.json", "model.safetensors", "recovery.json"), make.recover_settings, ("torch",), make.recover_accuracy,
    ),
    Stage(
        "export", ("model", "images", "search", "recover"), ("model.onnx", "dense.onnx", "export.json"),
        make.export_settings, ("torch", "onnx", "onnxscript"), make.export,
    ),
    Stage("engines", ("export",), ("engines.json",), make.engine_settings, (), make.build_engines),
    Stage(
        "int8", ("model", "images", "recover", "export", "engines"), (INT8,), int8.int8_settings,
        ("onnxruntime", "openvino", "nncf"), int8.try_int8,
    ),
    Stage(
        "validate", ("model", "images", "search", "recover", "export", "engines", "int8"), ("figures.json",),
        judge.validation_settings, (), judge.validate,
    ),
    Stage(
        "report",
        (
            "model", "images", "measure", "losses", "search", "weights", "recover", "export", "engines", "int8",
            "validate",
        ),
        ("report.html", "manifest.json"), judge.report_settings, (), judge.report,
    ),
)  # fmt: skip


def run(
    profile: Profile,
    out: Path,
    console: Console,
    *,
    until: str | None = None,
    fresh: bool = False,
    others: Sequence[Bench] = (),
    lead: Bench | None = None,
) -> Bench:
    """Run the stages up to ``until`` (all of them if None) in ``out``; those that are done already are not repeated.

    Args:
        others: devices that the plan must suit too, measured already.
        lead: the device whose plan and weights this one gets.

    Raises:
        VitpruneError: something is wrong with the input, the machine or the budget; what was done so far is kept.
    """
    last = [stage.name for stage in STAGES].index(until) + 1 if until else len(STAGES)
    bench = Bench(profile, console, out / WORK, others=tuple(others), lead=lead)
    hashes: dict[str, str] = {}
    with Stages(out / WORK) as stages:
        if fresh:
            stages.forget()
        for number, stage in enumerate(STAGES[:last], start=1):
            if lead and stage.name in ("weights", "recover"):  # the same plan, the same weights
                folder = bench.folders[stage.name] = lead.folders[stage.name]
                hashes[stage.name] = canonical_sha256(hash_files(folder, stage.outputs))
                continue
            key = {
                "vitprune": vitprune.__version__,
                "needs": {name: hashes[name] for name in stage.needs},
                "settings": dict(stage.settings(bench)),
                "versions": _versions(stage.packages),
            }
            done = stages.find(stage.name, key)
            if done is None:
                with console.stage(stage.name, number, last):
                    done = stages.run(stage.name, key, stage.outputs, partial(stage.work, bench))
            else:
                log.info("%s: done before, nothing it depends on has changed", stage.name)
            bench.folders[stage.name], hashes[stage.name] = done.folder, done.sha256
    return bench


def _versions(packages: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
