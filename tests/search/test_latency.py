from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic import (
    ATTN_MS,
    CIRCUMSTANCES,
    EVIT,
    HEADS,
    MLP,
    TOKENS,
    TOME,
    dense,
    ending_early,
    levels,
    pieces,
    random_counts,
    table,
)

from vitprune.errors import InputError
from vitprune.search.counts import Counts
from vitprune.search.fit import fit_nonnegative, level_factors
from vitprune.search.latency import LatencyTable, Levels, Pieces, Timed


def test_the_sum_is_the_one_added_by_hand():
    # after: block 0 attends on 196 and leaves 137, so that its MLP and everything later works on 137
    counts = Counts((6, 3, 0), (1536, 768, 384), (137, 137, 137))
    by_hand = 0.753 + (1.885 + 0.21 + 1.754) + (0.729 + 0.940) + (0 + 0.527) + 0.071
    assert table().sum_ms(counts, EVIT) == pytest.approx(by_hand, rel=1e-12)


def test_a_method_in_front_of_the_block_spares_its_attention_too():
    counts = Counts((6,), (1536,), (137,))
    assert table().sum_ms(counts, EVIT._replace(where="before")) == pytest.approx(0.753 + 0.21 + 1.265 + 1.754 + 0.071)


def test_token_sizes_cost_from_the_first_merge_on():
    counts = Counts((6, 6, 6), (1536, 1536, 1536), (196, 137, 137))
    plain = table().sum_ms(counts, TOME._replace(proportional=False))
    assert table().sum_ms(counts, TOME) - plain == pytest.approx(0.1 * 1.265)  # only block 2 sees merged tokens


def test_a_last_block_for_the_prefix_alone_is_added_by_hand():
    counts = Counts((6, 3), (1536, 768), (137, 0))  # block 1 reads 137 patches, and its MLP and the head none
    by_hand = 0.753 + (1.885 + 0.21 + 1.754) + (0.25 * 0.729 + 0.005) + 0.02
    assert ending_early().sum_ms(counts, EVIT) == pytest.approx(by_hand, rel=1e-12)
    without = 0.753 + (1.885 + 0.21 + 1.754) + 0.02
    assert ending_early().sum_ms(Counts((6, 0), (1536, 0), (137, 0)), EVIT) == pytest.approx(without, rel=1e-12)
    again = LatencyTable.from_dict(json.loads(json.dumps(ending_early().to_dict())))
    assert again == ending_early()
    with pytest.raises(InputError, match=r"no last attention entry for \(137, 3\)"):
        table().sum_ms(counts, EVIT)


def test_times_of_a_last_block_are_filled_in_from_a_few():
    some = {key: ms for key, ms in pieces().attn.items() if key[0] in (196, 67) and key[1] in (6, 2)}
    mlp = pieces().mlp | {(0, 1536): 0.02, (0, 384): 0.01}
    filled = LatencyTable.fill(CIRCUMSTANCES, levels(), pieces(attn_prefix=some, mlp=mlp))
    assert set(filled.attn_prefix) == set(filled.attn)
    assert not filled.attn_prefix[137, 4].measured
    assert 0.286 < filled.attn_prefix_ms(137, 4) < 1.885
    assert filled.mlp_ms(0, 768) >= 0
    assert filled.head_ms(0) >= 0


def test_prediction_adds_the_corrected_sum_and_the_cold_weights():
    fitted = LatencyTable(**(vars(table()) | {"correction": (0.3, 0.98, 0.0375)}))
    # per block 6 heads of 4 * 64 * 384 weights and 1536 units of 2 * 384 weights, 4 bytes each
    megabytes = 12 * 4 * (6 * 4 * 64 * 384 + 1536 * 2 * 384) / 1e6
    assert fitted.predict_ms(dense()) == pytest.approx(0.3 + 0.98 * table().sum_ms(dense()) + 0.0375 * megabytes)


