"""The searches of counts that token methods' authors published."""

from __future__ import annotations

import pytest
import torch
from tiny import images, labelled_by, tiny_vit
from torch import nn
from torch.nn import functional as F

from vitprune.errors import InputError, NotSupported
from vitprune.macs import macs
from vitprune.model.state import TokenState
from vitprune.recover import Batch
from vitprune.search import diffrate, psvit
from vitprune.search.diffrate import Rate, RateSettings, _macs, _merged, _searching
from vitprune.search.own import check_own, own_number, search_own
from vitprune.surgery import reduce_tokens

QUICK = RateSettings(steps=60, lr=0.2, last_lr=0.05, unit_macs=1e5)


def test_a_rate_by_hand():
    rate = Rate(9, 4)  # leaves 9, 5 or 1
    assert rate.numbers.tolist() == [9, 5, 1]
    with torch.no_grad():
        rate.logits.copy_(torch.tensor([0.5, 0.2, 0.3]).log())
    left = rate.left()  # 4.5 + 1 + 0.3, rounded up
    assert left.item() == pytest.approx(6)
    left.backward()
    torch.testing.assert_close(rate.logits.grad, torch.tensor([0.5, 0.2, 0.3]) * (rate.numbers - 5.8))
    rate.logits.grad = None
    mask = rate.mask(6, 8, 9).squeeze(1)
    torch.testing.assert_close(mask, torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0, 1]))
    mask[4].backward()  # the fifth stays where 9 or 5 are left
    torch.testing.assert_close(rate.logits.grad, torch.tensor([0.5, 0.2, 0.3]) * (torch.tensor([1.0, 1, 0]) - 0.7))


@pytest.mark.parametrize("labelled", [True, False])
def test_diffrates_search_meets_the_operations_asked_for(labelled):
    model, calls = tiny_vit(depth=4), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target = 0.6 * macs(model.config)
    batches = labelled_by(model)

    def unlabelled(epoch):
        return (Batch(batch.images) for batch in batches(epoch))

    found = diffrate.search_counts(model, batches if labelled else unlabelled, target, QUICK,
                                   progress=lambda *told: calls.append(told))  # fmt: skip
    assert found.patches[0] == 49  # the first block is left alone
    assert list(found.patches) == sorted(found.patches, reverse=True)
    small = reduce_tokens(model, "diffrate", found.patches, found.method_weights)
    assert macs(small.config) == pytest.approx(target, rel=0.05)  # counts are whole numbers
    for number, block in enumerate(small.blocks):
        if block.reducer is not None:
            assert int(block.reducer.ranked) == int(found.method_weights[f"blocks.{number}.reducer.ranked"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [done for done, _, _ in calls] == list(range(1, 61))


@torch.no_grad()
@pytest.mark.parametrize(("merging", "atol"), [((41, 33, 17), 1e-4), ((37, 29, 13), 0.2)])
def test_what_a_search_marks_is_what_the_found_model_leaves_out(merging, atol):
    """Where it merges, sizes are at least 1 while it searches, as the authors have it, and others afterwards."""
    model = tiny_vit(depth=4)
    searching = _searching(model, 4).train()
    for block, dropped, merged in zip(searching.blocks[1:], (41, 33, 17), merging, strict=True):
        for rate, number in ((block.reducer.dropping, dropped), (block.reducer.merging, merged)):
            rate.logits.copy_(-100 * (rate.numbers - number).square())
    marked = searching(images(3))
    found = diffrate._found(searching)
    assert found.patches[1:] == merging
    small = reduce_tokens(model, "diffrate", found.patches, found.method_weights)
    assert _macs(searching).item() == pytest.approx(macs(small.config), rel=1e-6)
    assert (small(images(3)) - marked).abs().max() < atol


@torch.no_grad()
def test_merging_while_it_searches_agrees_with_a_scattering_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 6, generator=generator)
    state = TokenState(x, 2, 10, 0.5 + torch.rand(2, 12, 1, generator=generator))
    after = _merged(state, left=4, ranked=8)
    for image in range(2):
        patches, sizes = x[image, 2:10], state.size[image, 2:10]
        unit = F.normalize(patches, dim=-1)
        alike, into = (unit[4:] @ unit[:4].T).max(1)
        means = patches[:4].scatter_reduce(0, into[:, None].expand(4, 6), patches[4:], "mean")
        grown = (sizes[4:] * alike[:, None]).clamp(min=1)
        sums = sizes[:4].clamp(min=1).scatter_reduce(0, into[:, None], grown, "sum")
        torch.testing.assert_close(after.x[image], torch.cat([x[image, :2], means, x[image, 6:]]))
        torch.testing.assert_close(after.size[image, 2:6], sums)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_operations_that_cannot_be_meant_are_refused(share):
    model = tiny_vit()
    with pytest.raises(InputError, match="target_macs must lie above 0 and below the model's"):
        diffrate.search_counts(model, labelled_by(model), share * macs(model.config), QUICK)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"granularity": 0}, {"lr": 0.0}, {"unit_macs": 0.0}], ids=str)
