from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from tiny import tiny_config, tiny_vit

from vitprune.errors import InputError, NotSupported
from vitprune.model.vit import Vit
from vitprune.search.counts import Counts, TokenMethod
from vitprune.search.latency import LatencyTable
from vitprune.tokens.evit import EViT
from vitprune.tokens.tome import ToMe
from vitprune_deploy.backends.base import number_format
from vitprune_deploy.latency import table as tables
from vitprune_deploy.latency import timing
from vitprune_deploy.latency.pieces import PieceFiles, only_block, spread
from vitprune_deploy.latency.protocol import measure
from vitprune_deploy.latency.table import Request, accept, make_levels, measure_table, table_key
from vitprune_deploy.latency.wholes import export_whole, measure_models, onnxruntime_loader, random_counts, slim

EVIT, TOME = TokenMethod.of("evit", EViT), TokenMethod.of("tome", ToMe)
REQUEST = Request(batch=2, threads=1, tokens=(25, 12), heads=(4,), mlp=(64,), methods=(EVIT,), seconds=1.0)
DEVICE = {"cpu": "A", "cores": 2, "gpus": [], "runtime": "onnxruntime", "runtime_version": "1.31", "threads": 1}


@pytest.fixture(scope="module")
def model() -> Vit:
    return tiny_vit(depth=1)  # 49 patches, 4 heads, 64 units


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    told = []
    result = measure_table(
        model, REQUEST, onnxruntime_loader(1), tmp_path_factory.mktemp("table"), progress=lambda *p: told.append(p)
    )
    return result, told


def test_a_table_is_measured_filled_and_corrected(measured):
    result, told = measured
    table = result.table
    assert table.levels.tokens == (49, 25, 12)
    assert set(table.attn) == {(n, 4) for n in (49, 25, 12)}
    assert all(entry.measured and entry.ms > 0 for entry in table.attn.values())
    assert set(table.reduce) == {"evit"}
    assert set(table.reduce["evit"]) == {(49, 25), (49, 12), (25, 12)}
    assert table.attn_sized == {}  # EViT keeps no sizes
    assert not table.head[25].measured  # two of three are
    assert table.circumstances.device["runtime"] == "onnxruntime"
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][0] <= told[-1][1] == 1000


def test_without_a_token_method_the_last_block_may_still_be_for_the_prefix_alone_and_heads_lose_dims(
    measured, model, tmp_path
):
    request = replace(REQUEST, tokens=(0,), heads=(4, 2), methods=(), qk=(4,))
    result = measure_table(model, request, onnxruntime_loader(1), tmp_path)
    table, device = result.table, result.table.circumstances.device
    assert table.levels.tokens == (49,)
    assert set(table.attn_prefix) == {(49, 4), (49, 2)}
    assert set(table.head) == {49, 0}
    assert (table.levels.qk, table.levels.v) == ((8, 4), (8,))
    assert set(table.attn_dims) == {(49, 4, 4, 8), (49, 2, 4, 8)}
    assert all(entry.measured and entry.ms > 0 for entry in table.attn_dims.values())
    assert any(whole.counts.qk is not None for whole in result.wholes)
    assert accept(table, model.config, request, device) == []
    (warning,) = accept(measured[0].table, model.config, replace(REQUEST, v=(4,)), device)
    assert "lacks times of some dims of heads" in warning


def test_a_last_block_for_the_prefix_alone_is_measured_where_it_is_asked_for(measured, model, tmp_path):
    request = replace(REQUEST, tokens=(25, 12, 0))
    result = measure_table(model, request, onnxruntime_loader(1), tmp_path)
    assert set(result.table.attn_prefix) == {(n, 4) for n in (49, 25, 12)}
    assert result.table.mlp_ms(0, 64) > 0
    assert result.wholes[0].counts.patches == (49,)
    assert {whole.counts.patches for whole in result.wholes[1:]} == {(0,)}
    assert measured[0].table.attn_prefix == {}
    device = result.table.circumstances.device
    assert accept(result.table, model.config, request, device) == accept(result.table, model.config, REQUEST, device)


