"""What every token method promises, whatever it does."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import images, randomise, tiny_vit
from torch import nn
from torch.export import Dim

from vitprune import parts
from vitprune.model.state import AttentionView, TokenState
from vitprune.surgery import reduce_tokens
from vitprune.tokens.base import Place, Reducer, track_sources
from vitprune_deploy.remote.device import Here
from vitprune_deploy.validate import Served, check_consistency, subject

METHODS = parts.names("vitprune.tokens")
WEIGHTED = {"diffrate"}  # their sizes are no numbers of patches
FORBIDDEN = {"NonZero", "If", "Loop", "Scan", "Unique", "ScatterElements", "ScatterND", "RandomUniform",
             "RandomUniformLike", "RandomNormal", "RandomNormalLike", "Bernoulli", "Multinomial"}  # fmt: skip


def make(name: str, patches: int = 49) -> Reducer:
    """The method in the first of two blocks of width 16; its weights, where it has some, are the same each time."""
    reducer = parts.load("vitprune.tokens", name, Reducer)(Place(depth=2, dim=16, heads=2, patches=patches))
    if reducer.stand_in:  # others are meant to work as they come
        randomise(reducer)
    return reducer.eval()


def tokens(patches: int = 49, prefix: int = 1, batch: int = 2, dtype: torch.dtype = torch.float32):
    """A state without a history, its sources tracked, and an attention over it."""
    generator = torch.Generator().manual_seed(patches + prefix)
    x, q, k = (torch.randn(batch, *shape, generator=generator).to(dtype)
               for shape in ((prefix + patches, 16), (3, prefix + patches, 8), (3, prefix + patches, 8)))  # fmt: skip
    # what a method may have found out before: a score
    return track_sources(TokenState(x, prefix, patches, score=x[..., :1])), AttentionView(q, k, k, 8**-0.5, None)


def reachable(reducer: Reducer, patches: int, prefix: int) -> list[int]:
    """Counts for one application: the fewest, one in between, and all but one."""
    fewest = reducer.fewest(patches, prefix)
    counts = {fewest, (fewest + patches) // 2, patches - 1}
    return sorted(keep for keep in counts if reducer.reaches(patches, keep, prefix))


def some(name: str) -> tuple[int, int]:
    """About three fifths of 49 patches, and about three fifths of these, as the method can leave them."""
    return (28, 16) if make(name).grid else (30, 20)


PREFIXES = [(name, prefix) for name in METHODS for prefix in (0, 1, 2, 5) if prefix or not make(name).needs_class_token]
CASES = [(name, prefix, patches) for name, prefix in PREFIXES for patches in (49, 16)]


@pytest.mark.parametrize(("name", "prefix", "patches"), CASES)
def test_leaves_as_many_tokens_as_it_is_told(name, prefix, patches):
    reducer = make(name, patches)
    for keep in reachable(reducer, patches, prefix):
        state, attention = tokens(patches, prefix)
        after = reducer(state, attention, keep)
        assert after.x.shape == (2, prefix + keep, 16)
        assert after.source.shape == (2, prefix + keep, patches)
        assert (after.prefix, after.patches) == (prefix, patches)
        assert (after.size is not None and after.counted) == reducer.proportional
        assert after.size is None or after.size.shape == (2, prefix + keep, 1)


@pytest.mark.parametrize(("name", "prefix"), PREFIXES)
def test_prefix_tokens_stay_bit_for_bit(name, prefix):
    state, attention = tokens(prefix=prefix)
    after = make(name)(state, attention, some(name)[0])
    assert torch.equal(after.x[:, :prefix], state.x[:, :prefix])
    assert after.source[:, :prefix].count_nonzero() == 0
    assert after.size is None or torch.equal(after.size[:, :prefix], torch.ones(2, prefix, 1))


@pytest.mark.parametrize(("name", "prefix", "patches"), CASES)
def test_no_patch_is_lost_or_counted_twice(name, prefix, patches):
    reducer = make(name, patches)
    for keep in reachable(reducer, patches, prefix):
        after = reducer(*tokens(patches, prefix), keep)
        homes = (after.source > 0).sum(1)
        assert torch.equal(homes.clamp(min=1), torch.ones_like(homes))
        if not reducer.drops:
            assert (homes == 1).all()
        if after.size is not None and name not in WEIGHTED:  # sizes turn shares of a token into shares of a patch
            shares = (after.source * after.size).sum(1)
            torch.testing.assert_close(shares, torch.ones_like(shares))


@pytest.mark.parametrize(("name", "prefix"), PREFIXES)
def test_the_source_says_what_a_token_is_made_of_over_two_applications(name, prefix):
    state, attention = tokens(prefix=prefix)
    reducer = make(name)
    first, second = some(name)
    once = reducer(state, attention, first)
    _, attention = tokens(first, prefix)
    twice = reducer(once, attention, second)
    made = twice.source @ state.x[:, prefix:]
    torch.testing.assert_close(made[:, prefix:], twice.x[:, prefix:], rtol=1e-5, atol=1e-5)  # fp32, another order


@pytest.mark.parametrize("name", METHODS)
def test_nothing_happens_when_all_are_kept(name):
    state, attention = tokens()
    assert make(name)(state, attention, 49) is state


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("patches", [1, 2, 3, 50])
def test_the_fewest_are_at_least_one_and_no_more_than_there_are(name, patches):
    assert 1 <= make(name).fewest(patches, 1) <= patches


@pytest.mark.parametrize("name", METHODS)
def test_patches_leave_in_order_where_the_method_says_so(name):
    reducer = make(name)
    if not reducer.keeps_order:
        pytest.skip("makes no promise about the order")
    first = reducer(*tokens(), some(name)[0]).source[:, 1:].argmax(-1)
    assert torch.equal(first, first.sort(1).values)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_keep_their_precision_and_scores_have_at_least_that_of_fp32(name, dtype):
    state, attention = tokens(dtype=dtype)
    if list(make(name).parameters()):
        pytest.skip("scores by weights, in whatever precision the model has")
    after = make(name)(state, attention, 30)
    assert {t.dtype for t in (after.x, after.source, after.size) if t is not None} == {dtype}
    exact = make(name)(state._replace(x=state.x.double(), source=state.source.double()),
                       attention._replace(q=attention.q.double(), k=attention.k.double()), 30)  # fmt: skip
    assert torch.equal(after.source > 0, exact.source > 0)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_every_patch_that_is_not_dropped(name):
    state, attention = tokens()
    x = state.x.requires_grad_()
    make(name)(state._replace(x=x), attention, some(name)[0]).x.square().sum().backward()
    reached = x.grad.abs().sum(-1) > 0
    assert make(name).drops or reached.all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("prefix", [{}, {"distilled": True}, {"distilled": True, "registers": 3}], ids=str)
def test_works_inside_a_model_behind_any_prefix(name, prefix):
    dense = tiny_vit(depth=3, **prefix)
    first, second = some(name)
    model = reduce_tokens(dense, name, {1: first, 2: second})
    state = model.embed(images(2))
    for block in model.blocks:
        state = block(state)
    assert state.x.shape[1] == model.config.prefix + second
    difference = (model(images(4)) - dense(images(4))).abs().max()
    assert 1e-4 < difference < 2


@pytest.fixture(
    scope="module",
    params=[(name, dynamic) for name in METHODS for dynamic in (False, True)[: 1 + make(name).any_size]],
    ids=str,
)
def exported(request, tmp_path_factory) -> tuple[nn.Module, Path, bool]:
    """A model that reduces tokens and its graph; where the flag says so, with a dynamic height and two reductions."""
    name, dynamic = request.param
    # of the 21 patches of the smallest image both blocks leave 13: no patch less, which only the graph does not know
    keep = {1: some(name)[0]} | ({2: 29} if dynamic else {})
    model = tiny_vit(depth=2 + dynamic, reducer=name, keep=keep, dynamic_image_size=dynamic)
    shapes = {0: Dim("batch", min=1, max=64)} | ({2: 4 * Dim("rows", min=3, max=32)} if dynamic else {})
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    program = torch.onnx.export(
        model, (images(2),), dynamo=True, opset_version=20, dynamic_shapes=(shapes,), verbose=False
    )
    program.save(path)
    return model, path, dynamic


def test_onnxruntime_agrees_at_every_batch_and_size(exported):
    model, path, dynamic = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 3):
        for height in (28, 44, 12) if dynamic else (28,):
            batch_of = torch.randn(batch, 3, height, 28)
            got = session.run(None, {session.get_inputs()[0].name: batch_of.numpy()})[0]
            want = model(batch_of).detach().numpy()
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # fp32; another choice of tokens is off by O(0.1)


def test_an_engine_of_the_graph_answers_alike_whatever_is_beside_an_image(exported):
    _, path, _ = exported
    few, engine = images(3).numpy(), subject(Here(), "onnxruntime", path, path, threads=1)
    with engine.open() as opened:  # another process is left to tests/deploy: starting one takes half a second
        answers = opened.run(few)[None]
    engine = replace(engine, apart=lambda batches: nullcontext(lambda: answers))
    found = check_consistency(engine, few, Served(1, 3, 6, ((28, 28),)))
    assert found.reasons() == ()
    assert not any(check.skipped for check in found.checks)


def test_the_graph_has_no_operator_that_runtimes_refuse(exported):
    _, path, _ = exported
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert not FORBIDDEN & operators.keys()


def test_tensorrt_rtx_parses_the_graph(exported):
    trt = pytest.importorskip("tensorrt_rtx")
    _, path, _ = exported
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(path.read_bytes()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
