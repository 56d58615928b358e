"""The parts of a model as ONNX files: half blocks of any width, token reductions, stem and head.

Each part is exported once, with symbolic token counts; whoever times it fixes these by name. The time of a part does
not depend on the values of its weights, so these are whatever torch starts with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitprune import parts
from vitprune.errors import InputError, NotSupported
from vitprune.model.config import BlockConfig, VitConfig
from vitprune.model.state import TokenState
from vitprune.model.vit import Block, Vit
from vitprune.tokens.base import Place, Reducer

from ..export.onnx import Axis, export_module
from ..export.precision import DTYPES, opset_for

TOKENS, KEEP = Axis("tokens", 3, 1 << 20), Axis("keep", 2, 1 << 20)
EXAMPLE = {"tokens": 23, "keep": 16}  # sizes while exporting; no method removes more than half


class PieceFiles:
    """Writes the parts of a model into a folder, each when it is first asked for.

    Args:
        model: whose parts; it stays as it is.
        folder: where the files go.
        batch: images of one call; fixed, since a symbolic one makes exporting slower.
        precision: fp32, fp16 or bf16; parts take and give tokens in it, as they do inside a model.
        runtime: what will run them; decides the opset.

    Raises:
        NotSupported: the blocks of the model differ, or reduce tokens already.
    """

    def __init__(self, model: Vit, folder: Path, batch: int, precision: str, runtime: str) -> None:
        self.block = only_block(model.config)
        self._model, self._folder, self._batch = model, folder, batch
        self._kind: type[Block] = type(model.blocks[0])  # type: ignore[assignment]
        self._dtype = DTYPES[precision]
        self._opset = opset_for(precision, runtime)

    def attention(
        self,
        heads: int,
        *,
        sized: bool = False,
        method: str | None = None,
        step: tuple[int, int] = (0, 0),
        prefix_only: bool = False,
        dims: tuple[int, int] | None = None,
    ) -> Path:
        """The attention half with norm and residual: ``x`` [batch, tokens, C] to the tokens that are left.

        Args:
            heads: how many it has.
            sized: a further input ``size`` [batch, tokens, 1] adds its logarithm to the attention.
            method: token method behind it, which leaves as many patches as the further input ``keep`` [keep] is long.
            step: patches that come in and are left, for methods that merge a grid: these have no input ``keep``.
            prefix_only: the prefix tokens alone ask and are left, as in a last block.
            dims: of a head's queries and keys, and of its values; None: all.
        """
        qk, v = dims or (self.block.qk_dim, self.block.v_dim)
        config = replace(self.block, heads=heads, mlp=0, patches=0 if prefix_only else None, qk_dim=qk, v_dim=v)
        kind = parts.load("vitprune.tokens", method, Reducer) if method else None  # type: ignore[type-abstract]
        reducer = kind(Place.of(self._model.config, 0)) if kind else None
        fixed = step if kind and kind.grid else None
        prefix = self._model.config.prefix
        half = _AttentionHalf(self._kind(self._model.config, config, reducer), prefix, sized, fixed and fixed[1])
        if fixed:
            example = torch.ones(self._batch, prefix + fixed[0], self._model.config.dim)
            return self._export(f"attn{heads}_{method}_{fixed[0]}_{fixed[1]}", half, {"x": (example, {})})
        axes = {"x": TOKENS} | ({"size": TOKENS} if sized else {}) | ({"keep": KEEP} if method else {})
        size = f"_{qk}_{v}" if dims else ""
        name = f"attn{heads}{size}{'_sized' * sized}{'_' + method if method else ''}{'_prefix' * prefix_only}"
        return self._write(name, half, axes)

    def mlp(self, units: int) -> Path:
        """The MLP half with norm and residual: ``x`` [batch, tokens, C] to as many tokens."""
        block = self._kind(self._model.config, replace(self.block, heads=0, mlp=units), None)
        return self._write(f"mlp{units}", self._tokens_in(block), {"x": TOKENS})

    def whole_block(self) -> Path:
        """A block with all its heads and units: ``x`` [batch, tokens, C] to as many tokens."""
        block = self._kind(self._model.config, self.block, None)
        return self._write("block", self._tokens_in(block), {"x": TOKENS})

    def stem(self) -> Path:
        """Everything in front of the first block: ``images`` [batch, channels, height, width] to tokens."""
        config = self._model.config
        bare = Vit(replace(config, blocks=(), classes=0))
        example = torch.zeros(self._batch, config.channels, *config.image_size)
        return self._export("stem", _Call(lambda images: bare.embed(images).x, bare), {"images": (example, {})})

    def head(self) -> Path:
        """Everything behind the last block: ``x`` [batch, tokens, C] to logits or features."""
        bare = Vit(replace(self._model.config, blocks=()))
        module = _Call(lambda x: bare.classify(_state(x, bare.config)), bare)
        return self._write("head", module, {"x": TOKENS})

    def nothing(self) -> Path:
        """As good as no work, on one number ``x`` [1, 1]: what is left is the call."""
        return self._export("nothing", _Call(torch.neg, nn.Identity()), {"x": (torch.ones(1, 1), {})})

    def _tokens_in(self, block: Block) -> nn.Module:
        """The block as a function from tokens to tokens."""
        return _Call(lambda x: block(_state(x, self._model.config)).x, block)

    def _write(self, name: str, module: nn.Module, axes: dict[str, Axis]) -> Path:
        """A part that works on tokens; ``axes`` are its inputs' symbolic ones."""
        inputs: dict[str, tuple[Tensor, dict[int, Axis]]] = {}
        for key, axis in axes.items():
            if key == "keep":
                inputs[key] = torch.ones(EXAMPLE[axis.name]), {0: axis}
            else:
                last = self._model.config.dim if key == "x" else 1
                inputs[key] = torch.ones(self._batch, EXAMPLE[axis.name], last), {1: axis}
        return self._export(name, module, inputs)

    def _export(self, name: str, module: nn.Module, inputs: dict[str, tuple[Tensor, dict[int, Axis]]]) -> Path:
        """The file ``name``; each input is an example and its symbolic axes."""
        path = self._folder / f"{name}.onnx"
        if path.is_file():  # written whole or not at all
            return path
        export_module(
            module.to(self._dtype),
            [example.to(self._dtype) for example, _ in inputs.values()],
            path,
            dynamic=[axes for _, axes in inputs.values()],
            names=(list(inputs), ["y"]),
            opset=self._opset,
        )
        return path