def test_of_a_large_grid_of_dims_some_are_measured():
    levels = make_levels(tiny_config(heads=2), replace(REQUEST, heads=(2, 1), qk=(16, 12, 8, 4), v=(16, 8)))
    parts = tables._dim_parts(levels)
    assert {(part.patches, part.width) for part in parts} == {(n, h) for n in (49, 12) for h in (2, 1)}
    # the fewest of either, of both, and the middle ones
    assert {part.dims for part in parts} == {(4, 16), (16, 8), (4, 8), (8, 8)}
    assert tables._dim_parts(make_levels(tiny_config(), REQUEST)) == []


def test_pieces_and_whole_models_have_the_dims_that_are_asked_for(model, tmp_path):
    path = PieceFiles(model, tmp_path, 2, "fp32", "onnxruntime").attention(3, dims=(4, 6))
    assert path.stem == "attn3_4_6"
    shapes = {tuple(one.dims) for one in onnx.load(path).graph.initializer}
    assert {(32, 3 * 14), (3 * 6, 32)} <= shapes | {shape[::-1] for shape in shapes}
    made = slim(model, Counts((3,), (64,), (49,), (4,), (6,)), None)
    assert [(b.heads, b.qk_dim, b.v_dim) for b in made.config.blocks] == [(3, 4, 6)]


@pytest.mark.parametrize("slow", [1, 2])
def test_what_was_measured_on_a_slow_machine_is_measured_again(model, tmp_path, monkeypatch, slow):
    calls = []

    def slow_once(*arguments, **more):
        calls.append(len(arguments[0]))
        pace_ms = 20.0 if len(calls) == slow else 10.0  # of the reference
        return [one.at(pace_ms) for one in measure(*arguments, **more)]

    monkeypatch.setattr(timing, "measure", slow_once)
    result = measure_table(model, REQUEST, onnxruntime_loader(1), tmp_path)
    assert calls == [len(result.pieces), len(result.wholes), len(result.pieces if slow == 1 else result.wholes)]
    assert {one.reference_ms for one in (*result.pieces, *(w.measurement for w in result.wholes))} == {10.0}


def test_a_call_that_does_nothing_takes_some_time_which_no_part_is_charged_with(model, tmp_path):
    files = PieceFiles(model, tmp_path, 2, "fp32", "onnxruntime")
    call_ms = timing.time_call(onnxruntime_loader(1)(files.nothing(), {"tokens": 1}))
    assert 0 < call_ms < 5
    assert timing.without_call(1.0, 0.25) == 0.75
    assert timing.without_call(1.0, 0.95) == pytest.approx(0.1)  # some work is always left


def test_whole_models_of_a_table_start_with_the_dense_one_and_differ(measured, model):
    result, _ = measured
    assert result.wholes[0].counts == Counts.dense([4], [64], 49)
    assert result.wholes[0].measurement.name == "dense"
    plans = [whole.counts for whole in result.wholes]
    assert Counts((4,), (64,), (12,)) in plans  # early drop
    assert len(set(plans)) == len(plans)
    assert len({one.reference_ms for one in (*result.pieces, *(w.measurement for w in result.wholes))}) == 1


def test_a_table_is_accepted_where_it_was_measured_and_for_what(measured, model):
    table, device = measured[0].table, measured[0].table.circumstances.device
    assert accept(table, model.config, REQUEST, device) == []
    assert len(accept(table, model.config, REQUEST, device | {"os": "other"})) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch": 4}, "batch 2, not for 4"),
        ({"threads": 2}, "threads 1, not for 2"),
        ({"precision": "fp16"}, "precision fp32, not for fp16"),
        ({"tokens": (30,)}, "no tokens level 30"),
        ({"mlp": (32,)}, "no mlp level 32"),
        ({"methods": (TOME,)}, "no times of tome"),
        ({"tokens": (25, 12, 0)}, "no times of a last block for prefix tokens alone"),
    ],
)
def test_a_table_for_something_else_is_refused(measured, model, change, says):
    table = measured[0].table
    with pytest.raises(InputError, match=says):
        accept(table, model.config, replace(REQUEST, **change), table.circumstances.device)


