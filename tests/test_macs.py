from __future__ import annotations

from dataclasses import replace

import pytest
from test_surgery import VARIANTS
from tiny import tiny_config, tiny_vit

from vitprune.macs import macs, params
from vitprune.model.config import VitConfig
from vitprune.model.vit import Vit
from vitprune.plan import BlockPlan, Plan
from vitprune.surgery import fingerprint, prune


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
