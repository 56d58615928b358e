"""A build whose widths are learned while the model trains: a stage of its own, interrupted, and an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small import PROFILE

from vitprune.model.timm import from_timm
from vitprune.plan import Plan
from vitprune.search.counts import Counts
from vitprune.search.landing import Measured
from vitprune.search.latency import Circumstances, LatencyTable, Levels, Pieces
from vitprune_deploy.build import build, choose
from vitprune_deploy.build.bench import Bench
from vitprune_deploy.build.learned import LEARNING, search
from vitprune_deploy.build.pipeline import run
from vitprune_deploy.build.runtimes import device
from vitprune_deploy.build.training import share
from vitprune_deploy.console import Console
from vitprune_deploy.latency.table import shape_key
from vitprune_deploy.profile import Profile, load_profile
from vitprune_deploy.runtime import load

QUICK = ["prune.learned={method: wdpruning, max_steps: 12, lr: 0.001}", "prune.tokens.method=none",
         "prune.mlp.multiple=64", "prune.weights.method=magnitude", "budget.speedup=1.3", "search.landings=2",
         "recover.max_steps=2", "validation.runs=20", "validation.max_seconds=2"]  # fmt: skip


class Stopped(Console):
    """Ends the build in the middle of a training."""

    def progress(self, done, total, what):
        if total == 12 and done == 6:
            raise KeyboardInterrupt


def record_table(profile: Profile, path: Path) -> None:
    """A table of this machine on which all time is that of heads and units."""
    config = from_timm(profile.model.name, pretrained=False, **profile.model.args).model.config
    asked = Circumstances(
        device(profile), "onnxruntime", "fp32", profile.batch, profile.budget.threads, (32, 32), shape_key(config)
    )
    heads, units = (4, 3, 2, 1), (192, 128, 64)
    levels = Levels(config.prefix, (64,), heads, units, 4 * 4 * 12 * 48, 4 * 96)
    attn, mlp = {(64, h): 0.2 * h for h in heads}, {(n, u): 0.004 * u for n in (64, 0) for u in units}
    parts = Pieces(attn, mlp, 0.1, {64: 0.1, 0: 0.1}, {}, {}, attn_prefix={key: ms / 2 for key, ms in attn.items()})
    path.write_text(json.dumps(LatencyTable.fill(asked, levels, parts).to_dict()))


@pytest.mark.e2e
def test_learned_widths_go_into_the_engine_after_an_interruption(tmp_path, images, monkeypatch):
    (tmp_path / "small.yaml").write_text(PROFILE.format(images=images))
    profile = load_profile(tmp_path / "small.yaml", [*QUICK, f"measure.table={tmp_path / 'table.json'}"])
    record_table(profile, tmp_path / "table.json")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(profile, out, Stopped(quiet=True))
    assert (out / ".work" / "learning.pt").is_file()
    steps = []

    class Watched(Console):
        def progress(self, done, total, what):
            steps.extend([done] if total == 12 else [])

    manifest = build(profile, out, Watched(quiet=True))
    assert steps == [6, 7, 8, 9, 10, 11, 12]  # the checkpoint was written after the fifth
    plan = Plan.from_dict(yaml.safe_load((out / "plan.yaml").read_text()))
    config = json.loads((out / "model.json").read_text())
    assert [(b["heads"], b["mlp"]) for b in config["blocks"]] == [(len(b.heads), len(b.mlp)) for b in plan.blocks]
    found = json.loads(next((out / ".work").glob("search-*/search.json")).read_text())
    assert found["measured"][0]["counts"]["heads"] == [4, 4, 4]  # the dense model beside each plan that was taken
    assert found["chosen"] in found["measured"][1:]
    assert (found["chosen"]["measured_ms"] <= found["budget_ms"]) == (found["status"] == "under")
    assert manifest.pruned.macs < manifest.dense.macs
    assert manifest.parity.max_abs <= 1e-4
    assert set(manifest.weights["layers"].values()) == {0.5}  # 2:4 in what was left of the MLPs
    with load(out) as model:
        assert model.predict(np.zeros((2, 32, 32, 3), np.uint8)).logits.shape == (2, 3)
    again = json.loads((out / "frontier.json").read_text())
    assert len(again) == 1
    assert tightest(profile, out)["status"] == "unreachable"
    assert landed(profile, out, monkeypatch) == ["under", True]
    assert shared(profile, out) == sorted(path.name for path in (out / ".work").glob("learn-*/*"))


def shared(profile: Profile, out: Path) -> list[str]:
    """The files that two processes leave which learn together."""
    bench = run(profile, out, Console(quiet=True), until="measure")
    (folder := out / "shared").mkdir()
    share(2, bench, folder, "learn")
    assert json.loads((folder / LEARNING).read_text())[-1]["step"] == 12
    return sorted(path.name for path in (*folder.iterdir(), *(out / ".work").glob("learn-*/stage.json")))


def landed(profile: Profile, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The outcome on a device on which the first plan is a little over the budget, whatever the table says of it."""
    bench = run(profile, out, Console(quiet=True), until="learn")
    table = LatencyTable.from_dict(bench.json("measure", "latency_table.json"))

    factors = []

    def measure(bench: Bench, plans: list[Counts], *_: Any) -> list[Measured]:
        dense_ms, ms = map(table.predict_ms, plans)
        factors.append(1.01 * dense_ms / 1.3 / ms)
        return [Measured(dense_ms, dense_ms, dense_ms), Measured(*(factors[0] * ms,) * 3)]

    monkeypatch.setattr(choose, "measure_counts", measure)
    (folder := out / "landed").mkdir()
    search(bench, folder)
    found = json.loads((folder / "search.json").read_text())
    return [found["status"], found["chosen"]["measured_ms"] <= found["budget_ms"]]


def tightest(profile: Profile, out: Path) -> dict[str, Any]:
    """What the search says of a budget below all that may be left, of a method that needs to know what is left."""
    learned = profile.prune.learned.model_copy(update={"method": "s2vite", "max_steps": 1})
    prune = profile.prune.model_copy(update={"learned": learned})
    budget = profile.budget.model_copy(update={"speedup": 1000.0})
    asked = profile.model_copy(update={"prune": prune, "budget": budget})
    found = run(asked, out / "tight", Console(quiet=True), until="search").json("search", "search.json")
    assert set(found["chosen"]["counts"]["heads"]) == {2}
    assert set(found["chosen"]["counts"]["mlp"]) == {64}
    assert "and no less may be left" in found["reason"]
    return found