def test_a_coarse_grid_is_filled_to_the_measured_accuracy_of_the_form():
    coarse = pieces(
        attn={key: ms for key, ms in pieces().attn.items() if key[0] in (196, 67, 96) and key[1] in (6, 4, 2)},
        mlp={key: ms for key, ms in pieces().mlp.items() if key[0] in (196, 67) and key[1] in (1536, 768, 384)},
        attn_sized={key: ms for key, ms in pieces().attn_sized.items() if key[0] in (137, 67) and key[1] in (6, 2)},
    )
    filled = LatencyTable.fill(CIRCUMSTANCES, levels(), coarse)
    errors = [filled.attn[key].ms / ms - 1 for key, ms in pieces().attn.items()]
    errors += [filled.mlp[key].ms / ms - 1 for key, ms in pieces().mlp.items()]
    # the study found 2.3% and 1.6% mean error of these forms on this very table, fitted on all of it
    assert np.abs(errors).mean() < 0.03
    assert np.abs([filled.attn_sized[key].ms / ms - 1 for key, ms in pieces().attn_sized.items()]).mean() < 0.05
    assert filled.attn[196, 6] == (1.885, True)
    assert not filled.attn[137, 6].measured
    assert not filled.attn[196, 5].measured


def test_a_form_is_recovered_exactly_when_the_times_follow_it():
    rng = np.random.default_rng(3)
    grid = levels()
    c0, c1, c2, c3 = rng.uniform(0.5, 1.5, 4) * (0.05, 1e-3, 3e-6, 2e-3)
    true = {(n, h): c0 + c1 * (n + 1) * h + c2 * (n + 1) ** 2 * h + c3 * (n + 1) for n in TOKENS for h in HEADS}
    coarse = {key: true[key] for key in [(196, 6), (196, 2), (67, 6), (67, 2), (96, 4)]}
    filled = LatencyTable.fill(CIRCUMSTANCES, grid, pieces(attn=coarse, attn_sized={}))
    for key, ms in true.items():
        assert filled.attn[key].ms == pytest.approx(ms, rel=1e-9)


def test_no_coefficient_is_negative_and_the_fit_beats_every_other_nonnegative_one():
    rng = np.random.default_rng(0)
    for _ in range(50):
        features, ms = rng.uniform(0.1, 1, (6, 3)), rng.uniform(0.5, 2, 6)
        found = fit_nonnegative(features, ms)
        error = np.square((features @ found - ms) / ms).sum()
        others = rng.uniform(0, 2, (2000, 3))
        assert found.min() >= 0
        assert error <= np.square((others @ features.T - ms) / ms).sum(axis=1).min() + 1e-12


def test_reductions_that_noise_made_negative_cost_nothing_rather_than_less():
    noisy = {(196, 137): -0.01, (196, 96): 0.02, (196, 67): 0.02, (137, 96): 0.02}
    filled = LatencyTable.fill(CIRCUMSTANCES, levels(), pieces(reduce={"evit": noisy}))
    assert filled.reduce_ms("evit", 196, 137) == 0
    assert min(entry.ms for entry in filled.reduce["evit"].values()) >= 0


def test_whole_models_bring_the_error_of_the_plain_sum_down_to_the_noise():
    rng = np.random.default_rng(1)

    def truth(counts):
        return 0.2 + 0.987 * table().sum_ms(counts, EVIT) + 0.0375 * table().megabytes(counts)

    narrow = Counts((2,) * 12, (384,) * 12, (196,) * 12)
    early = Counts((6,) * 12, (1536,) * 12, (67,) * 12)
    anchors = [dense(), narrow, early, random_counts(rng), random_counts(rng)]
    fitted = table().fit_correction([Timed(c, truth(c) * (1 + 0.003 * rng.standard_normal()), EVIT) for c in anchors])
    others = [random_counts(rng) for _ in range(50)]
    plain = np.array([table().predict_ms(c, EVIT) / truth(c) - 1 for c in others])
    corrected = np.array([fitted.predict_ms(c, EVIT) / truth(c) - 1 for c in others])
    assert np.abs(plain).mean() > 0.03
    assert np.abs(corrected).mean() < 0.01


def test_wholes_of_one_token_method_tell_the_correction_for_another():
    filled = LatencyTable.fill(CIRCUMSTANCES, levels(), pieces())
    assert {"evit", "tome"} <= set(filled.reduce)

    def truth(counts, method):
        return 1.1 * filled.sum_ms(counts, method) + 0.03 * filled.megabytes(counts)

    rng = np.random.default_rng(4)
    fitted = filled.fit_correction([Timed(c, truth(c, EVIT), EVIT) for c in [dense(), *map(random_counts, 5 * [rng])]])
    for counts in map(random_counts, 20 * [rng]):
        assert fitted.predict_ms(counts, TOME) == pytest.approx(truth(counts, TOME), rel=0.01)


