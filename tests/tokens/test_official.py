"""Official checkpoints: made-up weights in the authors' layout must give the logits that their own code gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vitprune.errors import InputError
from vitprune.official import from_official
from vitprune.surgery import reduce_tokens
from vitprune.tokens.diffrate import _steps

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SCHEDULES = {"dynamicvit": "published-0.7", "evit": "published-0.7", "evovit": "published-0.5"}


@pytest.fixture
def tool(monkeypatch):
    """``tools/official_logits.py``, which wrote the answers down."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    import official_logits

    return official_logits


def loaded(method, tool, folder):
    """What the official code said, and its checkpoint as we read it."""
    said = json.loads((HERE / "official" / f"{method}.json").read_text())
    torch.save({"model": tool.made_up(said["shapes"])}, folder / "official.pth")
    return said, from_official(method, "deit_tiny_patch16_224", folder / "official.pth", **tool.TINY)


@pytest.mark.parametrize("method", SCHEDULES)
def test_our_logits_are_those_of_the_official_code(method, tool, tmp_path):
    said, found = loaded(method, tool, tmp_path)
    model = reduce_tokens(found.converted.model, method, SCHEDULES[method], found.method_weights).double()
    with torch.no_grad():
        logits = model(tool.made_up_images().double())
    # positions are folded into the class token in fp32
    torch.testing.assert_close(logits, torch.tensor(said["logits"], dtype=torch.float64), rtol=0, atol=1e-6)


def test_spvit_agrees_where_it_is_told_the_counts_that_the_official_code_chose(tool, tmp_path):
    said, found = loaded("spvit", tool, tmp_path)
    for image, kept, logits in zip(tool.made_up_images(), said["kept"], said["logits"], strict=True):
        assert 196 > kept[0] > kept[1] > kept[2] > 10  # each stage removes some
        counts = {block: k + number for number, (block, k) in enumerate(zip((3, 6, 9), kept, strict=True), start=1)}
        model = reduce_tokens(found.converted.model, "spvit", counts, found.method_weights)
        with torch.no_grad():
            ours = model(image[None])[0]
        torch.testing.assert_close(ours, torch.tensor(logits), rtol=0, atol=1e-4)  # fp32 there, and masks with an eps


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("dynamicvit", "this is no checkpoint of DynamicViT: it has no weights named score_predictor"),
        ("evovit", "this is no checkpoint of Evo-ViT for DeiT: it has no weights named qks"),
        ("spvit", "this is no checkpoint of SPViT: its score_predictor weighs no heads"),
    ],
)
def test_another_checkpoint_is_refused_in_one_sentence(method, says, tool, tmp_path):
    torch.save({"blocks.0.norm1.weight": torch.ones(48)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=says):
        from_official(method, "deit_tiny_patch16_224", tmp_path / "other.pth", **tool.TINY)


@torch.no_grad()
def test_diffrate_agrees_where_it_is_told_what_the_official_code_was(tool, tmp_path):
    said, found = loaded("diffrate", tool, tmp_path)
    counts = [left for _, _, left in _steps("s-2.9")]
    told = {f"blocks.{block}.reducer.ranked": torch.tensor(ranked)
            for block, (entering, ranked, left) in enumerate(_steps("s-2.9")) if left < entering}  # fmt: skip
    model = reduce_tokens(found.converted.model, "diffrate", counts, told).double()
    logits = model(tool.made_up_images().double())
    torch.testing.assert_close(logits, torch.tensor(said["logits"], dtype=torch.float64), rtol=0, atol=1e-6)
