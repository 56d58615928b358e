from __future__ import annotations

import pytest
import torch
from tiny import images, tiny_vit
from torch.nn import functional as F

from vitprune import statistics
from vitprune.statistics import captured_inputs, gate_gradients, images_per_batch, stream_blocks

VARIANTS = [{}, {"layer_scale": True, "gated": True}, {"residual": "parallel"}, {"residual": "post", "classes": 0}]


@pytest.fixture(params=[1 << 22, 40_000], ids=["one batch", "batches"])  # 40,000 elements: batches of 12 images
def batched(request, monkeypatch):
    monkeypatch.setattr(statistics, "ELEMENTS_PER_BATCH", request.param)


def whole_inputs(model, pictures):
    """What proj and fc2 of each block read when the whole model runs at once."""
    seen = {}
    handles = []
    for number, block in enumerate(model.blocks):
        for half, linear in (("attn", block.attn.proj), ("mlp", block.mlp.fc2)):
            key = (number, half)
            handles.append(linear.register_forward_pre_hook(lambda _, x, key=key: seen.update({key: x[0]})))
    model(pictures)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_streamed_moments_equal_those_of_the_whole_model_at_once(variant, batched):
    model, pictures = tiny_vit(**variant).double(), images(20).double()
    whole = whole_inputs(model, pictures)
    for step in stream_blocks(model, pictures, moments=True):
        for half in ("attn", "mlp"):
            x = whole[step.number, half].flatten(0, 1)
            torch.testing.assert_close(step.moments[half], x.T @ x / len(x), rtol=1e-12, atol=1e-12)  # fp64 sums


@torch.no_grad()
def test_the_tokens_handed_out_are_those_that_enter_the_block(batched):
    model, pictures = tiny_vit(depth=3), images(20)
    steps = list(stream_blocks(model, pictures, moments=False))
    assert [step.number for step in steps] == [0, 1, 2]
    assert all(not step.moments for step in steps)
    logits = torch.cat([model.classify(model.blocks[2](model.blocks[1](state))) for state in steps[1].entering])
    torch.testing.assert_close(logits, model(pictures), rtol=1e-5, atol=1e-5)  # fp32, other batch sizes


def test_single_precision_moments_are_summed_in_double():
    model, pictures = tiny_vit(), images(8)
    step = next(stream_blocks(model, pictures, moments=True))
    exact = next(stream_blocks(model.double(), pictures.double(), moments=True))
    assert step.moments["mlp"].dtype == torch.float64
    torch.testing.assert_close(step.moments["mlp"], exact.moments["mlp"], rtol=1e-4, atol=1e-5)


def test_halves_that_a_block_lacks_have_no_moments():
    model = tiny_vit()
    model.blocks[0].attn = None
    model.blocks[1].mlp = None
    steps = list(stream_blocks(model, images(4), moments=True))
    assert [set(step.moments) for step in steps] == [{"mlp"}, {"attn"}]


def test_captures_are_gone_when_closed():
    model = tiny_vit()
    with captured_inputs(model.blocks[0]) as seen:
        model(images(1))
    seen.clear()
    model(images(1))
    assert not seen


def own_labels(model, pictures, seed=0):
    """The labels that ``gate_gradients`` draws where all images make one batch."""
    shares = model(pictures).softmax(-1).detach()
    return torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


@pytest.mark.parametrize("variant", VARIANTS[:3])
def test_gate_gradients_are_those_of_a_factor_on_each_unit(variant):
    model, pictures = tiny_vit(**variant).double(), images(5).double()
    labels = own_labels(model, pictures)
    found = gate_gradients(model, pictures)

    gates = {}
    for number, block in enumerate(model.blocks):
        for half, linear, units in (("attn", block.attn.proj, 4), ("mlp", block.mlp.fc2, 64)):
            gate = torch.ones(5, units, dtype=torch.float64, requires_grad=True)
            gates[number, half] = gate
            repeat = linear.in_features // units
            linear.register_forward_pre_hook(
                lambda _, x, gate=gate, repeat=repeat: x[0] * gate.repeat_interleave(repeat, 1)[:, None]
            )
    F.cross_entropy(model(pictures), labels, reduction="sum").backward()
    for (number, half), gate in gates.items():
        torch.testing.assert_close(found.blocks[number].writing[half], gate.grad, rtol=1e-9, atol=1e-12)  # fp64
    assert torch.equal(found.labels, labels)


PARKING = {"reducer": "evovit", "keep": {1: 30}, "pool": "avg"}  # what is parked counts in the mean


