from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tiny import images, tiny_vit

from vitprune.search.counts import Counts
from vitprune.search.frontier import Point
from vitprune.search.latency import Circumstances, LatencyTable, Levels, Pieces
from vitprune.surgery import reduce_tokens
from vitprune_deploy.build.judge import reasons
from vitprune_deploy.report import charts, figures, words
from vitprune_deploy.report.facts import Facts, Frame, ModelFacts, Picture, Whole
from vitprune_deploy.report.page import render
from vitprune_deploy.report.pictures import DARK, MOST_BYTES, data_uri, draw, pictures
from vitprune_deploy.report.survivors import survivors
from vitprune_deploy.validate import Limits, Verdict, compare_accuracy

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Checker(HTMLParser):
    """Collects tags, and what is closed that was not open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.wrong: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")


def latency(middle, samples=1000):
    spread = {50: 1.0, 90: 1.06, 99: 1.2}
    return {f"p{n}": middle * f for n, f in spread.items()} | {
        "samples": samples,
        "intervals_ms": {f"p{n}": [0.98 * middle * f, 1.02 * middle * f] for n, f in spread.items()},
        "raw_ms": {f"p{n}": 1.1 * middle * f for n, f in spread.items()},
        "rejected": 37,
        "gated": True,
        "reference_ms": 8.0,
        "reference_drift": 0.1,
    }


def a_table(noise=0.03):
    rng = np.random.default_rng(0)
    levels = Levels(1, (100, 80, 60, 40, 20), (4, 3, 2, 1), (384, 256, 128, 64), 4 * 96 * 96, 8 * 96)
    circumstances = Circumstances({"cpu": "a CPU"}, "onnxruntime", "fp32", 8, 2, (30, 30), "tiny")
    attn = {(n, h): (0.02 + 0.001 * (n + 1) * h + 1e-6 * (n + 1) ** 2 * h) * (1 + noise * rng.standard_normal())
            for n in (100, 60, 20) for h in (4, 2, 1)}  # fmt: skip
    mlp = {
        (n, m): (0.01 + 2e-5 * (n + 1) * m) * (1 + noise * rng.standard_normal())
        for n in (100, 60, 20)
        for m in (384, 128, 64)
    }
    steps = dict.fromkeys(levels.steps(), 0.02)
    return LatencyTable.fill(circumstances, levels, Pieces(attn, mlp, 0.3, {100: 0.1, 20: 0.05}, {}, {"evit": steps}))


def minimal_facts():
    model = ModelFacts(params=700_000, macs=70_000_000, latency={})
    return Facts(
        title="tiny", created="2025-01-01",
        command="vitprune-deploy build p.yaml", verdict=Verdict("unstable", ["why"]),
        limits=Limits(4.0), runtime="onnxruntime", precision="fp32", batch=1, image_size=(30, 30),
        dense=model, pruned=model,
    )  # fmt: skip


def full_facts(name="coat"):
    rng = np.random.default_rng(0)
    slow, fast = (tuple(rng.gamma(400, ms / 400, 1000)) for ms in (8.0, 3.9))
    labels = rng.integers(0, 4, 2000)
    dense = np.eye(4)[np.where(rng.random(2000) < 0.94, labels, 0)]
    pruned = np.eye(4)[np.where(rng.random(2000) < 0.93, labels, 1)]
    accuracy = compare_accuracy(dense, pruned, labels, names=(name, "dress", "bag", "boot"))
    had = Counts((4,) * 6, (384,) * 6, (100,) * 6)
    has = Counts((4, 4, 3, 2, 2, 0), (384, 256, 256, 128, 64, 64), (100, 80, 80, 60, 40, 40))
    points = [Point(b, b - 0.01, 0.9 / b**2 - 0.01, has, "evit") for b in np.linspace(2, 8, 60)]
    row = {"predicted_ms": 3.9, "measured_ms": 3.95, "low_ms": 3.9, "high_ms": 4.0, "loss": 0.06, "round": 1}
    tried = [(s, s * 1.3 + 0.01 * math.sin(9 * s)) for s in np.linspace(0.05, 0.2, 20)]
    pixels = (rng.random((30, 30, 3)) * 255).astype(np.uint8)
    wholes = [Whole(p, p * f, 0.97 * p * f, 1.03 * p * f, p > 5) for p, f in ((3, 1.02), (4, 0.98), (6, 1.01), (8, 1))]
    frames = tuple(Frame(f"after block {b}: 80 of 100 tokens", data_uri(pixels)) for b in range(5))
    return replace(
        minimal_facts(),
        title=f"{name} on this CPU",
        description=f"a small ViT {name}",
        verdict=Verdict("fail", [f"top-1 of {name} fell by 1.20 points"]),
        limits=Limits(4.0, 50, max_drop=1.0, memory_mb=200),
        threads=2,
        batch=8,
        asked="twice as fast as the dense model",
        dense=ModelFacts(700_000, 70_000_000, latency(8.0), had, 2_800_000, 8.1, 55.0, slow),
        pruned=ModelFacts(400_000, 30_000_000, latency(3.9), has, 1_600_000, 3.9, 44.0, fast),
        accuracy=accuracy.to_dict(),
        reference_top1=94.1,
        parity={"max_abs": 3.1e-5, "top1_agreement": 99.9, "images": 1000},
        consistency={"arithmetic": "fp32", "passed": False, "checks": [
            {"name": "alone", "passed": True, "batches": [3, 8], "max_abs": 2.5e-6, "limit": 1e-4, "rows": 11,
             "wrong": 0, "ties": 1, "skipped": None},
            {"name": "repeated", "passed": False, "batches": [8], "max_abs": 0.25, "limit": 1e-4, "rows": 8, "wrong": 3,
             "ties": 0, "skipped": None},
            {"name": "unfused", "passed": True, "batches": [], "max_abs": None, "limit": None, "rows": 0, "wrong": 0,
             "ties": 0, "skipped": f"no file {name}"},
        ]},
        fusion={"runtime": "onnxruntime", "warnings": [f"pruning of {name} broke a fusion"], "unread": None,
                "dense": [{"block": 0, "fused": True, "kernels": [f"mha {name}"], "around": {}}],
                "pruned": [{"block": 0, "fused": False, "kernels": ["MatMul", "Softmax"], "around": {"cast": 2}}]},
        token_method="evit",
        frontier=tuple(points),
        search={"methods": {"evit": 0.07, "tome": None}, "status": "landed", "reason": f"measured twice {name}",
                "measured": [row, row | {"round": 2, "measured_ms": 4.1, "high_ms": 4.2, "loss": 0.05},
                             row | {"measured_ms": 8.0, "low_ms": 7.9, "high_ms": 8.1, "loss": 0.0,
                                    "counts": had.to_dict()}],
                "chosen": row, "budget_ms": 4.0,
                "evaluations": tried, "rank_correlation": 0.91, "held_out_loss": 0.07},
        table=a_table(),
        wholes=tuple(wholes),
        pictures=(Picture(name, frames), Picture("bag", frames)),
        engines=({"runtime": "onnxruntime", "precision": "fp32", "status": "run", "file": f"{name}.onnx"},
                 {"runtime": "tensorrt-rtx", "precision": "fp16", "status": "built", "model": "model"}),
        device={"cpu": f"CPU {name}", "cores": 2, "flags": ["avx2", "avx512f"], "gpus": [], "threads": None},
        machine={"load_1min": 0.3},
        versions={"torch": "2.14.1", "timm": None},
        notes=("Recovered in 300 steps.",),
        profile_yaml=f"description: {name}\nbudget: {{speedup: 2}}\n",
    )  # fmt: skip


@pytest.fixture(scope="module")
def full_page():
    return render(full_facts())


@pytest.mark.parametrize("facts", [minimal_facts, full_facts])
def test_a_page_is_well_formed_and_needs_no_network(facts):
    page = render(facts())
    found = Checker(page)
    assert not found.wrong
    assert not found.open
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert not re.search(r"https?://|url\(|@import", page)
    assert page.startswith("<!doctype html>")


def test_a_page_says_the_verdict_its_reasons_and_the_figures_with_units(full_page):
    for text in ("Fail", "top-1 of coat fell by 1.20 points", "p50 at most 4.00 ms", "twice as fast as the dense model",
                 "2.05 times faster", "3.90 ms (3.82 to 3.98)", "2.80 MB", "0.400 million", "points (",
                 "built, not run here", "built, run and measured here", "1,000 runs counted", "Recovered in 300 steps.",
                 "vitprune-deploy build p.yaml", "Spearman&#39;s rank correlation 0.91", "avx2, avx512f"):  # fmt: skip
        assert text in full_page, text


def test_a_page_shows_how_consistent_the_engine_is_and_what_became_of_attention(full_page):
    rows = [re.sub(r"<[^>]+>", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", full_page)]
    for row in (
        "|alone||3, 8||2.5e-06||0.0001||passed, 1 tied|",
        "|repeated||8||0.25||0.0001||failed in 3 of 8 rows|",
        "|unfused||-||-||-||not made: no file coat|",
        "|0||one kernel: mha coat||MatMul + Softmax||2 cast|",
    ):
        assert row in rows, row
    assert "<b>Warning:</b> pruning of coat broke a fusion." in full_page
    unread = {"runtime": "tensorrt", "dense": [], "pruned": [], "warnings": [], "unread": "it keeps that to itself"}
    assert "Not known: it keeps that to itself." in render(replace(minimal_facts(), fusion=unread))


def test_a_page_without_anything_optional_says_what_is_missing():
    page = render(minimal_facts())
    for text in (
        "No latency was measured",
        "Accuracy was not measured",
        "No frontier was computed",
        "No whole models",
        "no latency table",
    ):
        assert text in page, text
    assert "<svg" not in page


def test_nothing_lost_is_no_negative_zero_and_features_get_no_class():
    facts = full_facts()
    paired = {"drop": 0.0, "low": -0.001, "high": 0.001, "lost": 0, "gained": 0, "p_value": 1.0}
    page = render(
        replace(
            facts,
            accuracy=dict(facts.accuracy) | {"paired": paired},
            parity={"max_abs": 3.1e-5, "top1_agreement": None, "images": 9},
        )
    )
    assert "-0.00" not in page
    assert "+0.00 points (+0.00 to +0.00)" in page
    assert "differ by at most 3.1e-05.</p>" in page


def test_names_are_escaped_wherever_they_stand():
    plain, evil = Checker(render(full_facts())), Checker(render(full_facts(EVIL)))
    assert evil.tags == plain.tags
    assert "<script" not in render(full_facts(EVIL))
    assert "&lt;script&gt;" in render(full_facts(EVIL))
    assert "<script" not in charts.bars(EVIL, EVIL, [2], [1])


def test_a_page_stays_small_with_large_tables_and_many_samples():
    facts = full_facts()
    many = tuple(np.random.default_rng(0).gamma(400, 0.02, 20_000))
    points = facts.frontier * 200
    page = render(replace(facts, dense=replace(facts.dense, runs_ms=many), frontier=points))
    assert len(page.encode()) < 1_000_000


def test_unchanged_counts_are_said_to_be_the_dense_model():
    facts = full_facts()
    assert "Nothing was pruned" in render(replace(facts, pruned=replace(facts.pruned, counts=facts.dense.counts)))
    assert "Nothing was pruned" not in render(facts)


def marks(svg, kind):
    """Marks of a class, those of the legend aside."""
    return len(re.findall(rf'class="{kind}"', svg))


def test_charts_have_a_mark_for_each_figure():
    facts = full_facts()
    assert marks(figures.latency(facts).svgs[0], "dot pruned") == 3
    assert marks(figures.latency(facts).svgs[0], "line dense") == 1
    assert marks(figures.latency(facts).svgs[0], "rule budget") == 1
    frontier = figures.frontier(facts).svgs[0]
    assert marks(frontier, "dot dense") == 1
    assert (marks(frontier, "dot measured"), marks(frontier, "dot chosen"), marks(frontier, "line frontier")) == (
        2,
        1,
        1,
    )
    assert [marks(svg, "bar pruned") for svg in figures.blocks(facts).svgs] == [6, 6, 6]
    wholes = figures.wholes(facts).svgs[0]
    assert (marks(wholes, "dot fitted"), marks(wholes, "dot measured")) == (2, 2)
    pieces = figures.pieces(facts).svgs[0]
    assert (marks(pieces, "dot attention"), marks(pieces, "dot mlp")) == (9, 9)
    assert marks(figures.losses(facts).svgs[0], "dot measured") == 20


def test_latency_without_single_runs_is_drawn_from_its_percentiles():
    facts = full_facts()
    bare = replace(facts, dense=replace(facts.dense, runs_ms=()), pruned=replace(facts.pruned, runs_ms=()))
    svg = figures.latency(bare).svgs[0]
    assert marks(svg, "line dense") == 0
    assert marks(svg, "line dense sketch") == 1
    assert marks(svg, "dot dense") == 3


def test_bars_are_as_high_as_their_share_of_the_largest():
    svg = charts.bars("heads", "heads", [4, 2], [1, 2])
    heights = [float(h) for h in re.findall(r'<rect class="bar \w+"[^>]* height="([\d.]+)"', svg)]
    full = max(heights)
    assert [round(h / full, 2) for h in heights] == [1, 0.25, 0.5, 0.5]


def test_numbers_keep_three_digits_and_their_unit():
    assert [words.ms(v) for v in (0.0123, 3.9, 12.34, 1234.5, 0, None)] == [
        "0.0123 ms", "3.90 ms", "12.3 ms", "1234 ms", "0.00 ms", "–"]  # fmt: skip
    assert (words.count(4.6e9), words.count(7e5)) == ("4.60 billion", "0.700 million")


def test_without_labels_the_agreement_is_still_shown():
    logits = np.eye(4)[np.arange(200) % 4]
    accuracy = compare_accuracy(logits, logits, np.full(200, -1)).to_dict()
    page = render(replace(full_facts(), accuracy=accuracy, reference_top1=None))
    assert "carry no classes" in page
    assert "100.00% (98.12 to 100.00)" in page  # Wilson: 1 / (1 + 1.96^2 / 200)


def test_ticks_are_round_and_lie_on_the_axis():
    assert charts.Axis("x", 0.13, 0.93).ticks() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert charts.Axis("x", 0, 100).ticks(5) == [0, 20, 40, 60, 80, 100]
    one = charts.Axis.around("x", [5.0, 5.0])
    assert one.low < 5 < one.high
    assert charts.Axis.around("x", []).ticks()


def test_a_piece_is_predicted_exactly_where_the_form_holds():
    found = figures._left_out(a_table(noise=0.0), "mlp")
    assert len(found) == 9
    for predicted, measured in found.values():
        assert predicted == pytest.approx(measured, rel=1e-6)  # least squares on 8 exact figures


def test_survivors_of_evit_are_the_patches_that_the_class_token_attends_to_most():
    model, pixels = tiny_vit(depth=3, keep={0: 30, 2: 10}, reducer="evit"), images(2)
    first, second, third = survivors(model, pixels)
    with torch.no_grad():
        *_, view = model.blocks[0].attend(model.embed(pixels))
        row = (view.q[:, :, 0:1] @ view.k.transpose(-2, -1) * view.scale).softmax(-1).mean(1)[:, 0, 1:].tolist()
    for image in range(2):
        ranked = sorted(range(49), key=lambda patch: -row[image][patch])
        assert [first.holder[image][patch] for patch in ranked] == [*range(29), *[-1] * 20]
        assert first.fused[image].tolist() == [patch in ranked[29:] for patch in range(49)]
    assert (first.tokens, second.tokens, third.tokens) == (30, 30, 10)
    assert (second.holder == first.holder).all()
    assert set(np.flatnonzero(third.holder[0] >= 0)) < set(np.flatnonzero(first.holder[0] >= 0))
    # nine are kept, unless the fused token is among them and holds none
    assert all(np.count_nonzero(row >= 0) in (8, 9) for row in third.holder)


def test_survivors_of_tome_are_the_regions_that_its_matching_merges():
    model, pixels = tiny_vit(depth=2, keep={0: 40, 1: 25}, reducer="tome"), images(1)
    first, second = survivors(model, pixels)
    with torch.no_grad():
        *_, view = model.blocks[0].attend(model.embed(pixels))
    keys = view.k.mean(1)[0]
    keys = keys / keys.norm(dim=-1, keepdim=True)
    even, odd = range(2, 50, 2), range(1, 50, 2)  # the class token is at 0
    best = {i: max(odd, key=lambda j: float(keys[i] @ keys[j])) for i in even}
    gone = sorted(even, key=lambda i: -float(keys[i] @ keys[best[i]]))[:9]
    want = {tuple(sorted([j, *(i for i in gone if best[i] == j)])) for j in odd} | {(i,) for i in even if i not in gone}
    got = {tuple((np.flatnonzero(first.holder[0] == token) + 1).tolist()) for token in range(40)}
    assert got == want
    assert not first.fused.any()
    assert set(second.holder[0]) == set(range(25))
    for token in range(40):  # what was merged stays together
        assert len(set(second.holder[0][first.holder[0] == token])) == 1


def test_patches_that_wait_are_parked_until_they_are_chosen_again():
    model = reduce_tokens(tiny_vit(depth=6), "evovit", {2: 20})
    maps = survivors(model, images(2))
    for one in maps[2:]:
        assert (one.parked.sum(1) == 29).all()
        assert np.array_equal(one.holder >= 0, ~one.parked)  # a patch is held, or waits
    assert np.array_equal(maps[2].parked, maps[3].parked)
    assert not maps[1].parked.any()
    captions = [
        frame.caption for frame in pictures(model, images(1), mean=(0.5,) * 3, std=(0.5,) * 3, names=["a"])[0].frames
    ]
    assert captions[1] == "after block 2: 20 of 49 tokens"
    chosen_anew = not np.array_equal(maps[3].parked[:1], maps[4].parked[:1])
    assert len(captions) == 2 + chosen_anew


def test_survivors_of_a_model_that_keeps_all_tokens_are_the_patches_themselves():
    (only,) = survivors(tiny_vit(depth=1), images(1))
    assert only.holder.tolist() == [list(range(49))]
    assert not only.fused.any()


def test_pictures_darken_what_is_gone_tint_what_is_fused_and_paint_regions_in_their_mean():
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, 0], pixels[:, 1], pixels[:, 2:] = 100, 200, 250
    drawn = draw(pixels, np.array([0, 0, -1, -1]), np.array([False, False, False, True]), np.zeros(4, bool), (2, 1))
    wide = drawn.shape[1] // 4
    middle = [drawn[drawn.shape[0] // 2, int((i + 0.5) * wide)].tolist() for i in range(4)]
    assert middle[0] == middle[1] == [150, 150, 150]
    assert middle[2] == [int(250 * DARK)] * 3
    assert middle[3][0] > middle[3][2]  # orange
    waiting = draw(pixels, np.array([0, 0, -1, 2]), np.zeros(4, bool), np.array([False, False, True, False]), (2, 1))
    assert middle[2] != waiting[waiting.shape[0] // 2, int(2.5 * wide)].tolist()
    assert waiting[0, int(2.5 * wide)][2] > waiting[0, int(2.5 * wide)][0]  # violet
    assert drawn[0, 2 * wide].tolist() != middle[2]  # the border of the region
    assert drawn[0, wide].tolist() == middle[1]  # none inside it


def test_pictures_show_each_block_that_reduces_and_stay_within_their_size():
    model = tiny_vit(depth=3, keep={0: 30, 2: 10}, reducer="evit")
    found = pictures(model, images(3), mean=(0.5,) * 3, std=(0.5,) * 3, names=["a", "b", "c"])
    assert [picture.name for picture in found] == ["a", "b", "c"]
    first, *left = (frame.caption for frame in found[0].frames)
    assert first == "the image, as the model gets it"
    assert left == ["after block 0: 30 of 49 tokens", "after block 2: 10 of 49 tokens"]
    assert sum(len(frame.uri) for picture in found for frame in picture.frames) < MOST_BYTES
    assert pictures(tiny_vit(), images(1), mean=(0.5,) * 3, std=(0.5,) * 3, names=["a"]) == ()


def test_pictures_of_grey_images_are_grey():
    model = tiny_vit(depth=1, channels=1, keep={0: 25}, reducer="tome")
    assert len(pictures(model, images(1, channels=1), mean=(0.3,), std=(0.3,), names=["a"])[0].frames) == 2


@pytest.mark.parametrize(("verdict", "shown"), [("pass", ()), ("fail", ("late", "over 5 ms"))])
def test_what_the_search_missed_is_no_reason_where_the_engine_passes(verdict, shown):
    """A slow minute during landing leaves status ``over`` behind, and the final measurement may yet pass."""
    found = {"verdict": {"verdict": verdict, "reasons": ["late"] if verdict == "fail" else []}}
    assert reasons(found, {"status": "over", "reason": "over 5 ms"}) == shown
