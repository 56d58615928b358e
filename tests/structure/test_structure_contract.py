"""What every learned method promises, whatever it learns."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from search.synthetic import table as study_table
from tiny import images, labelled_by, tiny_config, tiny_vit
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitprune import parts
from vitprune.budgets import latency_budget, macs_budget, own_budget
from vitprune.errors import InputError, NotSupported
from vitprune.learn import Learned, Trained, learn, structure_method, untrained
from vitprune.macs import macs
from vitprune.model.config import VitConfig
from vitprune.model.vit import Block, Vit, fingerprint
from vitprune.plan import BlockPlan, Plan
from vitprune.recover import Batch, RecoverSettings, recover
from vitprune.search.counts import Counts
from vitprune.search.latency import LatencyTable
from vitprune.structure._gates import gated_weights, with_weights
from vitprune.structure.base import Amounts, Multiples
from vitprune.surgery import prune, reduce_tokens
from vitprune_deploy.profile.checks import DIM_METHODS

METHODS = parts.names("vitprune.structure")
SMALL = Multiples(heads=1, mlp=8, head_dim=2)
SETTINGS = RecoverSettings(steps=12, checks=3, lr=1e-3)
RECONSTRUCTED = {"cait_cdcp", "xpruner"}
CLOSE = {"rtol": 0, "atol": 1e-5}  # fp32, sums of other lengths


def batches(epoch: int):
    generator = torch.Generator().manual_seed(epoch)
    return (Batch(torch.randn(8, 3, 28, 28, generator=generator)) for _ in range(4))


@cache
def learned(name: str) -> tuple[Vit, Learned]:
    """A model, and what the method found within six tenths of its multiply-accumulates."""
    model = tiny_vit()
    return model, learn(name, model, macs_budget(model.config, 0.6), batches, images(8), SETTINGS, multiples=SMALL)


def gates_of(block: Block, kept: BlockPlan) -> dict[str, torch.Tensor]:
    """The gates, 0 and 1, under which ``block`` computes what surgery leaves of it by ``kept``."""
    gates: dict[str, torch.Tensor] = {}
    attn, mlp = block.attn, block.mlp
    if attn is not None:
        weight = attn.proj.weight
        for name, size, dims in (("q", attn.qk_dim, kept.qk), ("v", attn.v_dim, kept.v)):
            gates[name] = weight.new_zeros(attn.heads, size)
            for place, head in enumerate(kept.heads):
                gates[name][head, list(dims[place]) if dims else slice(None)] = 1
        gates |= {
            "k": gates["q"],
            "proj": gates["v"],
            "attn_out": weight.new_full((len(weight),), float(bool(kept.heads))),
        }
    if mlp is not None:
        weight = mlp.fc2.weight
        gates["fc1"] = weight.new_zeros(mlp.fc2.in_features)
        gates["fc1"][list(kept.mlp)] = 1
        gates |= {"fc2": gates["fc1"], "mlp_out": weight.new_full((len(weight),), float(bool(kept.mlp)))}
    return gates


def masked(model: Vit, plan: Plan, x: torch.Tensor) -> torch.Tensor:
    """What all of the model answers when the gates that the plan stands for are closed."""
    gates = [gates_of(block, kept) for block, kept in zip(model.blocks, plan.blocks, strict=True)]
    return with_weights(model, gated_weights(model, gates), lambda: model(x))


@pytest.fixture
def table() -> LatencyTable:
    """As measured by ``measure_table`` on an EPYC, of the tiny model: half of its heads, units and dims, and all."""
    return LatencyTable.from_dict(json.loads((Path(__file__).parent / "measured_table.json").read_text()))


def test_the_methods_are_those_of_the_folder():
    assert METHODS == ["cait_cdcp", "s2vite", "uvc", "vitslim", "wdpruning", "xpruner"]
    for name in METHODS:
        page = __import__(f"vitprune.structure.{name}", fromlist=["x"]).__doc__
        assert "https://" in page
        assert ("reconstruction" in page) == (name in RECONSTRUCTED)
    assert set(DIM_METHODS) == {name for name in METHODS if "qk" in structure_method(name).dims}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_mask_equals_slice(name, fused):
    _, found = learned(name)
    slim = prune(found.model, found.plan)
    square = all(block.qk_dim == block.v_dim for block in slim.config.blocks)
    if fused and not square:  # torch's fused kernel wants values of the size of keys: what it falls back on is tested
        fused = False
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH):
        torch.testing.assert_close(slim(images(4)), masked(found.model, found.plan, images(4)), **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_multiply_accumulates_are_within_the_budget_and_near_it(name):
    model, found = learned(name)
    slim = prune(found.model, found.plan).config
    assert 0.5 < macs(slim) / macs(model.config) <= 0.6
    assert all(block.mlp % 8 == 0 and block.qk_dim % 2 == 0 and block.v_dim % 2 == 0 for block in slim.blocks)


def whole_counts(config: VitConfig) -> Counts:
    """What a model has whose last block is computed for the prefix alone, as a latency table is asked for it."""
    heads, qk, v, mlp = zip(*((b.heads, b.qk_dim, b.v_dim, b.mlp) for b in config.blocks), strict=True)
    patches = (*(49,) * (len(heads) - 1), 0)
    return Counts(heads, mlp, patches, *(tuple(n * (h > 0) for n, h in zip(of, heads, strict=True)) for of in (qk, v)))


@pytest.mark.parametrize("name", METHODS)
def test_measured_latency_is_within_the_budget(name, table):
    model = tiny_vit()
    dense_ms, least_ms = (
        table.predict_ms(Counts((4, 4), (m, m), (49, 0), (d, d), (d, d))) for m, d in ((64, 8), (32, 4))
    )
    budget_ms = (dense_ms + least_ms) / 2
    budget = latency_budget(model.config, table, budget_ms, last_for_prefix=True)
    steps, measured = RecoverSettings(steps=6, checks=1, lr=1e-3), Multiples(2, 32, 4)  # of which the table has times
    found = learn(name, model, budget, batches, images(8), steps, multiples=measured)
    slim = prune(found.model, found.plan).config
    assert slim.blocks != model.config.blocks
    assert table.predict_ms(whole_counts(slim)) <= budget_ms * (1 + 1e-5)


def test_between_its_entries_a_table_is_a_straight_line_with_a_gradient():
    config = tiny_config(depth=12, dim=384, heads=6, mlp=1536, image=224, patch=16)
    found = study_table()
    budget = latency_budget(config, found, 15.0)
    dense = Amounts.dense(config)
    heads, mlp = dense.heads.clone().requires_grad_(), dense.mlp.clone()
    dense_ms = found.predict_ms(Counts.dense([6] * 12, [1536] * 12, 196))
    assert budget.cost(dense).item() == pytest.approx(1)
    mlp[3] = 960  # between 1152 and 768
    with torch.no_grad():
        heads[5] = 4.5
    cost = budget.cost(dense._replace(heads=heads, mlp=mlp))
    saved = 2.712 - (1.964 + 1.368) / 2 + 1.885 - (1.320 + 1.670) / 2
    assert cost.item() == pytest.approx(1 - saved / dense_ms)
    cost.backward()
    assert heads.grad[5].item() == pytest.approx((1.670 - 1.320) / dense_ms)


@pytest.mark.parametrize("name", ["cait_cdcp", "vitslim"])
def test_a_table_without_times_of_smaller_heads_is_a_sentence_where_they_are_pruned(name):
    config = tiny_config(depth=12, dim=384, heads=6, mlp=1536, image=224, patch=16)
    with pytest.raises(NotSupported, match="no times of smaller heads"):
        structure_method(name).check(config, latency_budget(config, study_table(), 15.0))


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(name, tmp_path):
    model, whole = learned(name)
    budget, path = macs_budget(model.config, 0.6), tmp_path / "state.pt"

    def stop(step, steps, what):
        if step == 6:
            raise KeyboardInterrupt

    more = {"multiples": SMALL, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        learn(name, model, budget, batches, images(8), SETTINGS, progress=stop, **more)
    assert path.is_file()
    seen = []
    found = learn(name, model, budget, batches, images(8), SETTINGS, progress=lambda *a: seen.append(a[0]), **more)
    assert seen[0] == 5
    assert found.plan.blocks == whole.plan.blocks
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["distilled", "no class token", "gated, no biases"])
@pytest.mark.parametrize("name", METHODS)
def test_other_models_are_pruned_alike(name, kind):
    config = {
        "distilled": {"distilled": True},
        "no class token": {"class_token": False, "pool": "avg", "final_norm": "pooled"},
        "gated, no biases": {"gated": True, "activation": "silu", "qkv_bias": False, "proj_bias": False},
    }[kind]
    model = tiny_vit(**config)
    steps = RecoverSettings(steps=4, checks=1, lr=1e-3)
    found = learn(name, model, macs_budget(model.config, 0.7), batches, images(8), steps, multiples=SMALL)
    slim = prune(found.model, found.plan)
    assert macs(slim.config) <= 0.7 * macs(model.config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(slim(images(2)), masked(found.model, found.plan, images(2)), **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_the_authors_way_to_train_learns_the_labels(name):
    model = tiny_vit()
    settings = RecoverSettings(steps=3, checks=1, lr=1e-3, recipe=structure_method(name).recipe)
    budget = own_budget(structure_method(name), model.config, 0.7)
    assert budget.unit == ("parameters" if name == "wdpruning" else "multiply-accumulates")
    found = learn(name, model, budget, labelled_by(model), images(8), settings, multiples=SMALL)
    assert found.checks[-1].step == 3
    assert found.plan.model_sha256 == fingerprint(found.model) != fingerprint(model)


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_pruned_is_a_sentence(name):
    model = tiny_vit()
    dense = macs_budget(model.config, 0.5)
    with pytest.raises(NotSupported, match="then reduce tokens"):
        structure_method(name)(reduce_tokens(model, "tome", {1: 30}), dense)
    with pytest.raises(NotSupported, match="normalises across them"):
        structure_method(name)(tiny_vit(attn_norm=True), dense)
    with pytest.raises(InputError, match="raise the budget"):
        learn(name, model, macs_budget(model.config, 0.05), batches, images(8), RecoverSettings(steps=1, checks=1))


@pytest.mark.parametrize("name", METHODS)
def test_a_tighter_plan_is_taken_from_the_same_training(name):
    model = tiny_vit()
    settings = RecoverSettings(steps=2, checks=1, lr=1e-3)
    student, method = untrained(name, model, macs_budget(model.config, 0.8), SMALL, settings)
    checks = recover(student, model, batches, images(4), settings, method=method).checks
    trained = Trained(student, method, checks)
    loose, tight, again = (trained.within(share) for share in (0.8, 0.5, 0.8))
    sizes = [macs(prune(found.model, found.plan).config) / macs(model.config) for found in (loose, tight)]
    assert sizes[1] <= 0.5 < sizes[0] <= 0.8
    assert again.plan == loose.plan


@pytest.mark.parametrize("name", ["s2vite", "cait_cdcp"])
def test_what_was_trained_is_what_is_cut_however_much_more_may_stay(name):
    model = tiny_vit()
    student, method = untrained(name, model, macs_budget(model.config, 0.5), SMALL, SETTINGS)
    checks = recover(student, model, batches, images(4), SETTINGS, method=method).checks
    method.train(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        answers = method.computed(student, lambda: student(images(4)))
        for share in (0.5, 0.8, 1.0):
            found = Trained(student, method, checks).within(share)
            torch.testing.assert_close(prune(found.model, found.plan)(images(4)), answers, **CLOSE)


@pytest.mark.parametrize("name", ["uvc", "xpruner"])
def test_a_short_training_ends_near_its_budget_by_itself(name):
    model = tiny_vit(image=8)
    steps, budget = RecoverSettings(steps=200, checks=1, lr=1e-3), macs_budget(model.config, 0.5)
    student, method = untrained(name, model, budget, SMALL, steps)
    recover(student, model, lambda epoch: [Batch(images(2, size=8))], images(2, size=8), steps, method=method)
    left = method.amounts() if name == "xpruner" else method.amounts(method.drops(), method.logits)
    assert 0.2 < budget.cost(left).item() < 0.6  # it may overshoot, and is filled up then


def test_costs_tell_trainings_apart():
    model = tiny_vit()
    budget = macs_budget(model.config, 0.5)
    other = budget._replace(cost=lambda left: budget.cost(left).square())
    names = [structure_method("uvc")(model, one, SMALL).identity for one in (budget, budget, other)]
    assert names[0] == names[1] != names[2]


def test_a_slim_model_recovers_as_any_other():
    model, found = learned("wdpruning")
    slim = prune(found.model, found.plan)
    after = recover(slim, model, batches, images(8), RecoverSettings(steps=16, checks=1, lr=1e-3))
    assert after.checks[-1].loss < after.checks[0].loss
