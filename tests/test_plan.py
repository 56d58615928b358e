from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vitprune.errors import InputError
from vitprune.plan import BlockPlan, Plan


def plan(*blocks: BlockPlan, reducer: str | None = None, patches: int = 49) -> Plan:
    return Plan("abc", patches, reducer, blocks)


def test_comes_back_from_json_as_it_was():
    before = plan(BlockPlan((0, 2), (1, 5), 30), BlockPlan((), (3,)), BlockPlan((), ()), reducer="evit")
    plain = json.loads(json.dumps(before.to_dict()))
    assert Plan.from_dict(plain) == before
    assert "patches" not in plain["blocks"][1]


def test_dims_and_channels_come_back_and_are_absent_where_all_stay():
    before = plan(BlockPlan((0, 2), (1,), None, ((0, 3), (1, 2)), ((4,), (0,))), BlockPlan((0,), (3,)))
    plain = json.loads(json.dumps(before.to_dict()))
    assert Plan.from_dict(plain) == before
    assert plain["blocks"][0]["qk"] == [[0, 3], [1, 2]]
    assert not {"qk", "v"} & plain["blocks"][1].keys()
    assert "embed" not in plain
    narrow = replace(before, embed=(0, 5))
    assert Plan.from_dict(json.loads(json.dumps(narrow.to_dict()))) == narrow


def test_later_plans_pick_from_the_dims_and_channels_that_are_left():
    first = plan(BlockPlan((1, 3, 4), (2,), None, ((0, 2), (1, 3), (5, 6)), None))
    later = plan(BlockPlan((0, 2), (0,), None, ((1,), (0,)), ((7,), (2,))))
    assert first.then(later) == plan(BlockPlan((1, 4), (2,), None, ((2,), (5,)), ((7,), (2,))))
    assert first.then(plan(BlockPlan((1,), (0,)))).blocks[0].qk == ((1, 3),)
    assert first.then(plan(BlockPlan((), (0,)))).blocks[0] == BlockPlan((), (2,))
    narrow = replace(first, embed=(3, 5, 8))
    assert narrow.then(later).embed == (3, 5, 8)
    assert first.then(replace(later, embed=(0, 1))).embed == (0, 1)
    assert narrow.then(replace(later, embed=(0, 2))).embed == (3, 8)


def test_patterns_of_zeros_are_of_layers_that_stay_and_come_back_from_json():
    some = plan(BlockPlan((0,), (1, 5)), BlockPlan((), (3,)), BlockPlan((0,), ()))
    sparse = some.with_zeros("2:4", lambda name: "mlp" in name or name == "blocks.2.attn.proj")
    assert sparse.patterns() == dict.fromkeys(
        ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "blocks.2.attn.proj"], "2:4"
    )
    plain = json.loads(json.dumps(sparse.to_dict()))
    assert plain["blocks"][1] == {"heads": [], "mlp": [3], "weights": {"mlp.fc1": "2:4", "mlp.fc2": "2:4"}}
    assert Plan.from_dict(plain) == sparse
    assert some.patterns() == {}


def test_a_later_plan_keeps_patterns_of_what_stays_and_may_ask_for_others():
    first = plan(BlockPlan((0, 1), (0, 1), weights=(("attn.proj", "2:4"), ("mlp.fc1", "2:4"))))
    assert first.then(plan(BlockPlan((0,), ()))).patterns() == {"blocks.0.attn.proj": "2:4"}
    later = plan(BlockPlan((0,), (0,), weights=(("mlp.fc1", "unstructured"),)))
    assert first.then(later).patterns() == {"blocks.0.attn.proj": "2:4", "blocks.0.mlp.fc1": "unstructured"}


def test_a_dense_plan_keeps_everything():
    dense = Plan.dense("abc", 49, heads=[2, 3], mlp=[4, 1])
    assert dense.blocks == (BlockPlan((0, 1), (0, 1, 2, 3)), BlockPlan((0, 1, 2), (0,)))
    assert dense.reducer is None


def test_patches_are_counted_from_block_to_block():
    kept = BlockPlan((0,), (0,))
    counts = plan(kept, BlockPlan((0,), (0,), 30), kept, BlockPlan((0,), (0,), 7), reducer="tome").patches_after()
    assert counts == [49, 30, 30, 7]


def test_a_later_plan_picks_from_what_the_first_one_left():
    first = plan(BlockPlan((1, 3, 4), (2, 5, 8, 9), 40), reducer="tome")
    later = Plan("slim", 49, "tome", (BlockPlan((0, 2), (1, 3), 30),))
    assert first.then(later) == plan(BlockPlan((1, 4), (5, 9), 30), reducer="tome")


