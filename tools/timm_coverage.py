"""Which of timm's Vision Transformers convert: ``python tools/timm_coverage.py [--only PATTERN]``.

For each architecture of timm's modules ``vision_transformer`` and ``deit``: the largest difference of the logits
between timm's model and ours, for random weights and images, in fp32 and fp64; or the reason why it does not convert.
Models are built in their full width, but with ``--depth`` blocks and for images of ``--grid`` patches along each side.
Exit code 0 if at least 165 of the 179 agree.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time

import timm
import torch

from vitprune.errors import NotSupported
from vitprune.model.timm import convert

MODULES = ("vision_transformer", "deit")
NEEDED = 165
FP32, FP64 = 1e-4, 1e-10  # largest difference of logits


def main() -> int:
    args = _arguments()
    torch.set_grad_enabled(False)
    names = [name for module in MODULES for name in timm.list_models(module=module)]
    names = [name for name in names if fnmatch.fnmatch(name, args.only)]
    print(f"timm {timm.__version__}, torch {torch.__version__}, depth {args.depth}, batch 2, random weights and images")
    print(f"{'architecture':45} {'width':>5} {'image':>9} {'fp32':>8} {'fp64':>8}")
    good, started = 0, time.time()
    for name in names:
        row, agrees = _row(name, args)
        good += agrees
        print(f"{name:45} {row}", flush=True)
    print(f"{good} of {len(names)} agree (at most {FP32:g} in fp32, {FP64:g} in fp64); {time.time() - started:.0f} s")
    return 0 if good >= min(NEEDED, len(names)) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="architectures whose names match, such as 'deit*'")
    parser.add_argument("--depth", type=int, default=2, help="blocks to build of each model")
    parser.add_argument("--grid", type=int, default=4, help="patches along each side of an image")
    return parser.parse_args()


def _row(name: str, args: argparse.Namespace) -> tuple[str, bool]:
    """The table's row for one architecture, and whether both differences are small enough."""
    model = _build(name, args)
    size = model.patch_embed.img_size
    circumstances = f"{model.embed_dim:5} {size[0]:>4}x{size[1]:<4}"
    try:
        single, double = _difference(model, torch.float32), _difference(model, torch.float64)
    except NotSupported as error:
        return f"{circumstances} {error}", False
    agrees = single <= FP32 and double <= FP64
    return f"{circumstances} {single:8.1e} {double:8.1e}{'' if agrees else '  DIFFERS'}", agrees


def _build(name: str, args: argparse.Namespace) -> torch.nn.Module:
    """timm's model with fewer blocks and patches, and random weights that pass on signals of about unit size."""
    whole = timm.create_model(name, device="meta", depth=1)
    size = tuple(args.grid * side for side in whole.patch_embed.patch_size)
    model = timm.create_model(name, device="meta", depth=args.depth, img_size=size).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for path, weight in model.named_parameters():
        weight.normal_(generator=generator)
        if weight.ndim > 1 and not path.endswith(("token", "pos_embed", "latent")):
            weight.mul_(weight[0].numel() ** -0.5)
        elif path.endswith(("weight", "gamma")):  # norms and LayerScale
            weight.mul_(0.2).add_(1)
    return model


def _difference(model: torch.nn.Module, dtype: torch.dtype) -> float:
    """The largest difference between the outputs of timm's model and of ours."""
    model = model.to(dtype)
    torch.manual_seed(1)
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size).to(dtype)
    return (convert(model)(images) - model(images)).abs().max().item()


if __name__ == "__main__":
    sys.exit(main())
