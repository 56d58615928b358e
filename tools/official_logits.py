"""Runs the official code of a token method on made-up weights and images, and writes down what it answers.

The tests hold our loading of official checkpoints against these answers: names and shapes of the weights and a few
logits are kept, no line of the code. The repository is the user's own clone.

python tools/official_logits.py dynamicvit ../DynamicViT  ->  tests/tokens/official/dynamicvit.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from vitprune.tokens.diffrate import FOUND

FOLDER = Path(__file__).parent.parent / "tests" / "tokens" / "official"
TINY: dict[str, Any] = {"embed_dim": 48, "depth": 12, "num_heads": 3, "mlp_ratio": 2.0, "num_classes": 7}


class Answers(NamedTuple):
    """Logits [B, classes], and for each image how many patches each stage kept, where the code decides that itself."""

    logits: Tensor
    kept: list[list[int]] | None = None


class Official(NamedTuple):
    """A model of the authors' code, and how it is asked."""

    model: nn.Module
    answer: Callable[[nn.Module, Tensor], Answers]


def dynamicvit() -> Official:
    """With a keep rate of 0.7."""
    model = importlib.import_module("models.dyvit").VisionTransformerDiffPruning
    found = model(qkv_bias=True, pruning_loc=[3, 6, 9], token_ratio=[0.7, 0.7**2, 0.7**3], **TINY)
    return Official(found.double().eval(), lambda model, images: Answers(model(images.double())))


def evovit() -> Official:
    """Choosing at two stages, as in the last third of its training and afterwards."""
    model = importlib.import_module("deit.evo_deit").EvoVisionTransformer
    found = model(qkv_bias=True, tradeoff=[1.0] * 4 + [0.5] * 8, **TINY)
    return Official(found.double().eval(), lambda model, images: Answers(model(images.double())))


def spvit() -> Official:
    """Image by image, and keeping the upper 0.7 of its scores where it draws noise, so that it can be repeated."""
    module = importlib.import_module("vit_l2_3keep_senet")

    def upper(logits: Tensor, hard: bool) -> Tensor:
        odds = logits[..., 0] - logits[..., 1]
        kept = odds >= odds.quantile(0.3, dim=1, keepdim=True)
        return torch.stack([kept, ~kept], dim=-1).to(logits.dtype)

    module.F.gumbel_softmax = upper
    ratios = {"pruning_loc": [3, 6, 9], "token_ratio": [0.7, 0.7**2, 0.7**3]}
    model = module.VisionTransformerDiffPruning(qkv_bias=True, distill=True, **ratios, **TINY)

    def answer(model: nn.Module, images: Tensor) -> Answers:
        rows, kept = [], []
        for image in images:
            logits, _, _, chosen = model(image[None])
            rows.append(logits)
            kept.append([int(some.sum()) for some in chosen])
        return Answers(torch.cat(rows), kept)

    return Official(model.train(), answer)  # evaluation asks for a GPU; without noise it does nothing else


def evit() -> Official:
    """With a keep rate of 0.7, and the rest fused."""
    rates = [0.7 if block in (3, 6, 9) else 1.0 for block in range(12)]
    model = importlib.import_module("evit").EViT(qkv_bias=True, keep_rate=rates, fuse_token=True, **TINY)
    return Official(model.double().eval(), lambda model, images: Answers(model(images.double())))


def diffrate() -> Official:
    """With what the authors' search found for DeiT-S and 2.9 GMACs."""
    module = importlib.import_module("DiffRate.patch.deit")
    model = timm.create_model("deit_tiny_patch16_224", **TINY)
    module.apply_patch(model)
    for block in model.blocks:
        block.drop_path = nn.Identity()  # what timm called it then

    def answer(model: Any, images: Tensor) -> Answers:
        model.set_kept_num(*FOUND["s-2.9"])
        return Answers(model(images.double(), return_flop=False))

    return Official(model.double().eval(), answer)


OFFICIAL: dict[str, Callable[[], Official]] = {
    "diffrate": diffrate, "dynamicvit": dynamicvit, "evit": evit, "evovit": evovit, "spvit": spvit
}  # fmt: skip


def made_up(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Weights of these names and shapes under which every layer passes on signals of about unit size."""
    weights = {}
    for name, shape in shapes.items():
        same = re.sub(r"_conv\.\d+\.(\d)", r"_conv.0.\1", name)  # SPViT's heads share their weights under many names
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(same.encode())))
        if name.endswith(("token", "pos_embed")):
            weights[name] = 0.5 * noise
        elif len(shape) > 1:
            weights[name] = noise * noise[0].numel() ** -0.5
        else:
            weights[name] = 0.2 * noise + (0 if name.endswith("bias") else 1)
    return weights


def made_up_images() -> Tensor:
    """[2, 3, 224, 224]."""
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=OFFICIAL)
    parser.add_argument("repository", type=Path, help="a clone of the authors' repository")
    options = parser.parse_args()
    sys.path.insert(0, str(options.repository))
    model, answer = OFFICIAL[options.method]()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(made_up(shapes))
    with torch.no_grad():
        logits, kept = answer(model, made_up_images())
    path = FOLDER / f"{options.method}.json"
    path.write_text(json.dumps({"shapes": shapes, "logits": logits.tolist(), "kept": kept}) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
