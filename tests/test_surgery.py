from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from tiny import images, tiny_config, tiny_vit

from vitprune.errors import InputError, NotSupported
from vitprune.model.config import VitConfig
from vitprune.model.vit import Vit, fingerprint
from vitprune.plan import BlockPlan, Plan
from vitprune.surgery import build, dense_plan, prune
from vitprune.tokens.base import track_sources

VARIANTS = {
    "plain": {},
    "gated": {"gated": True, "activation": "silu"},
    "q/k norm": {"qk_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False, "mlp_bias": False},
    "LayerScale, RMSNorm": {"layer_scale": True, "norm": "rms"},
    "parallel halves": {"residual": "parallel"},
    "norms behind the halves": {"residual": "post"},
    "distilled, registers": {"distilled": True, "registers": 2},
    "attention pooling": {"class_token": False, "pool": "map", "pool_heads": 4, "pool_mlp": 48},
}


def plan_for(model: Vit, *blocks: BlockPlan, reducer: str | None = None) -> Plan:
    return Plan(fingerprint(model), model.config.patches, reducer, blocks)


def masked(model: Vit, plan: Plan) -> Vit:
    """A copy of the dense model in which the columns that the plan removes are zero, and so are removed halves."""
    dense = build(model.config, model.state_dict())
    for block, kept in zip(dense.blocks, plan.blocks, strict=True):
        for half, units, indices in (
            ("attn", block.attn.heads, kept.heads),
            ("mlp", model.config.blocks[0].mlp, kept.mlp),
        ):
            out = block.attn.proj if half == "attn" else block.mlp.fc2
            keep = torch.zeros(units)
            keep[list(indices)] = 1
            with torch.no_grad():
                out.weight.mul_(keep.repeat_interleave(out.in_features // units))
                if not indices and out.bias is not None:
                    out.bias.zero_()
    return dense


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_slim_model_equals_the_dense_one_with_zeroed_columns(variant):
    model = tiny_vit(depth=2, **VARIANTS[variant])
    plan = plan_for(model, BlockPlan((0, 2, 3), tuple(range(5, 45))), BlockPlan((1,), tuple(range(0, 64, 3))))
    slim = prune(model, plan)
    assert [(b.heads, b.mlp) for b in slim.config.blocks] == [(3, 40), (1, 22)]
    # fp32, sums of other lengths in another order; a wrong row would be off by O(0.1)
    torch.testing.assert_close(slim(images(3)), masked(model, plan)(images(3)), rtol=0, atol=1e-5)
    assert (slim(images(3)) - model(images(3))).abs().max() > 1e-2


ENDS = [name for name in VARIANTS if name != "attention pooling"]


@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (1, 3), ()])
@pytest.mark.parametrize("variant", ENDS)
def test_a_last_block_for_the_prefix_alone_answers_the_same(variant, heads):
    model = tiny_vit(depth=2, **VARIANTS[variant])
    first, last = BlockPlan((0, 1, 2, 3), tuple(range(64)), 30), BlockPlan(heads, tuple(range(0, 64, 3)))
    whole = prune(model, plan_for(model, first, last, reducer="tome"))
    slim = prune(model, plan_for(model, first, replace(last, patches=0), reducer="tome"))
    state = slim.blocks[1](slim.blocks[0](track_sources(slim.embed(images(3)))))
    assert state.x.shape[1] == state.source.shape[1] == model.config.prefix
    torch.testing.assert_close(slim(images(3)), whole(images(3)), rtol=0, atol=1e-5)  # fp32, smaller products
    again = prune(slim, dense_plan(slim))
    assert again.config == slim.config
    torch.testing.assert_close(again(images(3)), slim(images(3)), rtol=0, atol=0)


def test_a_last_block_that_something_reads_is_not_cut_short():
    model = tiny_vit(depth=2, pool="avg")
    kept = BlockPlan((0, 1, 2, 3), tuple(range(64)))
    with pytest.raises(InputError, match="block 1 cannot leave the prefix tokens alone: something behind it reads"):
        prune(model, plan_for(model, kept, replace(kept, patches=0)))


@pytest.mark.parametrize("kept", [BlockPlan((), (3, 9)), BlockPlan((1, 2), ()), BlockPlan((), ())])
def test_a_removed_half_adds_nothing(kept):
    # norms behind the halves would turn the zeroed columns into the norm's bias, so only the usual order is compared
    model = tiny_vit(depth=2, layer_scale=True)
    plan = plan_for(model, BlockPlan((0, 1, 2, 3), tuple(range(64))), kept)
    slim = prune(model, plan)
    assert not [name for name in slim.state_dict() if not kept.heads and name.startswith("blocks.1.attn")]
    torch.testing.assert_close(slim(images(3)), masked(model, plan)(images(3)), rtol=0, atol=1e-5)  # as above


def test_a_model_without_blocks_left_classifies_its_embeddings():
    model = tiny_vit(depth=2)
    slim = prune(model, plan_for(model, BlockPlan((), ()), BlockPlan((), ())))
    torch.testing.assert_close(slim(images(2)), model.classify(model.embed(images(2))), rtol=0, atol=0)


def test_the_dense_plan_changes_no_bit():
    model = tiny_vit(depth=2)
    slim = prune(model, dense_plan(model))
    assert slim.config == model.config
    assert torch.equal(slim(images(3)), model(images(3)))


def test_the_slim_model_has_weights_of_its_own():
    model = tiny_vit(depth=2)
    before = fingerprint(model)
    slim = prune(model, dense_plan(model))
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.add_(1.0)
    assert fingerprint(model) == before


def test_compensated_weights_take_the_place_of_kept_columns():
    model = tiny_vit(depth=2)
    plan = plan_for(model, BlockPlan((1, 3), (0, 2, 7)), BlockPlan((0, 1, 2, 3), tuple(range(64))))
    proj, fc2 = torch.randn(32, 16), torch.randn(32, 3)
    slim = prune(model, plan, {(0, "attn"): proj, (0, "mlp"): fc2})
    assert torch.equal(slim.blocks[0].attn.proj.weight, proj)
    assert torch.equal(slim.blocks[0].mlp.fc2.weight, fc2)
    assert torch.equal(slim.blocks[0].attn.proj.bias, model.blocks[0].attn.proj.bias)


def test_a_compensated_weight_of_another_shape_is_refused():
    model = tiny_vit(depth=1)
    plan = plan_for(model, BlockPlan((1, 3), (0, 2, 7)))
    with pytest.raises(
        InputError, match=r"compensated weight for blocks\.0\.mlp\.fc2\.weight is \(32, 4\), .* \(32, 3\)"
    ):
        prune(model, plan, {(0, "mlp"): torch.randn(32, 4)})


def test_plans_follow_one_another_as_their_composition_does():
    model = tiny_vit(depth=2)
    first = plan_for(model, BlockPlan((0, 2, 3), tuple(range(0, 64, 2))), BlockPlan((0, 1), (5, 6), 20), reducer="evit")
    half_way = prune(model, first)
    second = plan_for(half_way, BlockPlan((1, 2), (3, 9, 30), 30), BlockPlan((1,), (0, 1)), reducer="evit")
    both = first.then(second)
    assert prune(half_way, second).config == prune(model, both).config
    assert torch.equal(prune(half_way, second)(images(2)), prune(model, both)(images(2)))


def test_an_earlier_plans_token_counts_survive_a_later_plan_without_any():
    model = tiny_vit(depth=2)
    full = BlockPlan((0, 1, 2, 3), tuple(range(64)))
    counts = [BlockPlan(full.heads, full.mlp, patches) for patches in (30, 20)]
    reduced = prune(model, plan_for(model, *counts, reducer="tome"))
    assert [b.patches for b in prune(reduced, dense_plan(reduced)).config.blocks] == [30, 20]


@pytest.mark.parametrize("reducer", ["evit", "tome"])
def test_a_pruned_model_is_rebuilt_bit_for_bit_from_plain_data_and_safetensors(reducer):
    model = tiny_vit(depth=2, distilled=True)
    plan = plan_for(model, BlockPlan((1, 3), (0, 2), 30), BlockPlan((0,), tuple(range(9)), 20), reducer=reducer)
    slim = prune(model, plan)
    config = VitConfig.from_dict(json.loads(json.dumps(slim.config.to_dict())))
    again = build(config, load(save(slim.state_dict())))
    assert again.config == slim.config
    assert fingerprint(again) == fingerprint(slim)
    assert torch.equal(again(images(3)), slim(images(3)))


def test_double_precision_stays_double():
    model = build(tiny_config(), {k: v.double() for k, v in tiny_vit().state_dict().items()})
    slim = prune(model, plan_for(model, BlockPlan((0,), (1, 2), 30), BlockPlan((0, 2), (3,)), reducer="tome"))
    assert slim(images(1).double()).dtype == torch.float64


def test_a_block_that_leaves_what_enters_gets_no_reducer():
    model = tiny_vit(depth=2)
    full = BlockPlan((0, 1, 2, 3), tuple(range(64)), 30)
    slim = prune(model, plan_for(model, full, full, reducer="evit"))
    assert [b.patches for b in slim.config.blocks] == [30, None]
    assert slim.blocks[1].reducer is None


def test_a_plan_that_keeps_all_tokens_names_no_reducer():
    model = tiny_vit(depth=1)
    slim = prune(model, plan_for(model, BlockPlan((0, 1), (3,), 49), reducer="evit"))
    assert slim.config.reducer is None


def test_another_models_plan_is_refused():
    model, other = tiny_vit(seed=0), tiny_vit(seed=1)
    with pytest.raises(InputError, match=r"the plan was made for the model with hash .* load the weights"):
        prune(other, dense_plan(model))


@pytest.mark.parametrize(
    ("blocks", "reducer", "sentence"),
    [
        ([BlockPlan((0,), (1,))], None, "the plan is for 1 blocks, the model has 2"),
        ([BlockPlan((0, 4), (1,)), BlockPlan((), ())], None, "block 0: the plan keeps heads up to 4, the model has 4"),
        ([BlockPlan((), ()), BlockPlan((0,), (64,))], None, "block 1: the plan keeps MLP units up to 64"),
        ([BlockPlan((0,), (1,), 40), BlockPlan((0,), (1,), 19)], "tome", "block 1: tome can leave 20 to 40 of 40"),
        ([BlockPlan((0,), (1,), 1), BlockPlan((0,), (1,))], "evit", "block 0: evit can leave 2 to 49 of 49"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(blocks, reducer, sentence):
    model = tiny_vit(depth=2)
    with pytest.raises(InputError, match=sentence):
        prune(model, plan_for(model, *blocks, reducer=reducer))


def test_a_plan_for_another_image_size_is_refused():
    model = tiny_vit(depth=1)
    with pytest.raises(InputError, match="images with 100 patches, the model is made for 49"):
        prune(model, Plan(fingerprint(model), 100, None, (BlockPlan((0,), (1,)),)))


def test_a_second_token_method_is_refused():
    model = prune(m := tiny_vit(depth=1), plan_for(m, BlockPlan((0,), (1,), 30), reducer="evit"))
    with pytest.raises(InputError, match="already reduces tokens by evit, and the plan by tome"):
        prune(model, plan_for(model, BlockPlan((0,), (0,), 20), reducer="tome"))


@pytest.mark.parametrize(("norm", "kept"), [("attn_norm", BlockPlan((0, 1), tuple(range(64)))),
                                            ("mlp_norm", BlockPlan((0, 1, 2, 3), tuple(range(60))))])  # fmt: skip
def test_norms_across_what_is_pruned_are_refused(norm, kept):
    model = tiny_vit(depth=1, **{norm: True})
    with pytest.raises(NotSupported, match="normalises across what would be pruned"):
        prune(model, plan_for(model, kept))
    prune(model, plan_for(model, BlockPlan((), ())))  # all of a half may go


def test_a_method_that_needs_the_class_token_says_so():
    with pytest.raises(NotSupported, match="no class token; use cait or pitome or tome"):
        build(tiny_config(class_token=False, pool="avg", reducer="evit", keep={0: 30}))


def test_weights_of_another_architecture_are_refused():
    with pytest.raises(InputError, match=r"do not belong to this architecture[\s\S]*fc1"):
        build(tiny_config(mlp=32), tiny_vit(mlp=64).state_dict())


def test_surgery_follows_the_models_device_and_dtype():
    model = tiny_vit(depth=1).to(torch.bfloat16)
    assert {p.dtype for p in prune(model, dense_plan(model)).parameters()} == {torch.bfloat16}