def only_block(config: VitConfig) -> BlockConfig:
    """The block that all blocks of a model are like.

    Raises:
        NotSupported: they are not alike, lack a half, or reduce tokens: one table cannot serve them all.
    """
    first = config.blocks[0]
    for number, block in enumerate(config.blocks):
        if not block.heads or not block.mlp or block.patches is not None:
            raise NotSupported(f"block {number} has been pruned before; measure the model that it was pruned from")
        if block != first:
            raise NotSupported(
                f"block {number} has other sizes than block 0; a latency table serves models whose blocks are alike"
            )
    return first


def spread(levels: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of ``levels``, the first and last among them, spread evenly over their values.

    Raises:
        InputError: there are no levels.
    """
    if not levels:
        raise InputError("a latency table needs at least one level of each kind")
    if len(levels) <= count:
        return list(levels)
    step = (levels[-1] - levels[0]) / (count - 1)
    wanted = [levels[0] + step * i for i in range(count)]
    return sorted({min(levels, key=lambda level: abs(level - want)) for want in wanted}, reverse=True)


class _Call(nn.Module):
    """A function of ``module`` as a module of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor], module: nn.Module) -> None:
        super().__init__()
        self.module, self._function = module, function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


class _AttentionHalf(nn.Module):
    """Attention of a block with its norm and residual, and the reduction behind it."""

    def __init__(self, block: Block, prefix: int, sized: bool, keep: int | None = None) -> None:
        super().__init__()
        self.block, self.prefix, self.sized, self.keep = block, prefix, sized, keep

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        size = more[0] if self.sized else None  # then, if the block reduces tokens, the one that is as long as to keep
        state = TokenState(x, self.prefix, x.shape[1] - self.prefix, size, score=x[..., :1])
        # a size, not a value: the graph is static once sizes are fixed
        length = None if self.block.reducer is None or self.keep else more[-1].shape[0]
        return self.block.mix(state, self.keep or length).x


def _state(x: Tensor, config: VitConfig) -> TokenState:
    return TokenState(x, config.prefix, x.shape[1] - config.prefix)
