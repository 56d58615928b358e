from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_surgery import VARIANTS
from tiny import images, tiny_config, tiny_vit
from torch.utils.flop_counter import FlopCounterMode

from vitprune.macs import macs, params
from vitprune.model.config import VitConfig
from vitprune.model.vit import Vit
from vitprune.plan import BlockPlan, Plan
from vitprune.surgery import dense_plan, fingerprint, prune


def deit_small(keep: dict[int, int] | None = None, reducer: str | None = None) -> VitConfig:
    return tiny_config(
        depth=12, dim=384, heads=6, mlp=1536, image=224, patch=16, classes=1000, keep=keep, reducer=reducer
    )


def deit_small_evit() -> VitConfig:
    """Keep rate 0.7 with fusing: 139, 99 and 71 patches after blocks 3, 6 and 9, the published ceil(0.7 n) + 1."""
    return deit_small({3: 139, 6: 99, 9: 71}, "evit")


def deit_small_tome() -> VitConfig:
    return deit_small({block: 196 - 13 * (block + 1) for block in range(12)}, "tome")


@pytest.mark.parametrize(
    ("config", "published"),
    [(deit_small(), 4.608e9), (deit_small_evit(), 3.036e9), (deit_small_tome(), 2.712e9)],
    ids=["dense", "EViT 0.7", "ToMe r=13"],
)
def test_deit_small_costs_what_fvcore_counts(config, published):
    assert macs(config) == pytest.approx(published, rel=0.005)  # fvcore counts norms as well, 0.2% of the dense model


def test_a_last_block_for_the_class_token_alone_saves_the_published_third_of_a_gmac():
    assert macs(deit_small()) - macs(deit_small({11: 0})) == pytest.approx(0.32e9, rel=0.005)


def test_macs_of_a_last_block_for_the_prefix_alone_by_hand():
    config = tiny_config(depth=1, dim=2, heads=1, mlp=3, image=4, patch=2, classes=5, keep={0: 0})
    embed, q, kv, attention, proj, mlp, head = 4 * 12 * 2, 2 * 2, 5 * 2 * 4, 5 * 2 * 2, 2 * 2, 2 * 3 * 2, 2 * 5
    assert macs(config) == embed + q + kv + attention + proj + mlp + head
    assert macs(replace(config, residual="parallel")) == macs(config)


def test_macs_of_one_block_by_hand():
    config = tiny_config(depth=1, dim=2, heads=1, mlp=3, image=4, patch=2, classes=5, keep={0: 2}, reducer="evit")
    embed, qkv, attention, proj, mlp, head = 4 * 12 * 2, 5 * 2 * 6, 2 * 5 * 5 * 2, 5 * 2 * 2, 3 * 2 * 3 * 2, 2 * 5
    assert macs(config) == embed + qkv + attention + proj + mlp + head


def test_the_mlp_of_parallel_halves_works_on_the_tokens_that_enter():
    sizes = {"depth": 1, "dim": 2, "heads": 1, "mlp": 3, "image": 4, "patch": 2, "keep": {0: 2}, "reducer": "evit"}
    assert macs(tiny_config(**sizes, residual="parallel")) - macs(tiny_config(**sizes)) == 2 * 2 * 3 * 2


def test_a_gated_mlp_has_three_products():
    plain, gated = (macs(tiny_config(depth=1, gated=gated)) for gated in (False, True))
    assert gated - plain == 50 * 32 * 64


@pytest.mark.parametrize(
    "config",
    [
        *VARIANTS.values(),
        {"attn_norm": True, "mlp_norm": True},
        {"embed_norm": True, "pre_norm": True, "embed_bias": False},
        {"classes": 0, "final_norm": "none", "pos_embed": False},
    ],
    ids=str,
)
def test_params_are_those_of_the_model(config):
    model = Vit(tiny_config(depth=2, **config))
    assert params(model.config) == sum(parameter.numel() for parameter in model.parameters())


def test_params_of_a_pruned_model():
    model = tiny_vit(depth=2, layer_scale=True)
    plan = Plan(fingerprint(model), 49, "tome", (BlockPlan((1, 2), (), 40), BlockPlan((), (1, 2, 3))))
    slim = prune(model, plan)
    assert params(slim.config) == sum(parameter.numel() for parameter in slim.parameters())


def test_deit_small_has_22_million_parameters():
    # timm's deit_small_patch16_224; there the class token has a position embedding of its own
    assert params(deit_small()) == 22_050_664 - 384


def test_pruned_deit_small_has_the_published_parameters():
    whole = deit_small()

    def millions(**changed: int) -> float:
        return params(whole.with_blocks([replace(block, **changed) for block in whole.blocks], None)) / 1e6

    assert millions(heads=3) == pytest.approx(18.50, abs=0.005)
    assert millions(mlp=768) == pytest.approx(14.96, abs=0.005)
    assert millions(heads=3, mlp=768) == pytest.approx(11.42, abs=0.005)


@pytest.mark.parametrize("embed", [None, tuple(range(20))])
def test_macs_and_params_of_a_narrow_model_are_those_that_run(embed):
    model = tiny_vit(depth=3)
    dims = {"qk": ((0, 1, 2),) * 2, "v": ((0, 1, 2, 4, 7),) * 2}
    kept = BlockPlan((1, 2), tuple(range(30)), None, **dims), BlockPlan((), (1, 2, 3)), BlockPlan((3,), (), None)
    slim = prune(model, replace(dense_plan(model), blocks=kept, embed=embed))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        slim(images(1))
    assert macs(slim.config) == pytest.approx(counter.get_total_flops() / 2, rel=0.005)
    assert params(slim.config) == sum(parameter.numel() for parameter in slim.parameters())
