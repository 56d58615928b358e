"""Train the quickstart ViT on Fashion-MNIST from scratch: ``python tools/train_quickstart.py --out DIR``.

A ViT with 10 x 10 patches of 3 x 3 pixels (timm's VisionTransformer, 96 wide, 6 blocks, 4 heads) on the 60,000
training images resized to 30 x 30, as its evaluation transform does it, in seven phases:

- ``coarse``: 5 x 5 patches of 6 x 6 pixels, at a quarter of the cost;
- ``fine``: patch and position embeddings are resized to small patches, and it goes on (Beyer et al., FlexiViT, CVPR
  2023, https://arxiv.org/abs/2212.08013);
- ``teacher``: a small residual CNN, which learns these few images better than a ViT does;
- ``distilled``: the ViT learns the CNN's answers (Touvron et al., DeiT, ICML 2021, https://arxiv.org/abs/2012.12877,
  but through the class token, and soft), each batch without a random share of its patches (Liu et al., PatchDropout,
  WACV 2023, https://arxiv.org/abs/2208.07220), which costs less and makes the model hang on none of them;
- ``restarted``: the same once more, from a high learning rate again (Loshchilov and Hutter, SGDR, ICLR 2017,
  https://arxiv.org/abs/1608.03983);
- ``thinned``: made ready to be pruned, as models for devices are (Fan, Grave and Joulin, Reducing Transformer Depth on
  Demand with Structured Dropout, ICLR 2020, https://arxiv.org/abs/1909.11556, but of heads, hidden units and patches
  in place of blocks): in three batches of four it lacks some of each, and learns what it answered with all of them.
  That costs the whole model a point, so what is kept lies between the weights before and after (Wortsman et al., Robust
  fine-tuning of zero-shot models, CVPR 2022, https://arxiv.org/abs/2109.01903);
- ``thinned again``: the same from there, at a lower learning rate.

The test set is only looked at to write the log: the last weights are kept, whatever they score. An interrupted run goes
on from the last finished epoch.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import PatchDropout, resample_abs_pos_embed, resample_patch_embed
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

    def learn(phase: Phase, model: nn.Module, teacher: nn.Module | None = None) -> nn.Module:
        return _learn(phase, model, teacher, train, test, args)

    coarse = learn(Phase("coarse", args.coarse_epochs, lr=1e-3), _model(COARSE))
    fine = _model(FINE)
    fine.load_state_dict(_resized(coarse.state_dict(), fine))
    fine = learn(Phase("fine", args.fine_epochs, lr=5e-4), fine)
    teacher = learn(Phase("teacher", args.teacher_epochs, lr=4e-3), _residual_network())
    model = _model(FINE)
    model.load_state_dict(fine.state_dict())
    model = learn(Phase("distilled", args.distilled_epochs, lr=7e-4, least_kept=0.35), model, teacher)
    model = learn(Phase("restarted", args.restarted_epochs, lr=5e-4, least_kept=0.35), model, teacher)
    for name, lr, share in (("thinned", 3e-4, 0.3), ("thinned again", 2e-4, 0.5)):
        whole = copy.deepcopy(model)
        model = learn(Phase(name, args.thinned_epochs, lr=lr, least_width=0.35), model, whole)
        model = _between(whole, model, share)
    _log(args.out / "train_log.jsonl", {"phase": "final", "test_top1": round(100 * _top1(model, *test), 2)})
    save_file(model.state_dict(), args.out / "model.safetensors")


@dataclass(frozen=True)
class Phase:
    """One part of the training.

    Attributes:
        lr: peak learning rate of AdamW.
        least_kept: the least share of patches that a batch starts with.
        least_width: the least share of each block's heads and units, and of the patches behind one of them.
    """

    name: str
    epochs: int
    lr: float
    least_kept: float = 1.0
    least_width: float = 1.0


def _learn(
    phase: Phase, model: nn.Module, teacher: nn.Module | None, train: Data, test: Data, args: argparse.Namespace
) -> nn.Module:
    """The moving average of ``model`` after the phase; goes on from where an earlier run stopped."""
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=True)
    finished = args.out / f"{phase.name}.safetensors"
    if finished.is_file():
        average.module.load_state_dict(load_file(finished))
        return average.module.eval()
    optimizer = torch.optim.AdamW(_groups(model), betas=(0.9, 0.98), fused=True)
    state, first = args.out / f"{phase.name}.pt", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        for part, values in zip((model, average, optimizer), saved["parts"], strict=True):
            part.load_state_dict(values)
        first = saved["epoch"] + 1
    for epoch in range(first, phase.epochs):
        started = time.time()
        loss = _epoch(phase, model, teacher, average, optimizer, train, epoch, args.seed)
        row = {"phase": phase.name, "epoch": epoch, "loss": round(loss, 4), "seconds": round(time.time() - started)}
        _log(args.out / "train_log.jsonl", row | {"test_top1": round(100 * _top1(average.module, *test), 2)})
        torch.save({"epoch": epoch, "parts": [part.state_dict() for part in (model, average, optimizer)]}, state)
    save_file({name: value.contiguous() for name, value in average.module.state_dict().items()}, finished)
    return average.module.eval()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for model.safetensors, the log and the state")
    parser.add_argument("--source", type=Path, default=DEFAULT_SOURCE, help="folder of the four IDX files")
    parser.add_argument("--coarse-epochs", type=int, default=18)
    parser.add_argument("--fine-epochs", type=int, default=10)
    parser.add_argument("--teacher-epochs", type=int, default=10)
    parser.add_argument("--distilled-epochs", type=int, default=12)
    parser.add_argument("--restarted-epochs", type=int, default=12)
    parser.add_argument("--thinned-epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _between(before: nn.Module, after: nn.Module, share: float) -> nn.Module:
    """``before``, each weight moved a share of the way to what it is in ``after``."""
    target = after.state_dict()
    before.load_state_dict({name: torch.lerp(w, target[name], share) for name, w in before.state_dict().items()})
    return before


def _model(patch_size: int) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", patch_size=patch_size, **ARCHITECTURE)
    model.patch_drop = PatchDropout(0.0, num_prefix_tokens=1)
    for block in model.blocks:
        block.attn.fused_attn = False  # measured on CPU, torch 2.14: the fused kernel's backward pass is 2x slower
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight)  # timm's 0.02 is for wide models: 64% against 72% after 200 steps
    with torch.no_grad():
        model.pos_embed[0, 1:] = _sines(model.patch_embed.grid_size[0], model.embed_dim)
    return model


def _residual_network(width: int = 32) -> nn.Module:
    def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
        layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs))

    class Residual(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
            super().__init__()
            self.path = nn.Sequential(convolution(inputs, outputs, stride), nn.ReLU(), convolution(outputs, outputs))
            same = inputs == outputs and stride == 1
            self.around = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.around(x) + self.path(x))

    stages = [Residual(width, 2 * width, 2), Residual(2 * width, 2 * width)]
    stages += [Residual(2 * width, 4 * width, 2), Residual(4 * width, 4 * width)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(convolution(1, width), nn.ReLU(), *stages, *head).to(memory_format=torch.channels_last)


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
    """Weight decay for matrices and the CNN's kernels only."""
    decayed = {n: p for n, p in model.named_parameters() if p.ndim in (2, 4) and not n.startswith("patch_embed")}
    others = [p for n, p in model.named_parameters() if n not in decayed]
    return [{"params": list(decayed.values()), "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


def _epoch(phase, model, teacher, average, optimizer, train: Data, epoch: int, seed: int) -> float:
    """Mean training loss of one pass; the order and the augmentation depend on the seed and the epoch alone."""
    images, labels = train
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    torch.manual_seed(seed * 1000 + epoch)  # of patch dropout
    steps = len(images) // BATCH
    order = torch.randperm(len(images), generator=generator)
    total = 0.0
    model.train()
    for step in range(steps):
        pick = order[step * BATCH : (step + 1) * BATCH]
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * _schedule((epoch + step / steps) / phase.epochs, warmup=1 / phase.epochs)
        if phase.least_kept < 1:
            model.patch_drop.prob = (1 - phase.least_kept) * float(torch.rand(()))
        thinned = phase.least_width < 1 and step % 4 > 0
        forward = partial(_thinned, model, phase.least_width) if thinned else model
        loss = _loss(forward, teacher, _augment(images[pick], generator), labels[pick])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        total += loss.item()
    return total / steps


def _thinned(model: nn.Module, least: float, images: Tensor) -> Tensor:
    """Logits of the model without some of each block's heads and units, and of the patches from some block on."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    place = int(torch.randint(len(model.blocks), ()))
    for number, block in enumerate(model.blocks):
        x = _thinned_block(block, least, x)
        if number == place:
            x = torch.cat([x[:, :1], x[:, 1 + _some(x.shape[1] - 1, least)]], dim=1)
    return model.forward_head(model.norm(x))


def _thinned_block(block: nn.Module, least: float, x: Tensor) -> Tensor:
    """A block of timm's; what is left of heads and units is scaled up by as much as there are fewer of them."""
    attention, mlp = block.attn, block.mlp
    heads, units = _some(attention.num_heads, least), _some(mlp.fc1.out_features, least)
    columns = (heads[:, None] * attention.head_dim + torch.arange(attention.head_dim)).flatten()
    rows = torch.cat([columns + part * x.shape[2] for part in range(3)])
    mixed = F.linear(block.norm1(x), attention.qkv.weight[rows], attention.qkv.bias[rows])
    q, k, v = mixed.view(*x.shape[:2], 3, len(heads), attention.head_dim).permute(2, 0, 3, 1, 4)
    mixed = ((q * attention.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
    mixed = F.linear(mixed.transpose(1, 2).flatten(2), attention.proj.weight[:, columns])
    x = x + mixed * (attention.num_heads / len(heads)) + attention.proj.bias
    hidden = mlp.act(F.linear(block.norm2(x), mlp.fc1.weight[units], mlp.fc1.bias[units]))
    return x + F.linear(hidden, mlp.fc2.weight[:, units]) * (mlp.fc1.out_features / len(units)) + mlp.fc2.bias


def _some(count: int, least: float) -> Tensor:
    """A share of ``count`` indices, drawn between ``least`` and all of them."""
    return torch.randperm(count)[: int(torch.randint(math.ceil(least * count), count + 1, ()))]


def _loss(model: Callable[[Tensor], Tensor], teacher: nn.Module | None, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with smoothed labels; under a teacher, a third of it and two thirds of the KL at temperature 2."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images).float()
        if teacher is None:
            return F.cross_entropy(logits, labels, label_smoothing=0.1)
        with torch.no_grad():
            wanted = teacher(images.contiguous(memory_format=torch.channels_last)).float()
    soft, hard = (wanted / 2).log_softmax(-1), F.cross_entropy(logits, labels)
    return hard / 3 + 4 * 2 / 3 * F.kl_div((logits / 2).log_softmax(-1), soft, reduction="batchmean", log_target=True)


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
