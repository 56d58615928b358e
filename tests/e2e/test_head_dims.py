"""A build that may remove dims of heads: search, plan, surgery, export, and a service on what comes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from small import PROFILE

from vitprune.plan import Plan
from vitprune_deploy.build import build
from vitprune_deploy.console import Console
from vitprune_deploy.profile import load_profile
from vitprune_deploy.runtime import load

pytestmark = pytest.mark.e2e
QUICK = ["prune.head_dims={enabled: true, multiple: 4, minimum: 4}", "prune.tokens.method=none",
         "prune.heads.enabled=false", "prune.mlp.enabled=false", "prune.depth.enabled=false", "budget.speedup=1.01",
         "search.landings=0", "search.evaluations=3", "measure.max_seconds=3", "recover.max_steps=2",
         "validation.runs=20", "validation.max_seconds=2"]  # fmt: skip


def test_dims_of_heads_go_from_the_search_into_the_engine(tmp_path, images):
    (tmp_path / "small.yaml").write_text(PROFILE.format(images=images))
    out = tmp_path / "out"
    manifest = build(load_profile(tmp_path / "small.yaml", QUICK), out, Console(quiet=True))
    table = json.loads((out / "latency_table.json").read_text())
    assert table["levels"]["qk"] == table["levels"]["v"] == [12, 8, 4]
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
