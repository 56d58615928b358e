"""What the report shows, collected from what the stages wrote."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from vitprune.search.counts import Counts
from vitprune.search.frontier import from_rows
from vitprune.search.latency import LatencyTable

from ..artifact import Manifest
from ..validate import Limits, Verdict
from .bench import INT8, Bench
from .choose import table_request

if TYPE_CHECKING:
    from vitprune.model.config import VitConfig

    from ..report.facts import Facts, ModelFacts, Picture, Whole

SHOWN_IMAGES = 6


def collect(bench: Bench, manifest: Manifest) -> Facts:
    """The facts of a finished build."""
    from ..report.facts import Facts

    profile, found = bench.profile, bench.json("validate", "figures.json")
    searched = bench.json("search", "search.json")
    table = LatencyTable.from_dict(searched["table"])
    return Facts(
        title=f"{profile.model.name} on {profile.device.name or manifest.device['cpu']}",
        description=profile.description or "",
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        command="vitprune-deploy build profile.yaml",  # the resolved one: overrides and all
        verdict=Verdict(manifest.verdict, list(manifest.reasons)),
        limits=Limits.of(profile, found["budget_ms"]),
        asked=_asked(bench),
        runtime=profile.runtime.name,
        precision=profile.runtime.precision,
        batch=profile.batch,
        image_size=bench.dense.config.image_size,
        threads=profile.budget.threads,
        dense=_model(bench, manifest, found, "dense"),
        pruned=_model(bench, manifest, found, "pruned"),
        accuracy=found["accuracy"],
        reference_top1=found["reference_top1"],
        parity=manifest.parity.model_dump(),
        consistency=found["consistency"],
        fusion=found["fusion"],
        token_method=searched["method"],
        frontier=tuple(from_rows(bench.json("search", "frontier.json"))),
        search=searched,
        table=table,
        wholes=tuple(_wholes(bench, searched)),
        pictures=pictures(bench),
        engines=tuple(engine.model_dump() for engine in manifest.engines),
        device=manifest.device,
        machine=found["machine"],
        versions=manifest.versions,
        notes=(*_notes(bench), *(manifest.weights or {}).get("notes", ())),
        profile_yaml=profile.to_yaml(),
    )


def pictures(bench: Bench) -> tuple[Picture, ...]:
    """Some test images with what is left of them block by block; none where the model reduces no tokens."""
    import torch

    from ..data import picked
    from ..report import pictures as drawing

    part = bench.images.test
    step = max(1, len(part) // SHOWN_IMAGES)
    found, shown = picked(part, bench.preprocess, range(step // 2, len(part), step)[:SHOWN_IMAGES])
    pixels, names = torch.from_numpy(found), [part.name(i) for i in shown]
    return drawing.pictures(bench.pruned, pixels, mean=bench.preprocess.mean, std=bench.preprocess.std, names=names)


def _asked(bench: Bench) -> str:
    budget = bench.profile.budget
    if budget.speedup is not None:
        return f"{budget.speedup:g} times as fast as the dense model, measured beside it"
    return f"{budget.latency_ms:g} ms for one batch"


def _model(bench: Bench, manifest: Manifest, found: Mapping[str, Any], name: str) -> ModelFacts:
    from ..report.facts import ModelFacts

    figures = manifest.dense if name == "dense" else manifest.pruned
    config = bench.dense.config if name == "dense" else bench.pruned.config
    return ModelFacts(
        params=figures.params,
        macs=figures.macs,
        latency=found[f"{name}_latency"],
        counts=_counts(config, bench.dense.config),
        size_bytes=found["size_bytes"][name],
        predicted_ms=figures.predicted_latency_ms,
        memory_mb=found["memory_mb"] if name == "pruned" else None,
        runs_ms=tuple(found[f"{name}_runs_ms"]),
    )


def _counts(config: VitConfig, dense: VitConfig) -> Counts:
    """What each block of ``config`` has; dims of heads where they lack some of those of ``dense``."""
    patches, left = [], config.patches
    for block in config.blocks:
        left = left if block.patches is None else block.patches
        patches.append(left)
    heads, mlp = tuple(b.heads for b in config.blocks), tuple(b.mlp for b in config.blocks)
    pairs = list(zip(config.blocks, dense.blocks, strict=True))
    if all((b.qk_dim, b.v_dim) == (whole.qk_dim, whole.v_dim) for b, whole in pairs if b.heads):
        return Counts(heads, mlp, tuple(patches))
    qk, v = (tuple(getattr(b, name) if b.heads else 0 for b in config.blocks) for name in ("qk_dim", "v_dim"))
    return Counts(heads, mlp, tuple(patches), qk, v)


def _wholes(bench: Bench, searched: Mapping[str, Any]) -> list[Whole]:
    """Whole models that were measured while the table was made, and while the search landed."""
    from ..report.facts import Whole

    table, theirs = LatencyTable.from_dict(searched["table"]), table_request(bench).method
    found = [
        Whole(row["predicted_ms"], row["measured_ms"], row["low_ms"], row["high_ms"], fitted=False)
        for row in searched["measured"]
    ]
    for counts, measured in bench.json("measure", "wholes.json"):
        predicted_ms = table.predict_ms(Counts.from_dict(counts), theirs)
        found.append(Whole(predicted_ms, measured["value_ms"], measured["low_ms"], measured["high_ms"], fitted=True))
    return found


def _notes(bench: Bench) -> list[str]:
    from ..export.islands import Island, sentence

    kept = bench.json("export", "export.json").get("islands", {}).get("model.onnx", [])
    notes = [sentence([Island(**one) for one in kept])] if kept else []
    int8 = bench.json("int8", INT8)
    if "why" in int8:
        notes.append(f"The model in int8 was {'kept' if int8['kept'] else 'left out'}: {int8['why']}.")
    price = bench.json("validate", "figures.json").get("compatibility")
    if price:
        notes.append(
            f"To serve other GPUs or versions of TensorRT, the engine takes {price['with_ms']:.3g} ms, which is "
            f"{price['times']:.2f} times the {price['without_ms']:.3g} ms without (medians of {price['runs']} runs)."
        )
    checks = bench.json("recover", "recovery.json")
    if checks:
        notes.append(
            f"Recovery: {checks[-1]['step']} steps in {checks[-1]['seconds']:.0f} s; the held-out loss went from "
            f"{checks[0]['loss']:.4f} to {min(check['loss'] for check in checks):.4f} nats per image."
        )
    return notes