@pytest.mark.parametrize("variant", [*VARIANTS[:3], {"patches_out": 0}, PARKING])
def test_reading_gates_are_the_sums_of_weight_times_gradient_over_what_a_unit_reads_with(variant):
    last = {"keep": {1: 0}} if variant.pop("patches_out", None) == 0 else {}
    model, pictures = tiny_vit(**variant, **last).double(), images(1).double()
    labels = own_labels(model, pictures)
    found = gate_gradients(model, pictures)
    F.cross_entropy(model(pictures), labels, reduction="sum").backward()
    for block, gates in zip(model.blocks, found.blocks, strict=True):
        for half, linear, units in (("attn", block.attn.qkv, 4), ("mlp", block.mlp.fc1, 64)):
            rows = (linear.weight * linear.weight.grad).sum(1) + linear.bias * linear.bias.grad
            wanted = torch.zeros(units, dtype=torch.float64)
            for row, value in enumerate(rows.tolist()):  # heads: 8 rows of q, k and v each; units: one of fc1, or two
                wanted[row // 8 % 4 if half == "attn" else row % 64] += value
            torch.testing.assert_close(gates.reading[half][0], wanted, rtol=1e-9, atol=1e-12)  # fp64


@torch.no_grad()
def test_activations_are_means_over_the_tokens_of_an_image(batched):
    model, pictures = tiny_vit().double(), images(20).double()
    whole = whole_inputs(model, pictures)
    for step in stream_blocks(model, pictures, activations=True):
        assert not step.moments
        for half in ("attn", "mlp"):
            torch.testing.assert_close(step.activations[half], whole[step.number, half].abs().mean(1))


@torch.no_grad()
def test_influence_is_what_a_block_turns_its_tokens_by(batched):
    model, pictures = tiny_vit(), images(20)
    model.blocks[1].attn.proj.weight.zero_()
    model.blocks[1].mlp.fc2.weight.zero_()
    for linear in (model.blocks[1].attn.proj, model.blocks[1].mlp.fc2):
        linear.bias.zero_()
    first, idle = [step.influence for step in stream_blocks(model, pictures, influence=True)]
    before = model.embed(pictures)
    turned = 1 - F.cosine_similarity(before.x, model.blocks[0](before).x, dim=-1)
    assert first == pytest.approx(float(turned.mean()), rel=1e-5)
    assert idle == pytest.approx(0, abs=1e-12)


@torch.no_grad()
def test_a_block_that_leaves_the_prefix_alone_is_compared_by_it():
    model, pictures = tiny_vit(keep={1: 0}), images(4)
    last = list(stream_blocks(model, pictures, influence=True))[1]
    before = model.blocks[0](model.embed(pictures))
    turned = 1 - F.cosine_similarity(before.x[:, :1], model.blocks[1](before).x, dim=-1)
    assert last.influence == pytest.approx(float(turned.mean()), rel=1e-5)


def test_a_gate_gradient_is_the_slope_of_the_loss():
    model, pictures = tiny_vit().double(), images(1).double()
    labels = own_labels(model, pictures)
    found = gate_gradients(model, pictures).blocks[0].writing["mlp"][0, 7]
    weight = model.blocks[0].mlp.fc2.weight
    losses = []
    for gate in (1 + 1e-5, 1 - 1e-5):
        with torch.no_grad():
            dense = weight[:, 7].clone()
            weight[:, 7] *= gate
            losses.append(float(F.cross_entropy(model(pictures), labels)))
            weight[:, 7] = dense
    assert float(found) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-9)  # central difference


def test_batches_leave_the_gradients_of_an_image_alone(monkeypatch):
    model, pictures = tiny_vit().double(), images(9).double()
    whole = gate_gradients(model, pictures)
    monkeypatch.setattr(statistics, "ELEMENTS_PER_BATCH", 10_000)
    reports = []
    parts = gate_gradients(model, pictures, progress=lambda done, total, what: reports.append((done, total)))
    for one, other in zip(whole.blocks, parts.blocks, strict=True):
        for half in ("attn", "mlp"):
            torch.testing.assert_close(one.writing[half], other.writing[half], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(one.reading[half], other.reading[half], rtol=1e-9, atol=1e-12)
    assert torch.equal(whole.labels, parts.labels)
    assert reports == [(3, 9), (6, 9), (9, 9)]


def test_models_without_classifier_have_gate_gradients_too():
    found = gate_gradients(tiny_vit(classes=0), images(3))
    assert found.blocks[0].writing["attn"].shape == found.blocks[0].reading["attn"].shape == (3, 4)
    assert found.labels is None
    halves = [part for block in found.blocks for gates in block for part in gates.values()]
    assert all(float(part.abs().sum()) > 0 for part in halves)


def test_batches_shrink_as_models_grow():
    small, large = tiny_vit().config, tiny_vit(mlp=512).config
    assert images_per_batch(small) > images_per_batch(large) >= 1
