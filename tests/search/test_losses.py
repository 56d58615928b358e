from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from tiny import images, tiny_vit
from torch.nn import functional as F

from vitprune.errors import InputError, NotSupported
from vitprune.model.vit import fingerprint
from vitprune.search.losses import LossTable, Sizes, measure_losses, with_token_method
from vitprune.search.probes import ending_early
from vitprune.search.survey import curve_through, levels_to_measure
from vitprune.surgery import prune

SIZES = Sizes(heads=(4, 3, 2, 1, 0), mlp=(64, 48, 32, 16, 8, 0), patches=(49, 35, 25, 13, 7))


def kl(dense: torch.Tensor, changed: torch.Tensor) -> float:
    return float(F.kl_div(changed.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean"))


@pytest.fixture(scope="module")
def measured():
    model, pictures = tiny_vit(depth=3), images(12)
    before = fingerprint(model)
    table, rankings = measure_losses(model, pictures, SIZES, token_method="evit", probes=8)
    assert fingerprint(model) == before
    assert all(block.keep is None and block.attn and block.mlp for block in model.blocks)
    return model, pictures, table, rankings


@torch.no_grad()
def plan_loss(model, pictures, rankings, heads, mlp, patches=None, reducer=None) -> float:
    """KL of a plan that surgery made real."""
    patches = patches or [None] * len(heads)
    plan = rankings.plan(fingerprint(model), heads, mlp, patches, patches=49, reducer=reducer)
    return kl(model(pictures), prune(model, plan, rankings.weights(heads, mlp))(pictures))


def test_another_token_method_is_measured_alone_and_gives_what_it_gives_from_the_start():
    model, pictures = tiny_vit(), images(6)
    first, _ = measure_losses(model, pictures, SIZES, criterion="magnitude", token_method="evit", probes=4)
    told = []
    both = with_token_method(first, "tome", model, pictures, SIZES, probes=4, progress=lambda *a: told.append(a))
    alone, _ = measure_losses(model, pictures, SIZES, criterion="magnitude", token_method="tome", probes=4)
    assert (both.heads, both.mlp, both.token_method) == (first.heads, first.mlp, "tome")
    for found, wanted in zip(both.tokens, alone.tokens, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert told[-1][0] == told[-1][1] == len(told)  # progress ends where it said it would


def test_all_units_and_all_patches_cost_nothing_and_less_never_costs_less(measured):
    _, _, table, _ = measured
    for curves, full in ((table.heads, 4), (table.mlp, 64), (table.tokens, 49)):
        for curve in curves:
            losses = [curve[count] for count in sorted(curve, reverse=True)]
            assert max(curve) == full
            assert losses[0] == 0
            assert losses == sorted(losses)
    assert table.heads[0].keys() == set(SIZES.heads)
    assert table.mlp[1].keys() == set(SIZES.mlp)
    assert table.tokens[2].keys() == set(SIZES.patches)
    assert min(curve[0] for curve in table.heads + table.mlp) > 1e-3


@pytest.mark.parametrize("count", [2, 1, 0])  # middle, least, removed
def test_measured_head_losses_are_those_of_the_really_smaller_model(measured, count):
    model, pictures, table, rankings = measured
    real = plan_loss(model, pictures[:8], rankings, [4, count, 4], [64] * 3)
    assert table.head_loss(1, count) == pytest.approx(real, rel=1e-3)  # fp32 logits of unit size


@pytest.mark.parametrize("count", [16, 8, 0])
def test_measured_mlp_losses_are_those_of_the_really_smaller_model(measured, count):
    model, pictures, table, rankings = measured
    real = plan_loss(model, pictures[:8], rankings, [4] * 3, [count, 64, 64])
    assert table.mlp_loss(0, count) == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("count", [35, 7])
def test_token_losses_are_those_of_the_model_that_reduces_at_one_block(measured, count):
    model, pictures, table, rankings = measured
    out = [None, count, None]
    real = plan_loss(model, pictures[:8], rankings, [4] * 3, [64] * 3, out, "evit")
    assert table.tokens[1][count] == pytest.approx(real, rel=1e-3)


def test_compensation_loses_less_than_leaving_the_weights_as_they_are(measured):
    model, pictures, _, rankings = measured
    plan = rankings.plan(fingerprint(model), [4] * 3, [32] * 3, [None] * 3, patches=49)
    with torch.no_grad():
        plain = kl(model(pictures), prune(model, plan)(pictures))
    assert plan_loss(model, pictures, rankings, [4] * 3, [32] * 3) < 0.8 * plain


def test_keeping_tokens_is_free_and_a_gradual_schedule_is_charged_once():
    table = LossTable([{1: 0.0}], [{1: 0.0}], [{49: 0.0, 30: 0.2, 20: 0.5}], "evit")
    assert table.token_loss(0, 30, 30) == 0
    assert table.token_loss(0, 49, 20) == pytest.approx(0.5)
    assert table.token_loss(0, 49, 30) + table.token_loss(0, 30, 20) == pytest.approx(0.5)
    assert table.token_loss(0, 49, 10) == float("inf")  # was not measured: cannot be reached
    assert table.token_loss(0, 20, 30) == float("inf")
    with pytest.raises(InputError, match="block 0 has no loss for 40 patch tokens; it has 49, 30, 20"):
        table.token_loss(0, 40, 20)


def test_a_count_that_was_not_measured_is_refused():
    table = LossTable([{6: 0.0, 3: 0.1}], [{9: 0.0}], [{}], None)
    with pytest.raises(InputError, match="block 0 has no loss for 2 heads; it has 6, 3"):
        table.head_loss(0, 2)


def test_the_table_survives_json(measured):
    _, _, table, _ = measured
    assert LossTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@pytest.mark.parametrize("plain", [{}, {"heads": 3}, {"heads": [{"x": 1}], "mlp": [], "tokens": []}, []])
def test_what_is_no_table_is_refused(plain):
    with pytest.raises(InputError, match="this is not a loss table"):
        LossTable.from_dict(plain)


@torch.no_grad()
def test_a_method_that_halves_at_most_is_helped_by_the_blocks_before():
    model, pictures = tiny_vit(depth=4), images(6)
    table, rankings = measure_losses(
        model, pictures, Sizes((4,), (64,), (40, 25, 20, 13)), criterion="magnitude", token_method="tome"
    )
    assert [sorted(curve) for curve in table.tokens] == [
        [25, 40, 49],  # 49 -> 25 is all that one application can do
        [13, 20, 25, 40, 49],  # 49 -> 25 -> 13, and 49 -> 40 -> 20
        [13, 20, 25, 40, 49],
        [13, 20, 25, 40, 49],
    ]

    def loss(*out: int | None) -> float:
        return plan_loss(model, pictures, rankings, [4] * 4, [64] * 4, list(out), "tome")

    last = loss(None, 40, 20, None) - loss(None, 40, None, None)  # what block 2 adds
    expected = max(table.tokens[2][25], table.tokens[2][40] + last)
    assert last > 0
    assert table.tokens[2][20] == pytest.approx(expected, rel=1e-3)


def test_blocks_without_attention_neither_reduce_tokens_nor_lose_heads():
    model = tiny_vit(depth=3)
    model.blocks[1].attn = None
    table, rankings = measure_losses(
        model, images(4), Sizes((2,), (32,), (40, 13)), criterion="random", token_method="tome"
    )
    assert table.heads[1] == {0: 0.0}
    assert table.tokens[1] == {49: 0.0}
    assert set(table.tokens[2]) == {49, 40}  # 40 -> 20 is the most that an application can do
    assert (1, "attn") not in rankings.halves


def test_without_a_token_method_there_are_no_token_losses():
    table, _ = measure_losses(tiny_vit(), images(4), Sizes((2,), (32,), (25,)), criterion="magnitude")
    assert table.tokens == [{}, {}]
    assert table.token_method is None


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "magnitude", "random"])
def test_every_criterion_gives_a_table(criterion):
    table, rankings = measure_losses(tiny_vit(), images(4), Sizes((2, 0), (32, 0)), criterion=criterion)
    assert table.heads[0][4] == 0 < table.heads[0][2] <= table.heads[0][0]
    assert rankings.weights([2, 2], [32, 32]) == {}


def test_layer_scale_counts_in_the_ranking_and_stays_out_of_the_weights():
    model, pictures = tiny_vit(layer_scale=True), images(6)
    model.blocks[0].ls2.gamma.data[::2] = 0
    table, rankings = measure_losses(model, pictures, Sizes((2,), (16,)), probes=6)
    assert rankings.weight(0, "mlp", 16).isfinite().all()
    assert table.mlp_loss(0, 16) == pytest.approx(plan_loss(model, pictures, rankings, [4, 4], [16, 64]), rel=1e-3)


def test_models_without_classifier_lose_cosine():
    model, pictures = tiny_vit(classes=0), images(6)
    table, rankings = measure_losses(model, pictures, Sizes((2,), (16,)))
    plan = rankings.plan(fingerprint(model), [2, 4], [64, 64], [None] * 2, patches=49)
    with torch.no_grad():
        slim = prune(model, plan, rankings.weights([2, 4], [64, 64]))
        real = 1 - F.cosine_similarity(model(pictures), slim(pictures)).mean()
    assert table.head_loss(0, 2) == pytest.approx(float(real), rel=1e-3)


def test_under_a_norm_across_units_a_half_stays_whole_or_goes():
    table, _ = measure_losses(tiny_vit(mlp_norm=True), images(4), Sizes((2, 0), (32, 16, 0)))
    assert set(table.mlp[0]) == {64, 0}
    assert set(table.heads[0]) == {4, 2, 0}


def test_a_method_that_scores_by_the_class_token_refuses_a_model_without():
    model = tiny_vit(class_token=False, pool="avg")
    with pytest.raises(
        NotSupported, match="evit scores patches by the class token's attention, and this model has no class token"
    ):
        measure_losses(model, images(2), SIZES, token_method="evit")


def test_progress_counts_up_to_what_it_promised():
    reports = []
    measure_losses(
        tiny_vit(), images(4), SIZES, criterion="random", token_method="tome", progress=lambda *r: reports.append(r)
    )
    assert [done for done, _, _ in reports] == list(range(1, len(reports) + 1))
    assert {total for _, total, _ in reports} == {len(reports)}
    assert Counter("ranked" in what for _, _, what in reports)[True] == 4


def test_images_of_which_few_are_probes_are_measured_on_the_first_of_them():
    model, pictures = tiny_vit(), images(12)
    few, _ = measure_losses(model, pictures, Sizes((2,), (64,)), criterion="magnitude", probes=3)
    first, _ = measure_losses(model, pictures[:3], Sizes((2,), (64,)), criterion="magnitude", probes=64)
    assert few.heads[0][2] == pytest.approx(first.heads[0][2], rel=1e-4)  # fp32, other batch sizes


@pytest.mark.parametrize(
    ("levels", "chosen"),
    [([], []), ([0], [0]), ([5, 4, 3, 2, 1, 0], [3, 1, 0]), ([7], [7]), ([9, 6], [6]), ([9, 6, 3], [6, 3])],
)
def test_a_middle_the_least_and_no_size_are_measured(levels, chosen):
    assert levels_to_measure(levels) == chosen


def test_the_curve_is_linear_in_the_error_between_what_was_measured():
    error = torch.tensor([0.0, 0.1, 0.2, 0.4, 1.0])  # after removing 0..4 of 4 units
    curve = curve_through(error, [3, 2, 1, 0], {2: 0.4, 0: 2.0})
    assert curve == pytest.approx({3: 0.2, 2: 0.4, 1: 0.8, 0: 2.0})


def test_the_curve_never_falls_where_a_measurement_did():
    error = torch.tensor([0.0, 0.1, 0.2, 0.4, 1.0])
    assert curve_through(error, [2, 1, 0], {2: 0.4, 0: 0.3}) == pytest.approx({2: 0.4, 1: 0.4, 0: 0.4})


def test_a_curve_without_error_passes_through_its_measurement():
    assert curve_through(torch.zeros(5), [2, 0], {2: 0.1, 0: 0.7}) == pytest.approx({2: 0.1, 0: 0.7})


@pytest.mark.parametrize("variant", [{}, {"distilled": True}, {"residual": "parallel"}, {"pool": "avg"}])
@torch.no_grad()
def test_leaving_out_what_the_output_does_not_read_changes_nothing(variant):
    model, pictures = tiny_vit(**variant), images(3)
    with ending_early(model):
        early = model(pictures)
        assert model.blocks[-1].prefix_only == (variant != {"pool": "avg"})
    assert not model.blocks[-1].prefix_only
    torch.testing.assert_close(early, model(pictures), rtol=1e-5, atol=1e-5)  # fp32, smaller products