def test_one_whole_model_only_rescales():
    fitted = table().fit_correction([Timed(dense(), 1.08 * table().sum_ms(dense()))])
    a, b, kappa = fitted.correction
    assert fitted.predict_ms(dense()) == pytest.approx(1.08 * table().sum_ms(dense()), rel=2e-3)
    assert 1.02 < b < 1.08
    assert a >= 0
    assert kappa >= 0


def test_wholes_that_contradict_the_table_never_leave_a_part_without_time():
    light = Counts((2,) * 12, (384,) * 12, (196,) * 12)
    early = Counts((6,) * 12, (1536,) * 12, (67,) * 12)
    absurd = [Timed(dense(), 60.0), Timed(light, 2.0), Timed(early, 90.0, EVIT)]
    a, b, kappa = table().fit_correction(absurd).correction
    assert a >= 0
    assert b >= 0.2
    assert kappa >= 0


def test_the_correction_does_not_depend_on_the_unit_of_time():
    rng = np.random.default_rng(2)
    wholes = [Timed(c, 1.05 * table().sum_ms(c, EVIT) + 0.3, EVIT) for c in (random_counts(rng) for _ in range(5))]
    a, b, kappa = table().fit_correction(wholes).correction
    doubled = LatencyTable.fill(
        CIRCUMSTANCES,
        levels(),
        Pieces(
            attn={k: 2 * ms for k, ms in pieces().attn.items()},
            mlp={k: 2 * ms for k, ms in pieces().mlp.items()},
            stem_ms=2 * 0.753,
            head=dict.fromkeys(TOKENS, 2 * 0.071),
            attn_sized={},
            reduce={"evit": {k: 2 * ms for k, ms in pieces().reduce["evit"].items()}},
        ),
    )
    again = doubled.fit_correction([one._replace(ms=2 * one.ms) for one in wholes]).correction
    assert again == pytest.approx((2 * a, b, 2 * kappa), rel=1e-6, abs=1e-9)


def test_the_table_survives_the_way_through_json():
    filled = table().fit_correction([Timed(dense(), 60.0)])
    again = LatencyTable.from_dict(json.loads(json.dumps(filled.to_dict())))
    assert again == filled
    assert again.to_dict() == filled.to_dict()


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda t: t.attn_ms(100, 6), r"no attention entry for \(100, 6\)"),
        (lambda t: t.attn_ms(196, 7), r"no attention entry for \(196, 7\)"),
        (lambda t: t.mlp_ms(196, 100), r"no MLP entry for \(196, 100\)"),
        (lambda t: t.reduce_ms("dynamicvit", 196, 137), "no dynamicvit reduction entry"),
        (lambda t: t.head_ms(3), "no head entry for 3"),
        (lambda t: t.sum_ms(Counts((6,), (1536,), (137,))), "block 0 turns 196 patch tokens into 137 without a token"),
        (lambda t: t.sum_ms(Counts((0,), (1536,), (137,)), EVIT), "into 137 without attention"),
        (lambda t: t.fit_correction([]), "needs times of whole models"),
        (lambda t: t.fit_correction([Timed(dense(), -1.0)]), "needs times of whole models"),
    ],
)
def test_what_was_not_measured_is_an_error_and_never_free(call, what):
    with pytest.raises(InputError, match=what):
        call(table())


def test_a_proportional_method_needs_the_sized_column():
    bare = LatencyTable.fill(CIRCUMSTANCES, levels(), pieces(attn_sized={}))
    with pytest.raises(InputError, match="no sized attention entry"):
        bare.sum_ms(Counts((6, 6), (1536, 1536), (137, 137)), TOME)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"attn": {(196, 6): 1.0, (196, 4): 1.0, (67, 6): 1.0}}, "3 measured attention entries are too few"),
        ({"attn": {(195, 6): 1.0}}, r"attention entry \(195, 6\) lies outside the grid"),
        ({"mlp": {(196, 1536): float("nan")}}, "must be a time in milliseconds, got nan"),
        ({"mlp": {(196, 1536): -1.0}}, "must be a time in milliseconds, got -1.0"),
        ({"stem_ms": -1.0}, "stem_ms -1.0"),
        ({"head": {}}, "0 measured head entries are too few"),
        ({"attn_sized": {(195, 6): 1.0}}, r"sized attention entry \(195, 6\)"),
    ],
)
def test_measurements_that_cannot_be_are_refused(change, what):
    with pytest.raises(InputError, match=what):
        LatencyTable.fill(CIRCUMSTANCES, levels(), pieces(**change))


