"""Every method on a whole model: the pattern, the sparsity, what is refused, and what it is worth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import images, randomise, tiny_config, tiny_vit
from torch.nn import functional as F

from vitprune import parts
from vitprune.errors import InputError
from vitprune.model.vit import fingerprint
from vitprune.plan import BlockPlan, Plan
from vitprune.sparsify import BLOCKS, Thinner, chosen_layers, cubic, geometric, sparsify
from vitprune.surgery import build, prune
from vitprune.weights._layers import Gradients, Moments, hessian_diagonal, linears, view
from vitprune.weights.base import Pattern, WeightMethod, compete, smallest
from vitprune.weights.cap import Cap
from vitprune.weights.mfac import Mfac
from vitprune.weights.obs import Obs
from vitprune.weights.woodfisher import WoodFisher

METHODS = parts.names("vitprune.weights")
PATTERNS = [("unstructured", 0.5), ("block-4", 0.5), ("2:4", None)]
FEW = r"blocks\.\d\.attn\.proj"  # full OBS takes no more


def layers_of(method):
    return {"layers": FEW} if method == "obs" else {}


def tiny(**config):
    return tiny_vit(dim=16, heads=2, mlp=32, image=16, **config)


def pictures(count=24, seed=0):
    return images(count, size=16, seed=seed)


def divergence(model, other):
    with torch.no_grad():
        found, wanted = (one(pictures(64, seed=7)).log_softmax(-1) for one in (model, other))
    return float(F.kl_div(found, wanted, reduction="batchmean", log_target=True))


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=[name for name, _ in PATTERNS])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_the_pattern(method, pattern, sparsity):
    model = tiny()
    before = fingerprint(model)
    found = sparsify(model, pictures(), method, pattern, sparsity, **layers_of(method))
    assert fingerprint(model) == before
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all(Pattern.parse(pattern).holds(mask) for mask in found.masks.values())
    for name, layer in linears(found.model).items():
        assert torch.equal(layer.weight != 0, found.masks.get(name, torch.ones_like(layer.weight, dtype=torch.bool)))
    untouched = set(model.state_dict()) - {f"{name}.weight" for name in found.masks}
    assert all(torch.equal(model.state_dict()[name], found.model.state_dict()[name]) for name in untouched)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_does_the_same_again(method):
    first, second = (sparsify(tiny(), pictures(), method, "2:4", **layers_of(method)).model for _ in range(2))
    assert fingerprint(first) == fingerprint(second)


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_0_stay_0_and_count(method):
    model = sparsify(tiny(), None, "magnitude", sparsity=0.3).model
    found = sparsify(model, pictures(), method, sparsity=0.5, **layers_of(method))
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all(
        not found.masks[name][layer.weight == 0].any() for name, layer in linears(model).items() if name in found.masks
    )


BETTER = [
    ("cap", "woodfisher"),
    ("woodfisher", "obd_fisher"),
    ("obd_fisher", "magnitude"),
    ("obd", "magnitude"),
    ("mfac", "magnitude"),
    ("cap_fast", "magnitude"),
    ("obc", "wanda"),
    ("sparsegpt", "wanda"),
]


def test_what_methods_keep_of_the_answers():
    model = tiny()
    lost = {
        method: divergence(sparsify(model, pictures(64), method, sparsity=0.5, recompute=1).model, model)
        for method in METHODS
        if method != "obs"
    }
    assert not [pair for pair in BETTER if lost[pair[0]] >= lost[pair[1]]], lost


@pytest.mark.parametrize("variant", [{}, {"residual": "parallel", "gated": True}, {"classes": 0, "layer_scale": True}])
def test_gradients_are_those_of_each_image_alone(variant):
    model, some = tiny(**variant).double(), pictures(9).double()
    labels = None if variant.get("classes") == 0 else torch.arange(9)
    found = {v.name: v for v in Gradients(model, linears(model), some, labels, 0, None)}
    assert set(found) == set(linears(model))
    whole = {name: v.gradients(slice(0, len(v.weight))) for name, v in found.items()}
    for image in (0, 8) if labels is not None else ():
        model.zero_grad()
        F.cross_entropy(model(some[image : image + 1]), labels[image : image + 1]).backward()
        for name, layer in linears(model).items():
            torch.testing.assert_close(whole[name][image], layer.weight.grad, rtol=1e-8, atol=1e-11)
    for name, v in found.items():
        torch.testing.assert_close(v.gradients(slice(3, 7)), whole[name][:, 3:7])
        torch.testing.assert_close(v.gradients(slice(0, 4), 4), whole[name][:8, :4].unflatten(0, (2, 4)).mean(1))


@pytest.mark.parametrize(
    ("reducer", "pool"), [("evit", "token"), ("tome", "token"), ("psvit", "token"), ("evovit", "avg")]
)
def test_gradients_where_rows_read_different_tokens(reducer, pool):
    config = tiny_config(dim=16, heads=2, mlp=32, image=16, depth=3, reducer=reducer, pool=pool, keep={1: 9})
    last = replace(config.blocks[-1], patches=0)  # computed for the class token alone
    model = build(config.with_blocks([*config.blocks[:-1], last], reducer) if pool == "token" else config)
    randomise(model)
    model, some, labels = model.double(), pictures(8).double(), torch.arange(8)
    chosen = chosen_layers(model, Pattern(), None)
    found = {v.name: v.gradients(slice(0, len(v.weight))) for v in Gradients(model, chosen, some, labels, 0, None)}
    F.cross_entropy(model(some), labels, reduction="sum").backward()
    for name, layer in chosen.items():
        torch.testing.assert_close(found[name].sum(0), layer.weight.grad, rtol=1e-8, atol=1e-10)


def test_the_diagonal_of_the_hessian_is_that_of_the_divergence():
    model, some = tiny(depth=1, classes=3).double(), pictures(8).double()
    name, layer = "blocks.0.mlp.fc2", model.blocks[0].mlp.fc2
    own = model(some).log_softmax(-1).detach()

    def loss(weight):
        answers = torch.func.functional_call(model, {f"{name}.weight": weight}, some).log_softmax(-1)
        return F.kl_div(answers, own, reduction="batchmean", log_target=True)

    found = hessian_diagonal(model, {name: layer}, some, probes=2000)[name]
    w = layer.weight.detach()
    for row, column in ((0, 0), (3, 5), (15, 31)):
        step = torch.zeros_like(w)
        step[row, column] = 1e-3
        with torch.no_grad():
            exact = float(loss(w + step) - 2 * loss(w) + loss(w - step)) / 1e-6
        assert float(found[row, column]) == pytest.approx(exact, rel=0.3, abs=0.1 * float(found.mean()))  # by chance


@torch.no_grad()
def test_moments_see_what_has_been_removed_in_front():
    model, some = tiny(depth=2), pictures(8)
    chosen = {name: layer for name, layer in linears(model).items() if name.startswith("blocks.")}
    moments = Moments(model, chosen, some, None)
    for v in moments:
        if v.name == "blocks.0.mlp.fc2":
            model.blocks[0].mlp.fc2.weight.zero_()
        if v.name == "blocks.1.attn.qkv":
            x = model.blocks[1].norm1(model.blocks[0](model.embed(some)).x).flatten(0, 1)
            torch.testing.assert_close(v.moments.float(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_by_default_2_to_4_takes_the_mlps_and_other_patterns_all_layers_of_the_blocks():
    model = tiny(depth=1)
    assert set(chosen_layers(model, Pattern.parse("2:4"), None)) == {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}
    assert set(chosen_layers(model, Pattern(), None)) == {
        f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert set(sparsify(model, pictures(), "cap", sparsity=0.5, layers="head|" + BLOCKS).masks) == {
        "head", *chosen_layers(model, Pattern(), None)
    }  # fmt: skip


@pytest.mark.parametrize("method", ["cap", "sparsegpt", "obd"])
def test_pruned_models_are_sparsified_as_others_are(method):
    model = tiny(depth=2)
    blocks = (BlockPlan((0,), tuple(range(20)), 9), BlockPlan((0, 1), tuple(range(28)), 0))
    slim = prune(model, Plan(fingerprint(model), model.config.patches, "evit", blocks))
    found = sparsify(slim, pictures(), method, "2:4")
    assert all(Pattern.parse("2:4").holds(mask) for mask in found.masks.values())
    assert found.model(pictures(2)).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": 1.0}, "from 0 to below 1, got 1.0"),
        ({"sparsity": -0.1}, "from 0 to below 1, got -0.1"),
        ({"sparsity": float("nan")}, "from 0 to below 1, got nan"),
        ({}, "the pattern unstructured needs a sparsity"),
        ({"pattern": "2:4", "sparsity": 0.75}, "the pattern 2:4 makes a share of 0.5 zeros, not 0.75"),
        ({"pattern": "4:2"}, "wants 0 < N < M"),
        ({"pattern": "dense"}, "there is no pattern 'dense'"),
        ({"pattern": "block-5", "sparsity": 0.5}, r"blocks.0.attn.qkv reads 16 values, .* multiple of 5"),
        ({"sparsity": 0.5, "layers": "neck"}, "no linear layer is named 'neck'"),
        ({"sparsity": 0.5, "layers": "("}, "no regular expression"),
        ({"sparsity": 0.5, "images": 3}, "Cap takes gradients of at least 8 images, got 3"),
        ({"sparsity": 0.5, "labels": torch.zeros(4)}, "24 calibration images and 4 labels"),
        ({"sparsity": 0.5, "labels": torch.zeros(24)}, r"whole ones \[M\], got torch.float32 of shape \[24\]"),
        (
            {"sparsity": 0.5, "labels": torch.zeros(24, 1).long()},
            r"whole ones \[M\], got torch.int64 of shape \[24, 1\]",
        ),
        ({"sparsity": 0.5, "labels": torch.arange(24)}, "classes from 0 to 9 of the model, got 10"),
        ({"sparsity": 0.5, "labels": torch.arange(24) - 20}, "classes from 0 to 9 of the model, got -20"),
        ({"sparsity": 0.5, "recompute": 0}, "recompute is the number of steps, 1 or more, got 0"),
        ({"sparsity": 0.5, "recompute": -1}, "1 or more, got -1"),
        (
            {"sparsity": 0.5, "method": Cap(grad_batch=24)},
            "takes at least 8 gradients, and 24 images give 1; give more",
        ),
        ({"sparsity": 0.5, "method": Cap(damp_rel=0)}, "singular matrix; raise the damping, or give more images"),
        ({"sparsity": 0.5, "method": WoodFisher(damp=0.0)}, "singular matrix"),
        ({"sparsity": 0.5, "method": Mfac(damp=0.0)}, "M-FAC divides by its damping"),
        ({"sparsity": 0.5, "method": "cab"}, "did you mean 'cap'"),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_the_weights_alone(arguments, words):
    model = tiny()
    before = fingerprint(model)
    given = {"method": "cap", **arguments}
    with pytest.raises(InputError, match=words):
        sparsify(model, pictures(given.pop("images", 24)), **given)
    assert fingerprint(model) == before


def test_obs_of_many_weights_is_a_sentence(monkeypatch):
    monkeypatch.setattr("vitprune.weights.obs.MOST_WEIGHTS", 500)
    with pytest.raises(InputError, match=r"takes 500 of them, which blocks\.0\.attn\.proj exceeds with 512"):
        sparsify(tiny(), pictures(), "obs", sparsity=0.5, layers=FEW)


def test_obs_asks_for_no_more_layers_than_it_takes(monkeypatch):
    monkeypatch.setattr("vitprune.weights.obs.MOST_WEIGHTS", 500)

    class Endless:
        def __iter__(self):
            yield view("first", torch.nn.Linear(30, 20))
            raise AssertionError("one layer too many was asked for")

    with pytest.raises(InputError, match="which first exceeds with 600"):
        list(Obs().prune(Endless(), Pattern(), 0.5))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_weights_stays_as_it_is(method):
    model, empty = tiny(), "blocks.0.attn.proj" if method == "obs" else "blocks.0.mlp.fc1"
    linears(model)[empty].weight.data.zero_()
    found = sparsify(model, pictures(), method, sparsity=0.6, recompute=1, **layers_of(method))
    assert not found.masks.pop(empty).any()
    assert all(mask.any() and not mask.all() for mask in found.masks.values())


@pytest.mark.parametrize("method", ["magnitude", "cap", "sparsegpt", "cap_fast", "obs"])
def test_a_model_without_weights_stays_as_it_is(method):
    model = tiny()
    for layer in chosen_layers(model, Pattern(), FEW).values():
        layer.weight.data.zero_()
    found = sparsify(model, pictures(), method, sparsity=0.5, recompute=2, layers=FEW)
    assert fingerprint(found.model) == fingerprint(model)


def test_labels_of_any_whole_type_will_do():
    labels = torch.arange(24) % 10
    narrow, wide = (sparsify(tiny(), pictures(), "obd_fisher", sparsity=0.5, labels=some).model
                    for some in (labels.int(), labels))  # fmt: skip
    assert fingerprint(narrow) == fingerprint(wide)


@pytest.mark.parametrize("method", ["sparsegpt", "cap"])
def test_a_pruning_that_fails_leaves_the_weights_alone(method):
    model = tiny()
    before, thinner = fingerprint(model), Thinner(model, pictures(), method, sparsity=0.5)

    def progress(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        thinner.thin(0.5, progress)
    assert (fingerprint(model), thinner.steps) == (before, 0)


@pytest.mark.parametrize("options", [{"block": 0}, {"damp_rel": -1.0}, {"grad_batch": 0}, {"merge": "sum"}])
def test_options_out_of_range_are_a_sentence(options):
    with pytest.raises(InputError):
        Cap(**options)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "magnitude"])
def test_no_numbers_are_a_sentence(method):
    model, some = tiny(), pictures()
    some[3] = torch.nan
    with pytest.raises(InputError, match=r"no number"):
        sparsify(model, some, method, sparsity=0.5, **layers_of(method))


@pytest.mark.parametrize("method", ["cap", "obd_fisher"])
def test_labels_make_it_the_fisher_of_the_training_loss(method):
    model, labels = tiny(), torch.arange(24) % 10
    own, given = (sparsify(model, pictures(), method, sparsity=0.5, labels=some).masks for some in (None, labels))
    assert any(not torch.equal(own[name], given[name]) for name in own)


def test_recomputation_thins_by_equal_factors():
    seen = []

    class Spy(WeightMethod):
        recompute = 4

        def prune(self, layers, pattern, sparsity):
            seen.append(sparsity)
            return iter(())

    sparsify(tiny(), None, Spy(), sparsity=0.84)
    assert seen == pytest.approx([1 - 0.16 ** (step / 4) for step in (1, 2, 3, 4)])


def test_densities_end_where_they_are_to():
    for rule in (cubic, geometric):
        way = [rule(0.2, 0.9, done / 10) for done in range(11)]
        assert way[0] == pytest.approx(0.2)
        assert way[-1] == pytest.approx(0.9)
        assert way == sorted(way)
    assert geometric(0.2, 0.9, 0.5) == pytest.approx(1 - (0.8 * 0.1) ** 0.5)
    assert cubic(0.0, 0.8, 0.5) == pytest.approx(0.7)


def test_no_layer_is_emptied_where_layers_compete():
    scores = {"small": torch.rand(10, 10).double(), "large": 10 + torch.rand(10, 10).double()}
    masks = compete(scores, Pattern(), 0.5)
    assert int(masks["small"].sum()) == 2
    assert int(masks["large"].sum()) == 98


def test_what_was_removed_before_is_not_spared_where_layers_compete():
    scores = {"empty": torch.full((10, 10), -torch.inf).double(), "whole": torch.rand(10, 10).double()}
    masks = compete(scores, Pattern(), 0.5)
    assert (int(masks["empty"].sum()), int(masks["whole"].sum())) == (0, 100)


def test_exactly_so_many_are_smallest_though_some_are_equal():
    values = torch.tensor([1.0, 0, 1, 1, 0, 2])
    assert smallest(values, 3).tolist() == [True, True, False, False, True, False]
    assert not smallest(values, 0).any()