def test_the_fewer_tokens_of_two_plans_count_and_go_with_the_attention():
    first = plan(BlockPlan((0, 1), (0,), 20), BlockPlan((0, 1), (0,), 10), reducer="evit")
    later = Plan("slim", 49, "evit", (BlockPlan((0,), (0,), 30), BlockPlan((), (0,))))
    assert [block.patches for block in first.then(later).blocks] == [20, None]


@pytest.mark.parametrize(
    ("first", "later", "sentence"),
    [
        (plan(BlockPlan((0,), (0,))), plan(), "a plan of 0 blocks cannot follow one of 1"),
        (plan(reducer="evit"), plan(reducer="tome"), "a plan with tome cannot follow one with evit"),
        (plan(BlockPlan((2,), (0,))), plan(BlockPlan((1,), (0,))), "block 0: the later plan keeps heads 1 of 1 left"),
        (plan(BlockPlan((2,), (0,))), plan(BlockPlan((0,), (0, 1))), "block 0: the later plan keeps mlp 1 of 1 left"),
        (
            plan(BlockPlan((2,), (0,), None, ((4, 5),))),
            plan(BlockPlan((0,), (0,), None, ((2,),))),
            "block 0: the later plan keeps qk dims up to 2 of 2 left",
        ),
        (
            replace(plan(BlockPlan((0,), (0,))), embed=(1, 2)),
            replace(plan(BlockPlan((0,), (0,))), embed=(2,)),
            "the later plan keeps channel 2 of 2 left",
        ),
    ],
)
def test_plans_that_do_not_follow_one_another_are_refused(first, later, sentence):
    with pytest.raises(InputError, match=sentence):
        first.then(later)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: BlockPlan((1, 0), ()), r"heads must be ascending whole numbers without repeats, got \(1, 0\)"),
        (lambda: BlockPlan((), (3, 3)), r"mlp must be ascending whole numbers without repeats, got \(3, 3\)"),
        (lambda: BlockPlan((-1,), ()), "heads must be ascending"),
        (lambda: BlockPlan((0, 1), (), None, ((0,),)), "qk must name dims for each of 2 kept heads, got 1"),
        (lambda: BlockPlan((), (), None, ()), "qk must name dims for each of 0 kept heads"),
        (
            lambda: BlockPlan((0, 1), (), None, None, ((0,), (1, 2))),
            r"equally many v dims, .* in every head, got \[1, 2",
        ),
        (lambda: BlockPlan((0,), (), None, ((),)), r"at least one, in every head, got \[0\]"),
        (
            lambda: BlockPlan((0,), (), None, ((2, 1),)),
            r"qk must be ascending whole numbers without repeats, got \(2, 1\)",
        ),
        (lambda: replace(plan(), embed=(3, 3)), "embed must be ascending whole numbers"),
        (lambda: replace(plan(), embed=()), "at least one channel of the residual stream"),
        (lambda: BlockPlan((0,), (0,), -1), "cannot keep -1 patch tokens"),
        (
            lambda: plan(BlockPlan((0,), (0,), 0), BlockPlan((0,), (0,))),
            "block 0 of the plan keeps no patch token, which",
        ),
        (lambda: BlockPlan((), (0,), 5), "a block without attention cannot reduce tokens"),
        (lambda: plan(BlockPlan((0,), (0,), 5)), "block 0 of the plan reduces tokens, but the plan names no token"),
        (
            lambda: plan(BlockPlan((0,), (0,), 5), BlockPlan((0,), (0,), 6), reducer="evit"),
            "block 1 of the plan keeps 6 of 5 patch tokens",
        ),
    ],
)
def test_impossible_plans_are_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"model_sha256": "abc", "patches": "many", "reducer": None, "blocks": []},
        {"model_sha256": "abc", "patches": 49, "reducer": None, "blocks": [{"heads": [0]}]},
        {"model_sha256": "abc", "patches": 49, "reducer": None, "blocks": 3},
        {"model_sha256": "abc", "patches": 49, "reducer": None, "blocks": [{"heads": [0], "mlp": [], "qk": [3]}]},
        {"model_sha256": "abc", "patches": 49, "reducer": None, "blocks": [{"heads": ["a"], "mlp": []}]},
        {"model_sha256": "abc", "patches": 49, "reducer": None, "blocks": [{"heads": [0.5], "mlp": []}]},
        {"model_sha256": "abc", "patches": 49, "reducer": None, "blocks": [{"heads": [True], "mlp": []}]},
    ],
)
def test_what_is_no_plan_is_refused_in_a_sentence(plain):
    with pytest.raises(InputError, match=r"this is not a plan|must be ascending whole numbers"):
        Plan.from_dict(plain)