@pytest.mark.parametrize("change", [{"tokens": (67, 196)}, {"heads": ()}, {"mlp": (8, 0)}, {"prefix": -1}])
def test_a_grid_that_is_none_is_refused(change):
    with pytest.raises(InputError, match="latency table's"):
        Levels(**({"prefix": 1, "tokens": (4,), "heads": (2,), "mlp": (8,), "head_bytes": 1, "unit_bytes": 1} | change))


def test_damaged_json_is_refused_whatever_is_broken():
    plain = json.loads(json.dumps(table().to_dict()))
    rng = np.random.default_rng(0)
    garbage = [None, -1, "x", [], {}, [[1]], float("nan"), [[196, 6, "?", True]]]
    for name in plain:
        for value in garbage:
            broken = copy.deepcopy(plain)
            broken[name] = value
            # empty means "nothing of this kind was measured" in these
            if (name, value) in [
                ("attn_sized", []),
                ("attn_sized", {}),
                ("reduce", {}),
                ("attn_prefix", []),
                ("attn_prefix", {}),
            ]:
                continue
            with pytest.raises(InputError):
                LatencyTable.from_dict(broken)
    for _ in range(20):
        broken = copy.deepcopy(plain)
        del broken["attn"][rng.integers(len(broken["attn"]))]
        with pytest.raises(InputError, match="lacks"):
            LatencyTable.from_dict(broken)


def test_the_study_table_is_what_the_other_tests_think_it_is():
    assert table().attn_ms(196, 6) == ATTN_MS[0][0]
    assert table().mlp_ms(67, MLP[-1]) == 0.285
    assert all(entry.measured for entry in table().attn.values())


def test_what_a_form_misses_is_ascribed_to_the_levels_of_both_kinds():
    keys = [(n, w) for n in (196, 100, 50) for w in (6, 4, 2, 1)]
    of_tokens, of_widths = {196: 1.0, 100: 1.2, 50: 0.9}, {6: 1.0, 4: 1.0, 2: 1.1, 1: 1.0}
    whole = {key: of_tokens[key[0]] * of_widths[key[1]] for key in keys}
    found = dict(zip(keys, level_factors(keys, whole), strict=True))
    assert all(found[key] == pytest.approx(factor, rel=0.03) for key, factor in whole.items())
    some = {key: whole[key] for key in keys if key[0] == 196 or key[1] == 4}  # one row and one column
    found = dict(zip(keys, level_factors(keys, some), strict=True))
    assert found[100, 1] > 1.1  # measured at neither: its token count is known from another width
    assert found[50, 6] < 0.95


def test_levels_of_which_nothing_is_known_keep_the_form():
    keys = [(2, 1), (1, 1), (2, 3), (1, 3)]
    assert level_factors(keys, {(2, 1): 1.0}) == pytest.approx(np.ones(4))
    assert level_factors(keys, {(2, 1): 1.21})[3] == pytest.approx(1.0)


def test_a_grid_with_a_step_in_the_tokens_is_filled_with_the_step():
    tokens, heads = (196, 150, 100, 50), (6, 4, 2)
    slow = {196: 1.0, 150: 1.2, 100: 1.0, 50: 1.0}
    times = {(n, h): slow[n] * (0.05 + 1e-3 * n * h + 1e-6 * n * n * h) for n in tokens for h in heads}
    grid = replace(levels(), tokens=tokens, heads=heads)
    known = {key: ms for key, ms in times.items() if key[0] != 150 or key[1] == 4}
    more = {"mlp": {(n, m): 1.0 + n * m for n in tokens for m in MLP}, "head": dict.fromkeys(tokens, 1.0)}
    table = LatencyTable.fill(CIRCUMSTANCES, grid, replace(pieces(attn=known, attn_sized={}, reduce={}), **more))
    for h in (6, 2):
        assert table.attn_ms(150, h) == pytest.approx(times[150, h], rel=0.06)
        assert not table.attn[150, h].measured
