"""Single changes of a dense model, and what each does to its output: only the blocks behind a change are run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.state import TokenState
from ..model.vit import Block, Vit
from ..statistics import Half, blocks_of, out_layers
from ..tokens.base import Reducer


def kl_to_dense(dense_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(dense || changed) in nats per image, [B], of logits [B, classes]."""
    dense, changed = (x.double().log_softmax(-1) for x in (dense_logits, logits))
    return (dense.exp() * (dense - changed)).sum(-1).clamp_min(0)


def cosine_distance(dense_features: Tensor, features: Tensor) -> Tensor:
    """1 - cosine of the features [B, C] of each image, [B]: the loss of models without a classifier."""
    return (1 - F.cosine_similarity(dense_features.double(), features.double(), dim=-1)).clamp_min(0)


def distance(model: Vit) -> Callable[[Tensor, Tensor], Tensor]:
    """How far an output of ``model`` is from the dense one: KL, or the distance of features."""
    return kl_to_dense if model.config.classes else cosine_distance


class Probes:
    """Images with the dense model's output, on which single changes are measured.

    Args:
        states: the images' tokens that enter the first block, batch after batch.
    """

    def __init__(self, model: Vit, states: Sequence[TokenState]) -> None:
        self.model, self.distance = model, distance(model)
        self.dense = [self._output(0, state) for state in states]

    @torch.no_grad()
    def loss(self, first: int, entering: Sequence[TokenState]) -> float:
        """Mean loss of the model as it is now, run from block ``first`` on with the tokens that enter it."""
        outputs = (self._output(first, state) for state in entering)
        losses = [self.distance(dense, out) for dense, out in zip(self.dense, outputs, strict=True)]
        return float(torch.cat(losses).mean())

    @torch.no_grad()
    def _output(self, first: int, state: TokenState) -> Tensor:
        with ending_early(self.model):
            for block in self.model.blocks[first:]:
                state = block(state)
        return self.model.classify(state)


@contextmanager
def ending_early(model: Vit) -> Iterator[None]:
    """While open, the last block works on no more than the output reads: a tenth of all work, for free."""
    last = blocks_of(model)[-1]
    if not model.config.reads_prefix_only or last.keep is not None:
        yield
        return
    with put_in(last, prefix_only=True):
        yield


def take(states: Sequence[TokenState], count: int) -> list[TokenState]:
    """The first ``count`` images of the batches."""
    taken = []
    for state in states:
        if count > 0:
            size, source = (None if part is None else part[:count] for part in (state.size, state.source))
            taken.append(state._replace(x=state.x[:count], size=size, source=source))
        count -= len(state.x)
    return taken


@contextmanager
def columns_kept(block: Block, half: Half, columns: Sequence[int], weight: Tensor | None) -> Iterator[None]:
    """While open, the half works with ``columns`` alone; ``weight`` [C, columns] takes the place of theirs.

    The others are zero: what a really smaller half computes, at the dense one's cost.
    """
    layer = out_layers(block)[half]
    dense = layer.weight.data
    index = torch.as_tensor(columns, device=dense.device)
    changed = torch.zeros_like(dense)
    changed[:, index] = dense[:, index] if weight is None else weight.to(dense)
    layer.weight.data = changed
    try:
        yield
    finally:
        layer.weight.data = dense


@contextmanager
def queries_kept(block: Block, rows: Sequence[int], factors: Tensor | None) -> Iterator[None]:
    """While open, queries have the dims ``rows`` of all heads' alone, times ``factors`` [rows]; the others are zero.

    What is left of the logits is what smaller queries and keys would give, at the dense ones' cost.
    """
    layer = block.attn.qkv
    scale = torch.ones_like(layer.weight.data[:, 0])
    scale[: block.attn.sizes[0]] = 0
    scale[list(rows)] = 1 if factors is None else factors.to(scale)
    dense = {name: parameter.data for name, parameter in layer.named_parameters()}
    for name, parameter in layer.named_parameters():
        parameter.data = dense[name] * (scale[:, None] if dense[name].ndim > 1 else scale)
    try:
        yield
    finally:
        for name, parameter in layer.named_parameters():
            parameter.data = dense[name]


@contextmanager
def put_in(block: Block, **values: Any) -> Iterator[None]:
    """While open, ``block`` has other attributes: an ``attn`` or ``mlp`` of another size or None, a ``reducer``..."""
    before = {name: getattr(block, name) for name in values}
    try:
        for name, value in values.items():
            setattr(block, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(block, name, value)


@contextmanager
def reducing(model: Vit, make: Callable[[int], Reducer], route: Mapping[int, int]) -> Iterator[None]:
    """While open, each block of ``route`` leaves so many patch tokens, by what ``make`` gives for it."""
    with ExitStack() as stack:
        for index, keep in route.items():
            stack.enter_context(put_in(blocks_of(model)[index], reducer=make(index), keep=keep))
        yield


def columns_of(units: Sequence[int], unit_size: int) -> list[int]:
    """Columns of ``units``, each of which has ``unit_size`` consecutive ones."""
    return [unit * unit_size + i for unit in units for i in range(unit_size)]


def counts_on_the_way(reaches: Callable[[int, int], bool], levels: Sequence[int], keep: int) -> list[int]:
    """Patch tokens after each of the fewest applications of a method that lead from ``levels[0]`` to ``keep``.

    The first of them do as little as they may. Empty where no way over ``levels`` leads there.

    Args:
        reaches: n, fewer -> whether one application of the method can turn n patch tokens into fewer.
        levels: patch tokens that there may be between blocks, descending, all of them first.
    """
    counts = [keep]
    while not reaches(levels[0], counts[0]):
        enough = [n for n in levels[1:] if n > counts[0] and reaches(n, counts[0])]
        if not enough:
            return []
        counts.insert(0, enough[0])
    return counts