def test_the_table_of_another_device_or_model_is_refused(measured, model):
    table = measured[0].table
    with pytest.raises(InputError, match=r"another device: the device's cpu was .* and is B here"):
        accept(table, model.config, REQUEST, table.circumstances.device | {"cpu": "B"})
    with pytest.raises(InputError, match="another model, not for this one"):
        accept(table, replace(model.config, dim=64), REQUEST, table.circumstances.device)


def test_the_key_of_a_table_changes_with_whatever_the_table_depends_on(model):
    def key(request=REQUEST, device=DEVICE, **config):
        return json.dumps(table_key(replace(model.config, **config), request, device), sort_keys=True)

    assert key() == key(replace(REQUEST, seconds=9.0))
    others = [key(replace(REQUEST, batch=4)), key(replace(REQUEST, methods=())), key(device=DEVICE | {"cpu": "B"})]
    others += [key(device=DEVICE | {"runtime_version": "2"}), key(classes=3), key(replace(REQUEST, mlp=(32,)))]
    assert len({key(), *others}) == 7


def test_parts_have_the_widths_and_leave_the_tokens_that_were_asked_for(model, tmp_path):
    files, load = PieceFiles(model, tmp_path, 2, "fp32", "onnxruntime"), onnxruntime_loader(1)
    path = files.attention(3, sized=True, method="evit")
    with load(path, {"tokens": 50, "keep": 40}) as part:
        assert [(spec.name, spec.shape) for spec in part.inputs] == [
            ("x", (2, 50, 32)), ("size", (2, 50, 1)), ("keep", (40,))]  # fmt: skip
        feed = {spec.name: np.ones(spec.shape, spec.dtype) for spec in part.inputs}
        assert part._session.run(None, feed)[0].shape == (2, 41, 32)
    weights = {tuple(w.dims) for w in onnx.load(path).graph.initializer}
    assert {(32, 3 * 3 * 8), (3 * 8, 32)} <= weights
    assert files.attention(3, sized=True, method="evit") == path
    with load(files.mlp(40), {"tokens": 7}) as part:
        assert part.run(np.ones((2, 7, 32), np.float32)).shape == (2, 7, 32)
    weights = {tuple(w.dims) for w in onnx.load(files.mlp(40)).graph.initializer}
    assert {(32, 40), (40, 32)} <= weights


def test_half_precision_parts_take_and_give_half_precision(model, tmp_path):
    files = PieceFiles(model, tmp_path, 1, "fp16", "onnxruntime")
    with onnxruntime_loader(1)(files.mlp(16), {"tokens": 7}) as part:
        assert {spec.dtype for spec in (*part.inputs, *part.outputs)} == {"float16"}


def test_parts_in_bf16_take_and_give_bf16_and_numbers_are_made_for_them(model, tmp_path):
    path = PieceFiles(model, tmp_path, 1, "bf16", "tensorrt").mlp(16)
    graph = onnx.load(path).graph
    ends = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    assert ends == [onnx.TensorProto.BFLOAT16] * 2
    assert number_format("bfloat16").itemsize == 2
    assert number_format("float16") == np.float16


def test_levels_to_measure_are_spread_over_the_values():
    assert spread([196, 170, 150, 120, 100, 60, 40, 10], 3) == [196, 100, 10]
    assert spread([6, 5, 4, 3, 2, 1], 4) == [6, 4, 3, 1]
    assert spread([2, 1], 4) == [2, 1]
    with pytest.raises(InputError, match="at least one level"):
        spread([], 2)


def test_levels_hold_the_whole_model_and_the_bytes_of_its_parts(model):
    levels = make_levels(model.config, replace(REQUEST, heads=(2, 0), mlp=()))
    assert (levels.tokens, levels.heads, levels.mlp, levels.prefix) == ((49, 25, 12), (4, 2), (64,), 1)
    assert levels.head_bytes == 4 * 32 * (8 + 8 + 8 + 8)  # q, k, v rows and proj columns of one head, fp32
    assert levels.unit_bytes == 4 * 32 * 2
    half = make_levels(replace(model.config, gated=True), replace(REQUEST, precision="fp16"))
    assert half.unit_bytes == 2 * 32 * 3
    with pytest.raises(InputError, match=r"levels of tokens must lie in 0 to 49, got .*60"):
        make_levels(model.config, replace(REQUEST, tokens=(60, 50)))


