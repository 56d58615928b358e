"""Published schedules against the token tables and figures of the papers and their official code."""

from __future__ import annotations

import pytest
import torch
from test_macs import deit_small
from tiny import images, tiny_vit

from vitprune import parts
from vitprune.errors import InputError, NotSupported
from vitprune.macs import macs
from vitprune.schedules import counts
from vitprune.surgery import reduce_tokens
from vitprune.tokens.base import Reducer

# tokens that enter the MLP of each block of a 12-block model at 224 pixels, the class token among them: what the
# official code gave (ToMe, EViT, PiToMe with their defaults)
TABLES = {
    ("evit", "published-0.9"): [197] * 3 + [179] * 3 + [163] * 3 + [148] * 3,
    ("evit", "published-0.8"): [197] * 3 + [159] * 3 + [129] * 3 + [105] * 3,
    ("evit", "published-0.7"): [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3,
    ("evit", "published-0.6"): [197] * 3 + [120] * 3 + [74] * 3 + [46] * 3,
    ("evit", "published-0.5"): [197] * 3 + [100] * 3 + [52] * 3 + [28] * 3,
    ("evit_drop", "published-0.7"): [197] * 3 + [139] * 3 + [98] * 3 + [69] * 3,
    ("dynamicvit", "published-0.9"): [197] * 3 + [177] * 3 + [159] * 3 + [143] * 3,
    ("dynamicvit", "published-0.8"): [197] * 3 + [157] * 3 + [126] * 3 + [101] * 3,
    ("dynamicvit", "published-0.7"): [197] * 3 + [138] * 3 + [97] * 3 + [68] * 3,
    ("dynamicvit", "published-0.5"): [197] * 3 + [99] * 3 + [50] * 3 + [25] * 3,
    ("evovit", "published-0.5"): [197] * 4 + [99] * 8,
    ("spvit", "published-0.617"): [197] * 3 + [123] * 3 + [75] * 3 + [31] * 3,
    ("spvit", "published-0.7"): [197] * 3 + [139] * 3 + [99] * 3 + [71] * 3,
    ("diffrate", "published-s-2.3"): [197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3],
    ("diffrate", "published-s-2.9"): [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3],
    ("diffrate", "published-s-3.1"): [197, 196, 186, 164, 150, 141, 133, 121, 103, 78, 68, 3],
    ("diffrate", "published-b-8.7"): [197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3],
    ("diffrate", "published-b-11.5"): [197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3],
    ("tome", "published-r8"): [189, 181, 173, 165, 157, 149, 141, 133, 125, 117, 109, 101],
    ("tome", "published-r13"): [184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41],
    ("tome", "published-r16"): [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11],
    ("tome", "published-r13-decreasing"): [171, 148, 127, 109, 93, 79, 68, 59, 52, 48, 46, 46],
    ("pitome", "published-0.95"): [188, 179, 171, 163, 155, 148, 141, 134, 128, 122, 116, 111],
    ("pitome", "published-0.925"): [183, 170, 158, 147, 137, 127, 118, 110, 102, 95, 88, 82],
    ("pitome", "published-0.9"): [178, 161, 145, 131, 118, 107, 97, 88, 80, 73, 66, 60],
}
# multiply-accumulates of DeiT-S in 10^9: fvcore on the official code. PiToMe's authors count an MLP on the tokens that
# come in, not on those that are left, so their figures are no measure of ours.
GMACS = {
    ("evit", "published-0.9"): 4.030,
    ("evit", "published-0.8"): 3.484,
    ("evit", "published-0.7"): 3.036,
    ("evit", "published-0.6"): 2.641,
    ("evit", "published-0.5"): 2.314,
    ("evit_drop", "published-0.7"): 3.003,
    ("dynamicvit", "published-0.9"): 4.050,
    ("dynamicvit", "published-0.8"): 3.471,
    ("dynamicvit", "published-0.7"): 2.988,
    ("dynamicvit", "published-0.5"): 2.234,
    ("evovit", "published-0.5"): 3.039,
    ("diffrate", "published-s-2.3"): 2.327,
    ("diffrate", "published-s-2.9"): 2.905,
    ("diffrate", "published-s-3.1"): 3.108,
    ("tome", "published-r8"): 3.428,
    ("tome", "published-r13"): 2.712,
    ("tome", "published-r13-decreasing"): 2.119,
}
ALL = [(name, schedule) for name in parts.names("vitprune.tokens")
       for schedule in parts.load("vitprune.tokens", name, Reducer).schedules]  # fmt: skip


@pytest.mark.parametrize("case", TABLES, ids=str)
def test_counts_are_those_of_the_official_code(case):
    assert [1 + left for left in counts(*case, 12, 196, 1)] == TABLES[case]


@pytest.mark.parametrize("case", GMACS, ids=str)
def test_deit_small_costs_what_was_published(case):
    left = counts(*case, 12, 196, 1)
    entering = (196, *left)
    keep = {block: after for block, after in enumerate(left) if after != entering[block]}
    assert macs(deit_small(keep, case[0])) == pytest.approx(1e9 * GMACS[case], rel=0.005)


@pytest.mark.parametrize(
    ("case", "depth", "last"),
    [
        (("evit", "published-0.7"), 12, 201),  # ceil(0.7 * 576) + 1 = 405, then 285, then 201
        (("evit_drop", "published-0.7"), 12, 199),  # 404, 283, 199
        (("dynamicvit", "published-0.7"), 12, 197),  # int(576 * 0.7 ** 3)
        (("evovit", "published-0.5"), 12, 288),
        (("tome", "published-r23"), 24, 24),  # 576 - 24 * 23
        (("pitome", "published-0.9"), 2, 468),  # 576 - 57, then 519 - 51 (of 51.9)
    ],
)
def test_the_rules_hold_at_384_pixels(case, depth, last):
    assert counts(*case, depth, 576, 1)[-1] == last


@pytest.mark.parametrize("prefix", [{}, {"distilled": True}, {"registers": 2}], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_schedule_runs_in_a_model_of_twelve_blocks_and_leaves_the_prefix_alone(case, prefix):
    dense = tiny_vit(depth=12, dim=16, heads=2, mlp=16, image=224, patch=16, **prefix)
    model, first = reduce_tokens(dense, *case), dense.config.prefix
    assert model.config.prefix == first
    with torch.no_grad():
        for batch in (1, 3):
            state, seen = model.embed(images(batch, 224)), []
            for block in model.blocks:
                state = block(state)
                seen.append(state.x.shape[1] - first)
            assert tuple(seen) == counts(*case, 12, 196, first)
            assert model.classify(state).shape == (batch, 10)


def test_counts_may_be_given_for_some_blocks_or_for_all():
    assert counts("evit", {1: 30, 2: 10}, 4, 49, 1) == (49, 30, 10, 10)
    assert counts("evit", [49, 30, 10, 10], 4, 49, 1) == (49, 30, 10, 10)


@pytest.mark.parametrize(
    ("method", "wanted", "says"),
    [
        ("evit", "published-0.75", r"evit has no published schedule 'published-0.75', .* did you mean published-0.7\?"),
        ("evit", {1: 30, 2: 40}, "evit can leave 2 to 30 patch tokens of the 30 that enter block 2, not 40"),
        ("evit", {0: 60}, "can leave 2 to 49 patch tokens of the 49 that enter block 0, not 60"),
        ("evit", {4: 10}, "there is no block 4, the model has blocks 0 to 3"),
        ("evit", {0: 0}, "not 0"),
        ("tome", {0: 20}, "tome can leave 25 to 49 patch tokens"),
        ("tome", [49, 40], "a schedule of 2 blocks does not fit a model of 4"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_sentence(method, wanted, says):
    with pytest.raises(InputError, match=says):
        counts(method, wanted, 4, 49, 1)


@pytest.mark.parametrize("method", ["evit", "evit_drop"])
def test_a_model_without_a_class_token_is_refused_where_the_method_scores_by_it(method):
    with pytest.raises(NotSupported, match="this model has no class token; use cait or pitome or tome or zero_tprune"):
        reduce_tokens(tiny_vit(class_token=False, pool="avg"), method, {0: 30})
