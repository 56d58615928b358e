"""Dims of queries, keys and values, and channels of the residual stream: mask equals slice where it can."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_surgery import VARIANTS, plan_for
from tiny import images, tiny_vit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitprune.errors import InputError, NotSupported
from vitprune.model.vit import Vit, fingerprint
from vitprune.plan import BlockPlan, Plan
from vitprune.surgery import build, dense_plan, prune, rows_of

ALL = BlockPlan((0, 1, 2, 3), tuple(range(64)))
CLOSE = {"rtol": 0, "atol": 1e-5}  # fp32, sums of other lengths; a wrong row would be off by O(0.1)


def some(rng: random.Random, count: int, least: int = 1) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(range(count), rng.randint(least, count))))


def random_block(rng: random.Random, square: bool) -> BlockPlan:
    """Other heads in every block, other dims in every head, and another number of each kind if not ``square``."""
    heads = () if rng.random() < 0.15 else some(rng, 4)
    qk, v = (rng.randint(1, 8) for _ in range(2))
    v = qk if square else v
    dims = [tuple(tuple(sorted(rng.sample(range(8), size))) for _ in heads) or None for size in (qk, v)]
    return BlockPlan(heads, () if rng.random() < 0.15 else some(rng, 64), None, *dims)


@torch.no_grad()
def masked(model: Vit, plan: Plan) -> Vit:
    """A copy of the dense model: zero rows of queries and keys that go, zero columns of values and units that go."""
    dense = build(model.config, model.state_dict())
    for block, kept in zip(dense.blocks, plan.blocks, strict=True):
        rows = rows_of(kept.heads, kept.qk, 8)
        for part in (block.attn.qkv.weight, block.attn.qkv.bias):
            for start in (0, 32) if part is not None else ():
                part[[start + row for row in range(32) if row not in rows]] = 0
        for layer, columns in ((block.attn.proj, rows_of(kept.heads, kept.v, 8)), (block.mlp.fc2, kept.mlp)):
            layer.weight[:, [i for i in range(layer.in_features) if i not in columns]] = 0
            if not columns and layer.bias is not None:
                layer.bias.zero_()
    return dense


@pytest.mark.parametrize("fused", [True, False])  # torch's own fused kernel wants values of the size of keys
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_random_plans_over_heads_dims_units_and_blocks_equal_their_masks(qkv_bias, fused):
    rng = random.Random(7)
    for seed in range(8):
        model = tiny_vit(depth=4, qkv_bias=qkv_bias, seed=seed)
        plan = plan_for(model, *(random_block(rng, square=fused) for _ in range(3)), BlockPlan((), ()))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH):
            torch.testing.assert_close(prune(model, plan)(images(2)), masked(model, plan)(images(2)), **CLOSE)


# the halves of the other variants are removed differently, or need a q/k norm's weights
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "q/k norm"])
def test_dims_of_every_kind_of_model_equal_their_masks(variant):
    model = tiny_vit(depth=1, **VARIANTS[variant])
    kept = BlockPlan((0, 2), tuple(range(9)), None, ((1, 2, 7), (0, 2, 3)), ((0, 1, 4, 5, 6), (2, 3, 4, 5, 7)))
    plan = plan_for(model, kept)
    slim = prune(model, plan)
    block = slim.config.blocks[0]
    assert (block.heads, block.qk_dim, block.v_dim, block.scale) == (2, 3, 5, 8**-0.5)
    torch.testing.assert_close(slim(images(3)), masked(model, plan)(images(3)), **CLOSE)


def test_values_may_leave_heads_whose_queries_are_normalised_and_queries_may_not():
    model = tiny_vit(depth=1, qk_norm=True)
    values = replace(ALL, v=((0, 1, 2),) * 4)
    torch.testing.assert_close(
        prune(model, plan_for(model, values))(images(2)), masked(model, plan_for(model, values))(images(2)), **CLOSE
    )
    with pytest.raises(NotSupported, match=r"blocks\.0\.attn\.q_norm\.weight normalises each head's dims, so the rest"):
        prune(model, plan_for(model, replace(ALL, qk=((0, 1, 2),) * 4)))


def test_values_cannot_leave_below_a_norm_across_the_heads():
    model = tiny_vit(depth=1, attn_norm=True)
    with pytest.raises(NotSupported, match="normalises across what would be pruned"):
        prune(model, plan_for(model, replace(ALL, v=((0, 1, 2),) * 4)))


def test_compensated_weights_and_factors_take_the_place_of_what_is_kept():
    model = tiny_vit(depth=1)
    kept = BlockPlan((1, 3), ALL.mlp, None, ((0, 2), (1, 3)), ((4,), (5,)))
    proj, factors = torch.randn(32, 2), torch.tensor([[2.0, 3.0], [5.0, 7.0]])
    slim = prune(model, plan_for(model, kept), {(0, "attn"): proj, (0, "qk"): factors}).blocks[0].attn
    plain = prune(model, plan_for(model, kept)).blocks[0].attn
    assert torch.equal(slim.proj.weight, proj)
    assert torch.equal(slim.qkv.weight[:4], plain.qkv.weight[:4] * torch.tensor([[2.0], [3.0], [5.0], [7.0]]))
    assert torch.equal(slim.qkv.bias[:4], plain.qkv.bias[:4] * torch.tensor([2.0, 3.0, 5.0, 7.0]))
    assert torch.equal(slim.qkv.weight[4:], plain.qkv.weight[4:])
    with pytest.raises(InputError, match=r"compensated weight for queries is \(2, 3\), the plan keeps \(2, 2\)"):
        prune(model, plan_for(model, kept), {(0, "qk"): torch.ones(2, 3)})


@pytest.mark.parametrize(
    ("kept", "sentence"),
    [
        (replace(ALL, qk=((0, 8),) * 4), "block 0: the plan keeps qk_dims up to 8, a head of the model has 8"),
        (replace(ALL, v=((0,), (1,), (2,), (9,))), "block 0: the plan keeps v_dims up to 9"),
    ],
)
def test_dims_that_a_head_lacks_are_refused(kept, sentence):
    model = tiny_vit(depth=1)
    with pytest.raises(InputError, match=sentence):
        prune(model, plan_for(model, kept))


# --- channels ---------------------------------------------------------------------------------------------------------

CHANNELS = tuple(range(1, 32, 2))


class NormOfKept(nn.Module):
    """A norm of the residual stream that sees some channels alone; the others come out as zero."""

    def __init__(self, norm: nn.Module, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.norm, self.channels = norm, list(channels)

    def forward(self, x: Tensor) -> Tensor:
        some, bias = x[..., self.channels], getattr(self.norm, "bias", None)
        weight = self.norm.weight[self.channels]
        if bias is None:
            kept = nn.functional.rms_norm(some, (len(self.channels),), weight, self.norm.eps)
        else:
            kept = nn.functional.layer_norm(some, (len(self.channels),), weight, bias[self.channels], self.norm.eps)
        out = torch.zeros_like(x)
        out[..., self.channels] = kept
        return out


def on_kept_channels(model: Vit, channels: tuple[int, ...]) -> Vit:
    """A copy of the model at its full width whose tokens have, and whose norms see, the kept channels alone."""
    dense = build(model.config, model.state_dict())
    for owner in (dense, *dense.blocks):
        for name in ("embed_norm", "norm_pre", "norm", "norm1", "norm2"):
            norm = getattr(owner, name, None)
            if norm is not None and not isinstance(norm, nn.Identity):
                setattr(owner, name, NormOfKept(norm, channels))
    gone = [channel for channel in range(32) if channel not in channels]
    with torch.no_grad():
        for part in (dense.patch_embed.weight, dense.patch_embed.bias):
            part[gone] = 0
        for part in (dense.prefix_tokens, dense.pos_embed):
            part[..., gone] = 0
    return dense


@pytest.mark.parametrize(
    "variant",
    [
        {},
        VARIANTS["distilled, registers"],
        VARIANTS["LayerScale, RMSNorm"],
        VARIANTS["norms behind the halves"],
        {"embed_norm": True, "pre_norm": True, "pool": "avg", "final_norm": "pooled", "qk_norm": True},
        {"gated": True, "mlp_norm": True, "attn_norm": True, "proj_bias": False, "residual": "parallel"},
    ],
    ids=str,
)
def test_fewer_channels_are_the_model_whose_norms_see_these_alone_and_no_mask(variant):
    model = tiny_vit(depth=2, **variant)
    slim = prune(model, replace(dense_plan(model), embed=CHANNELS))
    assert slim.config.dim == 16
    torch.testing.assert_close(slim(images(2)), on_kept_channels(model, CHANNELS)(images(2)), **CLOSE)

    zeroed = build(model.config, model.state_dict())
    gone = [c for c in range(32) if c not in CHANNELS]
    with torch.no_grad():
        zeroed.patch_embed.weight[gone] = 0
        for name, parameter in zeroed.named_parameters():
            if name == "patch_embed.bias" or re.search(r"\.(proj|fc2)\.", name):
                parameter[gone] = 0
            elif parameter.shape[-1] == 32 and parameter.ndim != 2:
                parameter[..., gone] = 0
    assert (slim(images(2)) - zeroed(images(2))).abs().max() > 1e-2  # norms saw the zeros too


def test_all_channels_change_nothing():
    for variant in ({}, VARIANTS["attention pooling"], {"classes": 0}):
        model = tiny_vit(depth=1, **variant)
        slim = prune(model, replace(dense_plan(model), embed=tuple(range(32))))
        assert torch.equal(slim(images(2)), model(images(2)))


@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        (VARIANTS["attention pooling"], "attention pooling splits into heads"),
        ({"classes": 0}, "the features are the output"),
        ({"keep": {1: 30}, "reducer": "dynamicvit"}, "dynamicvit has weights for all channels"),
    ],
)
def test_where_the_width_is_bound_no_channel_may_leave(variant, sentence):
    model = tiny_vit(depth=2, **variant)
    with pytest.raises(NotSupported, match=sentence):
        prune(model, replace(dense_plan(model), embed=CHANNELS))


def test_channels_that_the_model_lacks_are_refused():
    model = tiny_vit(depth=1)
    with pytest.raises(InputError, match="the plan keeps channels up to 32, the model has 32"):
        prune(model, replace(dense_plan(model), embed=(0, 32)))


# --- plans that follow one another, and reloading --------------------------------------------------------------------


def narrow_plan(model: Vit) -> Plan:
    blocks = (
        BlockPlan((0, 2, 3), tuple(range(40)), None, ((0, 1, 2, 5, 6),) * 3, ((1, 2, 3), (0, 4, 5), (5, 6, 7))),
        BlockPlan((1, 2), tuple(range(30)), 40, None, ((0, 7), (1, 3))),
    )
    return replace(plan_for(model, *blocks, reducer="tome"), embed=tuple(range(24)))


def test_prune_then_prune_again_is_their_composition():
    model = tiny_vit(depth=2)
    first = narrow_plan(model)
    half_way = prune(model, first)
    blocks = (
        BlockPlan((0, 2), (1, 3, 9), None, ((0, 4), (1, 3)), None),
        BlockPlan((1,), (0, 1), 30, ((2, 3),), ((1,),)),
    )
    second = replace(plan_for(half_way, *blocks, reducer="tome"), embed=(0, 3, 20, 23))
    both = first.then(second)
    assert both.blocks[0].qk == ((0, 6), (1, 5))
    assert both.blocks[0].v == ((1, 2, 3), (5, 6, 7))
    assert both.blocks[1].v == ((3,),)
    assert prune(half_way, second).config == prune(model, both).config
    assert torch.equal(prune(half_way, second)(images(2)), prune(model, both)(images(2)))
    with pytest.raises(InputError, match="the plan was made for the model with hash"):
        prune(model, second)


RELOAD = """
import json, sys, torch
from safetensors.torch import load_file
from vitprune.model.config import VitConfig
from vitprune.model.vit import fingerprint
from vitprune.plan import Plan
from vitprune.surgery import build, prune
folder = sys.argv[1] + "/"
config = VitConfig.from_dict(json.load(open(folder + "model.json")))
slim = build(config, load_file(folder + "model.safetensors"))
dense = build(VitConfig.from_dict(json.load(open(folder + "dense.json"))), load_file(folder + "dense.safetensors"))
again = prune(dense, Plan.from_dict(json.load(open(folder + "plan.json"))))
torch.set_num_threads(1)
print(fingerprint(slim), fingerprint(again), slim(torch.load(folder + "images.pt")).flatten().tolist())
"""


def test_a_fresh_process_rebuilds_the_model_from_plan_and_weights_bit_for_bit(tmp_path: Path):
    model = tiny_vit(depth=2)
    plan = narrow_plan(model)
    slim = prune(model, plan)
    for name, one in (("model", slim), ("dense", model)):
        (tmp_path / f"{name}.json").write_text(json.dumps(one.config.to_dict()))
        save_file(one.state_dict(), tmp_path / f"{name}.safetensors")
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    torch.save(images(2), tmp_path / "images.pt")
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded, pruned_again, answers = done.stdout.split(" ", 2)
    assert loaded == pruned_again == fingerprint(slim)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert json.loads(answers) == slim(images(2)).flatten().tolist()
    finally:
        torch.set_num_threads(threads)
