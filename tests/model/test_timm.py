from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from timm.layers import GluMlp, QuickGELU, RmsNorm, SwiGLU, SwiGLUPacked
from timm.layers.norm import SimpleNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from tiny import images, randomise
from torch import nn

from vitprune.errors import InputError, NotSupported
from vitprune.model.timm import convert, from_timm

TINY = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
NO_TOKEN = {"class_token": False, "global_pool": "avg"}
VARIANTS = {
    "class token": {},
    "class token without position": {"no_embed_class": True},
    "average": NO_TOKEN,
    "average with class token": {"global_pool": "avg"},
    "average with prefix": {"global_pool": "avg", "reg_tokens": 2, "pool_include_prefix": True},
    "maximum": {"global_pool": "max"},
    "average and maximum": {"global_pool": "avgmax", "reg_tokens": 1},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "attention pooling with prefix": {"global_pool": "map", "reg_tokens": 2, "pool_include_prefix": True},
    "attention pooling, norm behind": {"class_token": False, "global_pool": "map", "fc_norm": True},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "registers with position": {"reg_tokens": 3},
    "registers without class token": NO_TOKEN | {"reg_tokens": 3},
    "no position embedding": {"pos_embed": "none", "reg_tokens": 1},
    "LayerScale": {"init_values": 0.1},
    "q/k norm": {"qk_norm": True},
    "norm in front": {"pre_norm": True},
    "norm of patches": {"embed_norm_layer": "layernorm"},
    "norm behind the pooling": {"fc_norm": True},
    "no last norm": {"final_norm": False},
    "norms inside": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "no projection bias": {"proj_bias": False},
    "packed SwiGLU": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU},
    "SwiGLU": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "SwiGLU without bias": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "proj_bias": False},
    "GLU": {"mlp_layer": GluMlp, "act_layer": nn.Sigmoid},
    "SwiGLU with norm inside": {"mlp_layer": SwiGLU, "scale_mlp_norm": True},
    "RMSNorm": {"norm_layer": partial(RmsNorm, eps=1e-5), "qk_norm": True},
    "other epsilon": {"norm_layer": partial(nn.LayerNorm, eps=1e-2)},
    "quick GELU": {"act_layer": QuickGELU},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "ReLU": {"act_layer": nn.ReLU},
    "residual norm behind": {"block_fn": ResPostBlock, "init_values": 0.5},
    "parallel": {"block_fn": ParallelScalingBlock, "qk_norm": True},
    "parallel without qkv bias": {"block_fn": ParallelScalingBlock, "qkv_bias": False, "init_values": 0.1},
    "parallel, one output": {"block_fn": partial(ParallelScalingBlock, fuse_out_proj=True)},
    "parallel, no output bias": {"block_fn": partial(ParallelScalingBlock, fuse_out_proj=True), "proj_bias": False},
    "three in parallel": {"block_fn": partial(ParallelThingsBlock, num_parallel=3), "init_values": 0.3},
    "two in parallel without bias": {"block_fn": ParallelThingsBlock, "qkv_bias": False, "norm_layer": RmsNorm},
    "features": {"num_classes": 0},
    "oblong": {"img_size": (28, 20), "patch_size": (4, 5)},
}  # fmt: skip


def timm_model(kind=VisionTransformer, **variant):
    model = kind(**(TINY | variant)).eval()
    randomise(model)
    return model.double()


def pixels(model):
    height, width = model.patch_embed.img_size
    return images(2, max(height, width))[:, :, :height, :width].double()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_agrees_with_timm(variant):
    source = timm_model(**variant)
    want = source(pixels(source))
    torch.testing.assert_close(convert(source)(pixels(source)), want, rtol=0, atol=1e-10)  # fp64, logits of about 1
    assert want.std() > 0.01  # weights that matter


@pytest.mark.parametrize("variant", [{}, {"num_classes": 0}, {"init_values": 0.1, "dynamic_img_size": True}])
@torch.no_grad()
def test_distilled_models_answer_with_the_mean_of_two_heads(variant):
    source = timm_model(VisionTransformerDistilled, **variant)
    ours = convert(source)
    torch.testing.assert_close(ours(pixels(source)), source(pixels(source)), rtol=0, atol=1e-10)
    assert ours.config.prefix == 2


@torch.no_grad()
def test_resamples_positions_to_another_image_size_as_timm_does():
    source = timm_model(dynamic_img_size=True, reg_tokens=2)
    ours = convert(source)
    for height, width in ((28, 28), (40, 28), (16, 44), (12, 12)):
        x = images(1, 44)[:, :, :height, :width].double()
        # timm interpolates in fp32 whatever the model's type
        torch.testing.assert_close(ours(x), source(x), rtol=0, atol=2e-6)