def test_settings_out_of_range_are_a_sentence(settings):
    with pytest.raises(InputError, match="a search needs steps, granularity, lr and unit_macs above 0"):
        RateSettings(**settings)


def test_a_search_without_images_says_so():
    model = tiny_vit()
    with pytest.raises(InputError, match="diffrate's search needs calibration images, got none"):
        diffrate.search_counts(model, lambda epoch: iter(()), 0.5 * macs(model.config), RateSettings(steps=3))
    with pytest.raises(InputError, match="psvit's search needs images"):
        psvit.search_counts(model, torch.zeros(0, 3, 28, 28))


@torch.no_grad()
def test_psvits_search_keeps_every_block_within_its_error_and_no_step_more():
    model, tolerance = tiny_vit(depth=4), 0.002
    found = psvit.search_counts(model, images(20), tolerance, step=3)
    assert found.patches[0] > found.patches[2] == found.patches[3]
    small = reduce_tokens(model, "psvit", found.patches, found.method_weights)
    state, dense = small.embed(images(20)), model.embed(images(20))
    kept = [torch.arange(50)]
    for block, whole in zip(small.blocks, model.blocks, strict=True):
        state, dense = block(state), whole(dense)
        kept.append(torch.arange(50) if state.ids is None else torch.cat([torch.tensor([0]), 1 + state.ids]))

    def error(block: int, reading: torch.Tensor) -> float:
        """Of what the found model reads of ``block``, where it reads some of the dense model's tokens."""
        entering = model.embed(images(20))
        for before in model.blocks[:block]:
            entering = before(entering)
        asked = torch.tensor([0]) if block == 3 else kept[block + 1]
        right = model.blocks[block](entering).x[:, asked]
        got = model.blocks[block](entering._replace(x=entering.x[:, reading])).x[:, torch.isin(reading, asked)]
        return float((got - right).square().sum() / right.square().sum())

    for block in range(1, 4):
        assert error(block, kept[block]) <= tolerance
        needed = torch.tensor([0]) if block == 3 else kept[block + 1]
        significance = found.method_weights.get(f"blocks.{block - 1}.reducer.significance")
        if significance is None:  # the block before leaves what enters it
            continue
        fewer = significance.topk(found.patches[block - 1] - 3).indices.sort().values
        fewer = torch.cat([torch.tensor([0]), 1 + fewer])
        # without the last three, unless these are needed, the error would be above the tolerance
        assert not torch.isin(needed, fewer).all() or error(block, fewer) > tolerance


@torch.no_grad()
def test_psvits_search_adds_the_most_significant_first():
    model = tiny_vit(depth=2)
    wide = psvit.search_counts(model, images(20), 0.05, step=10)
    narrow = psvit.search_counts(model, images(20), 0.02, step=10)
    assert narrow.patches[0] > wide.patches[0]
    best = {name: set(found.method_weights["blocks.0.reducer.significance"].topk(found.patches[0]).indices.tolist())
            for name, found in (("wide", wide), ("narrow", narrow))}  # fmt: skip
    assert best["wide"] < best["narrow"]


def test_models_without_a_class_token_are_refused():
    model: nn.Module = tiny_vit(class_token=False, pool="avg")
    with pytest.raises(NotSupported, match="psvit scores patches by the class token's attention"):
        psvit.search_counts(model, images(2))
    with pytest.raises(NotSupported, match="diffrate scores patches by the class token's attention"):
        diffrate.search_counts(model, labelled_by(model), 1.0)


@pytest.mark.parametrize(
    ("schedule", "number"),
    [("own-0.65", 0.65), ("own-1", 1.0), ("own-", None), ("published-0.7", None), ({3: 20}, None), (None, None)],
    ids=str,
)
def test_an_own_search_is_asked_for_by_name(schedule, number):
    assert own_number(schedule) == number


@pytest.mark.parametrize(
    ("method", "number", "message"),
    [
        ("tome", 0.5, r"tome has no search of its own, only diffrate \(own-NUMBER: the share"),
        ("diffrate", 1.0, "own-1: the number of diffrate's own search is the share of the operations"),
        ("psvit", 0.0, "own-0: the number of psvit's own search is the error that each block may have"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused(method, number, message):
    with pytest.raises(InputError, match=message):
        check_own(method, number)


def test_a_profiles_own_searches_are_those_of_the_methods():
    model = tiny_vit(depth=3)
    found = search_own("diffrate", model, images(8), 0.6)
    assert macs(reduce_tokens(model, "diffrate", *found).config) == pytest.approx(0.6 * macs(model.config), rel=0.08)
    assert search_own("psvit", model, images(8), 0.01).patches == psvit.search_counts(model, images(8), 0.01).patches
