"""Builds that remove dims of heads and channels: search, plan, surgery, export, and a service on what comes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from small import PROFILE

from vitprune.model.timm import from_timm
from vitprune.model.vit import fingerprint
from vitprune.plan import Plan
from vitprune.search.counts import Counts
from vitprune.search.latency import Circumstances, LatencyTable, Levels, Pieces
from vitprune.surgery import prune
from vitprune_deploy.build import build, run
from vitprune_deploy.build.runtimes import device
from vitprune_deploy.console import Console
from vitprune_deploy.latency.table import shape_key
from vitprune_deploy.profile import Profile, load_profile
from vitprune_deploy.runtime import load

pytestmark = pytest.mark.e2e
QUICK = ["prune.head_dims={enabled: true, multiple: 4, minimum: 4}", "prune.tokens.method=none",
         "prune.heads.enabled=false", "prune.mlp.enabled=false", "prune.depth.enabled=false", "budget.speedup=1.3",
         "search.landings=0", "search.evaluations=3", "recover.max_steps=2", "validation.runs=20",
         "validation.max_seconds=2"]  # fmt: skip


def record_table(profile: Profile, path: Path) -> None:
    """A table of this machine on which attention is most of the time, and its dims most of that."""
    config = from_timm(profile.model.name, pretrained=False, **profile.model.args).model.config
    config = replace(config, dim=profile.prune.embedding or config.dim)
    asked = Circumstances(
        device(profile), "onnxruntime", "fp32", profile.batch, profile.budget.threads, (32, 32), shape_key(config)
    )
    levels = Levels(config.prefix, (64,), (4,), (192,), 4 * 48 * 48, 4 * 96, (12, 8, 4), (12, 8, 4))
    dims = {key: 0.2 + 0.03 * (key[2] + key[3]) for key in levels.dim_keys()}
    last = {"attn_prefix": {(64, 4): 0.5}, "attn_dims": dims}
    parts = Pieces({(64, 4): 0.92}, {(64, 192): 0.1, (0, 192): 0.1}, 0.1, {64: 0.1, 0: 0.1}, {}, {}, **last)
    path.write_text(json.dumps(LatencyTable.fill(asked, levels, parts).to_dict()))


def test_dims_of_heads_go_from_the_search_into_the_engine(tmp_path, images):
    (tmp_path / "small.yaml").write_text(PROFILE.format(images=images))
    profile = load_profile(tmp_path / "small.yaml", [*QUICK, f"measure.table={tmp_path / 'table.json'}"])
    record_table(profile, tmp_path / "table.json")
    out = tmp_path / "out"
    manifest = build(profile, out, Console(quiet=True))
    plan = Plan.from_dict(yaml.safe_load((out / "plan.yaml").read_text()))
    config = json.loads((out / "model.json").read_text())
    for block, kept in zip(config["blocks"], plan.blocks, strict=True):
        assert block["qk_dim"] == (len(kept.qk[0]) if kept.qk else 12)
        assert block["v_dim"] == (len(kept.v[0]) if kept.v else 12)
    assert any(block["qk_dim"] < 12 or block["v_dim"] < 12 for block in config["blocks"])
    assert manifest.parity.max_abs <= 1e-4
    assert manifest.pruned.macs < manifest.dense.macs
    points = json.loads((out / "frontier.json").read_text())
    assert any("qk" in point["counts"] for point in points)
    with load(out) as model:
        assert model.predict(np.zeros((2, 32, 32, 3), np.uint8)).logits.shape == (2, 3)


def test_fewer_channels_are_an_explicit_choice_of_which_the_budget_knows(tmp_path, images):
    (tmp_path / "small.yaml").write_text(PROFILE.format(images=images))
    more = ["prune.embedding=32", f"measure.table={tmp_path / 'table.json'}"]
    profile = load_profile(tmp_path / "small.yaml", [*QUICK, *more])
    record_table(profile, tmp_path / "table.json")
    bench = run(profile, tmp_path / "out", Console(quiet=True), until="recover")
    plan = Plan.from_dict(yaml.safe_load((bench.folders["search"] / "plan.yaml").read_text()))
    assert plan.embed is not None
    assert len(plan.embed) == 32
    assert plan.model_sha256 == fingerprint(bench.dense)
    assert bench.pruned.config == prune(bench.dense, plan).config
    assert bench.pruned.config.dim == 32
    times, found = bench.json("measure", "embedding.json"), bench.json("search", "search.json")
    assert found["dense_ms"] == pytest.approx(found["dense_predicted_ms"])
    # the budget is a share of the dense model's time, which the searched one's is beside it
    assert found["budget_ms"] == pytest.approx(found["dense_ms"] / 1.3)
    table = LatencyTable.from_dict(found["table"])
    base_ms = table.predict_ms(Counts.dense([4] * 3, [192] * 3, 64))
    assert found["dense_ms"] == pytest.approx(base_ms * times["dense"] / times["base"])