def test_conversion_copies_the_weights():
    source = timm_model()
    ours = convert(source)
    before = ours.blocks[0].attn.qkv.weight.clone()
    with torch.no_grad():
        source.blocks[0].attn.qkv.weight.zero_()
    assert torch.equal(ours.blocks[0].attn.qkv.weight, before)
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in ours.parameters())


@pytest.mark.parametrize(
    ("variant", "part"),
    [
        ({"attn_layer": "diff"}, "attention of class DiffAttention; it knows Attention"),
        ({"block_fn": DiffParallelScalingBlock}, "a block of class DiffParallelScalingBlock; it knows Block, "),
        ({"global_pool": ""}, "global_pool=''; it knows token, avg"),
        ({"global_pool": "prr"}, "pooling of class AttentionPoolPrr; it knows AttentionPoolLatent"),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, "dynamic_img_pad=True; it knows images whose sides"),
        ({"act_layer": nn.Mish}, "an activation of class Mish; it knows GELU, "),
        ({"norm_layer": SimpleNorm}, "a norm of class SimpleNorm; it knows LayerNorm, "),
        ({"depth": 0}, "a model without blocks"),
        ({"block_fn": ParallelThingsBlock, "qk_norm": True}, "parallel attentions or MLPs with inner norms"),
        ({"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)}, "without the weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_the_part_that_it_does_not_know(variant, part):
    with pytest.raises(NotSupported, match=r"^vitprune cannot convert ") as caught:
        convert(VisionTransformer(**(TINY | variant)))
    assert part in str(caught.value)


def test_names_a_part_that_was_added_by_hand():
    source = timm_model()
    source.blocks[1].attn.gate = nn.Linear(32, 32)
    with pytest.raises(NotSupported, match=r"the part with the weights blocks\.1\.attn\.gate\.weight"):
        convert(source)


def test_names_blocks_that_differ():
    source = timm_model()
    source.blocks[1].attn.proj.bias = None
    with pytest.raises(NotSupported, match=r"a model without the weights|block 1 with proj_bias=False"):
        convert(source)


def test_names_epsilons_that_differ():
    source = timm_model()
    source.blocks[1].norm2.eps = 1e-3
    with pytest.raises(NotSupported, match="epsilons of norms that differ within a model"):
        convert(source)


@pytest.mark.parametrize("name", ["resnet18", "vit_relpos_small_patch16_224"])
def test_refuses_other_models_of_timm(name):
    with pytest.raises(NotSupported, match=r"it knows timm's VisionTransformer"):
        from_timm(name)


def test_suggests_names_for_an_unknown_one():
    with pytest.raises(InputError, match=r"has no model 'vit_tiny_patch16_244'; did you mean vit_tiny_patch16_224"):
        from_timm("vit_tiny_patch16_244")
    with pytest.raises(InputError, match=r"did you mean .*vit_tiny_patch16_224.augreg_in21k_ft_in1k"):
        from_timm("vit_tiny_patch16_224.augreg_in21k_ft", pretrained=True)


@pytest.mark.parametrize("wrong", [{"embed_dims": 32}, {"num_heads": 7}, {"img_size": "large"}])
def test_explains_arguments_that_timm_refuses(wrong):
    with pytest.raises(InputError, match=r"^timm cannot make vit_tiny_patch16_224 with \{"):
        from_timm("vit_tiny_patch16_224", **wrong)


def test_tells_how_the_model_sees_images():
    converted = from_timm("vit_tiny_patch16_224", **TINY)
    assert converted.data["input_size"] == [3, 28, 28]
    assert converted.data["interpolation"] == "bicubic"
    assert converted.data["mean"] == [0.5, 0.5, 0.5]
    assert converted.data.keys() == {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}
    assert converted.classes is None
    assert len(from_timm("deit_tiny_patch16_224", **(TINY | {"in_chans": 1})).data["mean"]) == 1


def test_knows_the_class_order_of_imagenet_models():
    classes = from_timm("vit_tiny_patch16_224", **(TINY | {"num_classes": 1000})).classes
    assert len(classes) == 1000
    assert classes[0] == "n01440764"


def test_quickstart_architecture_is_the_models_own():
    arguments = {
        "img_size": 30,
        "patch_size": 3,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
    }
    config = from_timm("vit_tiny_patch16_224", **arguments).model.config
    assert (config.patches, config.prefix, config.dim, config.classes) == (100, 1, 128, 10)
    assert [(block.heads, block.qk_dim, block.mlp) for block in config.blocks] == [(4, 32, 512)] * 6
    assert timm.create_model("vit_tiny_patch16_224", **arguments).patch_embed.grid_size == config.grid
