"""The bundled profile as a newcomer runs it."""

from __future__ import annotations

import json

import pytest

from vitprune_deploy.artifact import verify
from vitprune_deploy.build import build
from vitprune_deploy.console import Console
from vitprune_deploy.profile import load_profile
from vitprune_deploy.profile.loading import SHIPPED

pytestmark = [pytest.mark.e2e, pytest.mark.alone]


def test_the_quickstart_is_half_the_work_and_loses_little(tmp_path):
    # less training and measuring than a newcomer's, for the tests' own time
    less = ["measure.max_seconds=45", "recover.max_seconds=40", "validation.max_seconds=15", "search.landings=1"]
    profile = load_profile("quickstart", less, files_exist=True)
    manifest = build(profile, tmp_path / "out", Console(quiet=True))
    logged = json.loads((SHIPPED / "quickstart/train_log.jsonl").read_text().splitlines()[-1])
    assert manifest.dense.top1 == pytest.approx(logged["test_top1"], abs=0.1)  # resized by Pillow here and there
    drop = manifest.dense.top1 - manifest.pruned.top1
    assert drop <= 3.0  # recovery ends by the clock, so a busy machine trains less; a wrong weight costs ten times that
    assert manifest.verdict != "pass" or drop <= profile.accuracy.max_drop
    assert manifest.pruned.macs < 0.6 * manifest.dense.macs
    assert (manifest.verdict == "pass") == (not manifest.reasons)
    assert manifest.parity.max_abs <= 1e-3
    assert verify(tmp_path / "out") == manifest
