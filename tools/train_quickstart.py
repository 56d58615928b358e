"""Train the quickstart ViT on Fashion-MNIST from scratch: ``python tools/train_quickstart.py --out DIR``.

A ViT with 10 x 10 patches of 3 x 3 pixels (timm's VisionTransformer, 96 wide, 6 blocks, 4 heads) on the 60,000
training images resized to 30 x 30, as its evaluation transform does it. It learns first on 5 x 5 patches of 6 x 6
pixels, at a quarter of the cost; then patch and position embeddings are resized and it goes on with the small ones
(Beyer et al., FlexiViT, CVPR 2023, https://arxiv.org/abs/2212.08013). The test set is only looked at to write the
log: the last weights are kept, whatever they score. Interrupted runs go on from the last finished epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn
from torch.nn import functional as F

from _fashion_mnist import DEFAULT_SOURCE, MEAN, STD, load

Data = tuple[Tensor, Tensor]  # images [N, 1, 30, 30], labels [N]

ARCHITECTURE = {"img_size": 30, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 6, "num_heads": 4}
COARSE, FINE = 6, 3  # patch sizes in pixels
BATCH = 100


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    train, test = (_tensors(args.source, part) for part in ("train", "t10k"))

    coarse = _phase(_model(COARSE), "coarse", args.coarse_epochs, train, test, args)
    fine = _model(FINE)
    fine.load_state_dict(_resized(coarse.state_dict(), fine))
    fine = _phase(fine, "fine", args.fine_epochs, train, test, args)
    save_file(fine.state_dict(), args.out / "model.safetensors")


def _phase(model: nn.Module, name: str, epochs: int, train: Data, test: Data, args: argparse.Namespace) -> nn.Module:
    """The moving average of ``model`` after ``epochs`` of training; goes on from where an earlier run stopped."""
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(_groups(model), betas=(0.9, 0.98), fused=True)
    peak = args.lr if name == "coarse" else args.lr / 2
    state, first = args.out / f"{name}.pt", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        for part, values in zip((model, average, optimizer), saved["parts"], strict=True):
            part.load_state_dict(values)
        first = saved["epoch"] + 1
    for epoch in range(first, epochs):
        started = time.time()
        loss = _epoch(model, average, optimizer, train, epoch, epochs, peak, args.seed)
        row = {"phase": name, "epoch": epoch, "loss": round(loss, 4), "seconds": round(time.time() - started)}
        _log(args.out / "train_log.jsonl", row | {"test_top1": round(100 * _top1(average.module, *test), 2)})
        torch.save({"epoch": epoch, "parts": [part.state_dict() for part in (model, average, optimizer)]}, state)
    return average.module


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for model.safetensors, the log and the state")
    parser.add_argument("--source", type=Path, default=DEFAULT_SOURCE, help="folder of the four IDX files")
    parser.add_argument("--coarse-epochs", type=int, default=18)
    parser.add_argument("--fine-epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW; half of it in phase two")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _model(patch_size: int) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", patch_size=patch_size, **ARCHITECTURE)
    for block in model.blocks:
        block.attn.fused_attn = False  # measured on CPU, torch 2.14: the fused kernel's backward pass is 2x slower
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight)  # timm's 0.02 is for wide models: 64% against 72% after 200 steps
    with torch.no_grad():
        model.pos_embed[0, 1:] = _sines(model.patch_embed.grid_size[0], model.embed_dim)
    return model


def _sines(grid: int, dim: int) -> Tensor:
    """Sines and cosines of each patch's column and row, [grid * grid, dim], to start the position embedding from."""
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    frequency = 100.0 ** -torch.linspace(0, 1, dim // 4)
    angles = [place.flatten()[:, None] * frequency for place in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def _resized(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``weights`` of another patch size, with the embeddings resized to fit ``model``."""
    grid = [model.patch_embed.grid_size[0]] * 2
    position = resample_abs_pos_embed(weights["pos_embed"], grid, num_prefix_tokens=1)
    kernel = resample_patch_embed(weights["patch_embed.proj.weight"], [FINE, FINE])
    return weights | {"pos_embed": position, "patch_embed.proj.weight": kernel}


def _tensors(source: Path, part: str) -> Data:
    """Normalised images [N, 1, 30, 30] and labels [N], resized as the model's evaluation transform does it."""
    images, labels = load(source, part)
    resized = np.stack([np.asarray(Image.fromarray(i).resize((30, 30), Image.Resampling.BICUBIC)) for i in images])
    pixels = torch.from_numpy(resized).float().div_(255).sub_(MEAN).div_(STD)
    return pixels[:, None], torch.from_numpy(labels.astype(np.int64))


def _groups(model: nn.Module) -> list[dict[str, object]]:
    """Weight decay for matrices only."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


def _epoch(model, average, optimizer, train: Data, epoch: int, epochs: int, peak: float, seed: int) -> float:
    """Mean training loss of one pass; the order and the augmentation depend on the seed and the epoch alone."""
    images, labels = train
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    steps = len(images) // BATCH
    order = torch.randperm(len(images), generator=generator)
    total = 0.0
    model.train()
    for step in range(steps):
        pick = order[step * BATCH : (step + 1) * BATCH]
        for group in optimizer.param_groups:
            group["lr"] = peak * _schedule((epoch + step / steps) / epochs, warmup=1 / epochs)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(_augment(images[pick], generator))
        loss = F.cross_entropy(logits.float(), labels[pick], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        total += loss.item()
    return total / steps


def _schedule(done: float, warmup: float) -> float:
    """Share of the peak learning rate after a share ``done`` of the run: linear rise, then cosine to 0.01."""
    if done < warmup:
        return done / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored and shifted by up to two pixels, each image on its own."""
    count, _, size, _ = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (2, 2, 2, 2), value=-MEAN / STD)  # black
    shift = torch.randint(0, 5, (2, count), generator=generator)
    rows = shift[0][:, None] + torch.arange(size)
    columns = shift[1][:, None] + torch.arange(size)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


@torch.no_grad()
def _top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(i).argmax(-1) == t).sum()) for i, t in zip(images.split(250), labels.split(250), strict=True)
    )
    return right / len(images)


def _log(path: Path, row: dict[str, object]) -> None:
    print(row, flush=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