def test_the_cost_of_a_reduction_is_what_it_adds_to_the_same_attention():
    part = tables._Part
    times = tables._times(
        {
            part("stem", 49): 1.0,
            part("head", 49): 0.5,
            part("attention", 49, 4): 3.0,
            part("attention", 49, 4, True): 3.5,
            part("mlp", 49, 64): 4.0,
            part("attention", 49, 4, False, "evit", 25): 3.25,
            part("attention", 49, 4, True, "tome", 25): 4.25,
            part("attention", 25, 4): 1.5,
            part("attention", 49, 4, False, "early", 25): 1.75,
        },
        replace(REQUEST, methods=(EVIT, TOME, EVIT._replace(name="early", where="before"))),
    )
    # in front of a block a method spares its attention tokens, and is charged beside that of those that are left
    assert times.reduce == {"evit": {(49, 25): 0.25}, "tome": {(49, 25): 0.75}, "early": {(49, 25): 0.25}}
    assert (times.stem_ms, times.head, times.attn, times.attn_sized, times.mlp) == (
        1.0, {49: 0.5}, {(49, 4): 3.0, (25, 4): 1.5}, {(49, 4): 3.5}, {(49, 64): 4.0})  # fmt: skip


def test_reductions_are_measured_only_where_one_application_can_do_them(model):
    levels = make_levels(model.config, replace(REQUEST, tokens=(40, 30, 25, 15, 12)))
    assert tables._steps(TOME, levels, [49, 30, 12]) == [(49, 40), (49, 25), (30, 25), (30, 15)]
    assert tables._steps(TOME, make_levels(model.config, replace(REQUEST, tokens=(25, 6, 3))), [49, 6]) == [
        (49, 25),
        (6, 3),
    ]
    with pytest.raises(InputError, match=r"tome cannot go from any of the token levels \[49, 6\] to a lower one"):
        tables._steps(TOME, make_levels(model.config, replace(REQUEST, tokens=(6,))), [49, 6])


def test_models_whose_blocks_differ_are_refused():
    config = tiny_config(depth=2)
    first = config.blocks[0]
    assert only_block(config) == first
    for other, says in (
        (replace(first, mlp=32), "block 1 has other sizes than block 0"),
        (replace(first, heads=0), "block 1 has been pruned before"),
        (replace(first, patches=20), "block 1 has been pruned before"),
    ):
        with pytest.raises(NotSupported, match=says):
            only_block(replace(config, blocks=(first, other), reducer="evit"))


def test_random_plans_use_levels_only_and_steps_that_the_method_can_do(model):
    levels = make_levels(model.config, replace(REQUEST, tokens=(40, 30, 25, 15, 12), heads=(2, 1), mlp=(32, 8)))
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = random_counts(levels, 12, TOME, rng)
        assert set(counts.heads) <= {4, 2, 1}
        assert set(counts.mlp) <= {64, 32, 8}
        for before, after in zip((49, *counts.patches), counts.patches, strict=False):
            assert after in levels.tokens
            assert after >= before - before // 2
    assert random_counts(levels, 12, None, rng).patches == (49,) * 12
    watching = EVIT._replace(name="evovit", watches=True)  # it cannot act before it has seen anything
    assert {random_counts(levels, 12, watching, rng).patches[0] for _ in range(20)} == {49}


def test_whole_models_are_measured_beside_the_dense_one(model, tmp_path):
    small = slim(model, Counts((1,), (8,), (25,)), EVIT)
    assert [(b.heads, b.mlp, b.patches) for b in small.config.blocks] == [(1, 8, 25)]
    paths = {name: export_whole(m, tmp_path / name, batch=2) for name, m in (("dense", model), ("small", small))}
    dense, other = measure_models(paths, onnxruntime_loader(1), batch=2, max_seconds=2.0)
    assert (dense.name, other.name) == ("dense", "small")
    assert dense.reference_ms == other.reference_ms > 0
    assert dense.rounds >= 1
    doubled = other.at(2 * other.reference_ms)
    assert doubled.value_ms == pytest.approx(2 * other.value_ms, rel=1e-12)
    assert doubled.half_width == pytest.approx(other.half_width, rel=1e-9)
