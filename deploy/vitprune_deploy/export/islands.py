"""Operations that fp16 cannot hold, found by the ranges that they reach on images, and kept in fp32 in an fp16 model.

fp16 ends at 65504, and in some trained ViTs a few activations are thousands of times larger than the others: Sun et
al., Massive Activations in Large Language Models, COLM 2024, https://arxiv.org/abs/2402.17762. An operation whose
inputs, outputs or weights come near the end is an island: it computes in fp32, between Casts that stand in the exported
graph. What underflows is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vitprune.model.state import TokenState
from vitprune.model.vit import Attention, PostNormBlock, Vit

LARGEST = torch.finfo(torch.float16).max
HEADROOM = 4.0  # images that nobody measured may reach so many times further than those that were measured
NEAR = LARGEST / HEADROOM
STEM = ("patch_embed", "embed_norm", "norm_pre")
CORE = ("qkv", "q_norm", "k_norm")  # of an attention: all that makes its scores
NORMS = ("norm1", "norm2")  # of a block
SHOWN = 5  # in a sentence


class Island(NamedTuple):
    """Operations that compute in fp32.

    Attributes:
        kind: ``layer``: one module, or all of a token method or a pooling; ``attention``: queries, keys, values, scores
            and their sum of an attention; ``stream``: the residual stream from a block on, with the norms that read
            it; ``stem``: everything in front of the first block.
        where: name of the module in the model.
        reaches: the largest magnitude that was seen there; beyond 65504 fp16 would have given infinity.
        wide: what it gives is too large for fp16 as well, so that it stays in fp32 for whoever reads it.
    """

    kind: Literal["layer", "attention", "stream", "stem"]
    where: str
    reaches: float
    wide: bool


def find_islands(model: Vit, images: Tensor, batch: int = 4) -> list[Island]:
    """The operations of ``model``, in fp32 and eval mode, that come within a quarter of fp16's range on ``images``.

    Args:
        images: normalised, [M, channels, height, width].
        batch: how many of them at a time.
    """
    found = _Ranges(model)
    weights = next(model.parameters())
    with found, torch.no_grad():
        for part in images.split(batch):
            model(part.to(weights))
    return _chosen(model, found)


def narrow_around(model: nn.Module, islands: Sequence[Island], dtype: torch.dtype) -> None:
    """Put ``model``, a ``Vit`` in fp32, into ``dtype`` but for ``islands`` of it, with the Casts between the two.

    Islands of modules that the model has not are left out: one that was pruned keeps those of what is left of it.
    """
    _Narrowing(model, islands, dtype).apply()


def sentence(islands: Sequence[Island]) -> str:
    """What is kept in fp32, why, and what else could be done."""
    named = [f"{_name(island)} (up to {island.reaches:.0f})" for island in islands]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return (
        f"fp16 ends at {LARGEST:.0f}, and some operations come near or go beyond it on calibration images: "
        f"{', '.join(named[:SHOWN])}{more}. They are kept in fp32; runtime.precision bf16 has fp32's range and needs "
        "no such islands, where the device has it."
    )


def _name(island: Island) -> str:
    """An island in words."""
    if island.kind == "stream":
        return f"the residual stream from {island.where} on"
    return {"stem": "the patch embedding", "attention": f"the scores of {island.where}"}.get(island.kind, island.where)


class _Ranges:
    """While a context, notes the largest magnitudes in a model.

    Attributes:
        reads, gives: by module, of what enters it and leaves it; units of several modules count as one.
        stream: by block, of the residual stream in it; ``entering`` that of the first block.
        scores: by block, of queries times keys, scaled.
    """

    def __init__(self, model: Vit) -> None:
        depth = len(model.blocks)
        self.reads: dict[str, float] = {}
        self.gives: dict[str, float] = {}
        self.stream, self.scores, self.entering = [0.0] * depth, [0.0] * depth, 0.0
        self._model, self._hooks = model, ExitStack()

    def __enter__(self) -> _Ranges:
        for name, module in _leaves(self._model):
            self._watch(name, module)
        for number, block in enumerate(self._model.blocks):
            self._watch_block(number, block)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _watch(self, name: str, module: nn.Module) -> None:
        self.reads[name] = max((_largest(weight) for weight in module.parameters(recurse=False)), default=0.0)
        self.gives[name] = 0.0

        def read(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.reads[name] = max([self.reads[name], *map(_largest, inputs)])

        def gave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.gives[name] = max(self.gives[name], _largest(output))

        self._keep(module.register_forward_pre_hook(read), module.register_forward_hook(gave))

    def _watch_block(self, number: int, block: Any) -> None:
        def entered(module: nn.Module, inputs: tuple[TokenState]) -> None:
            if number == 0:
                self.entering = max(self.entering, _largest(inputs[0].x))
            self.stream[number] = max(self.stream[number], _largest(inputs[0].x))

        def between(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.stream[number] = max(self.stream[number], _largest(inputs[0]))

        def left(module: nn.Module, inputs: Any, output: TokenState) -> None:
            self.stream[number] = max(self.stream[number], _largest(output.x))

        def scored(module: Any, inputs: tuple[Any, ...]) -> None:
            q, k = inputs[:2]  # image by image: all scores at once would be too many
            found = (_largest(one * module.scale @ other.transpose(-2, -1)) for one, other in zip(q, k, strict=True))
            self.scores[number] = max(self.scores[number], *found)

        self._keep(block.register_forward_pre_hook(entered), block.register_forward_hook(left))
        if block.mlp is not None:
            reader = block.mlp if isinstance(block, PostNormBlock) else block.norm2
            self._keep(reader.register_forward_pre_hook(between))
        if block.attn is not None:
            self._keep(block.attn.register_forward_pre_hook(scored))

    def _keep(self, *handles: Any) -> None:
        for handle in handles:
            self._hooks.callback(handle.remove)


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold no others, by name."""
    return ((name, module) for name, module in model.named_modules() if not any(True for _ in module.children()))


def _weighted(module: nn.Module) -> bool:
    """Whether a module has weights; one without computes in whatever number format it is given."""
    return any(True for _ in module.parameters())


def _largest(value: Any) -> float:
    """The largest magnitude in a tensor of floats; 0 for anything else."""
    floats = isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    return float(value.detach().abs().amax()) if floats else 0.0


def _chosen(model: Vit, found: _Ranges) -> list[Island]:
    """The islands, from the image to the head."""
    stem = max([found.entering, *(found.gives.get(name, 0.0) for name in STEM)])
    islands = [Island("stem", "patch_embed", stem, True)] if stem > NEAR else []
    cores, layers = [], []
    for number, block in enumerate(model.blocks):
        name = f"blocks.{number}.attn"
        core = max([found.scores[number], *(found.gives.get(f"{name}.{part}", 0.0) for part in CORE)])
        if block.attn is not None and core > NEAR:
            cores.append(Island("attention", name, core, False))
    post = [core for core in cores if isinstance(model.blocks[_block(core.where)], PostNormBlock)]
    starts = [number for number, reached in enumerate(found.stream) if reached > NEAR]
    starts += [0] * len(islands) + [_block(core.where) for core in post]  # no norm of theirs to widen in front of them
    stream = [Island("stream", f"blocks.{min(starts)}", max(found.stream), True)] if starts else []
    inside = {f"{core.where}.{part}" for core in cores for part in CORE} | set(STEM if islands else ())
    if starts:
        inside |= {"norm", *(f"blocks.{i}.{n}" for i in range(min(starts), len(model.blocks)) for n in NORMS)}
    for unit in dict.fromkeys(_unit(name) for name, module in _leaves(model) if _weighted(module)):
        if unit not in inside:
            layers += _layer(unit, found)
    return islands + stream + cores + layers


def _layer(unit: str, found: _Ranges) -> list[Island]:
    """The island that the module or unit ``unit`` is, if it is one."""
    names = [name for name in found.reads if _unit(name) == unit]
    reads, gives = (max(ranges[name] for name in names) for ranges in (found.reads, found.gives))
    if unit.endswith(".mlp.fc1"):
        gives = max(gives, found.reads.get(f"{unit.removesuffix('fc1')}norm", 0.0))  # of a gated one: the product
    reached = max(reads, gives)
    return [Island("layer", unit, reached, gives > NEAR)] if reached > NEAR else []


def _unit(name: str) -> str:
    """What is an island as a whole: the token method of a block, the pooling; otherwise the module itself."""
    parts = name.split(".")
    if parts[0] == "pool":
        return "pool"
    return ".".join(parts[:3]) if parts[2:3] == ["reducer"] else name


def _block(name: str) -> int:
    """The block that a name lies in."""
    return int(name.split(".")[1])


class _Narrowing:
    """Turns the modules of a model narrow that are no islands, and has each take and give what it should."""

    def __init__(self, model: Any, islands: Sequence[Island], dtype: torch.dtype) -> None:
        self._model, self._islands, self._dtype = model, islands, dtype
        self._wide: dict[str, bool] = {}  # module -> whether what it gives stays in fp32

    def apply(self) -> None:
        """Narrow the weights, and place the Casts; these are hooks, which an export records like any operation."""
        for island in self._islands:
            getattr(self, f"_{island.kind}")(island)
        for name, module in self._model.named_modules():
            if name not in self._wide and _unit(name) not in self._wide:
                for weight in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    weight.data = _to(weight.data, self._dtype)
        for name, module in _leaves(self._model):
            if _weighted(module):
                module.register_forward_pre_hook(_as_weights)
                if not self._wide.get(name, True):
                    module.register_forward_hook(_giving(self._dtype))
        for module in self._model.modules():
            if isinstance(module, Attention):
                module.register_forward_pre_hook(_as_queries)
        if self._model.pool is not None:
            self._model.pool.register_forward_pre_hook(_as_weights)

    def _layer(self, island: Island) -> None:
        self._wide[island.where] = self._wide.get(island.where, False) or island.wide

    def _attention(self, island: Island) -> None:
        for part in CORE:
            self._wide[f"{island.where}.{part}"] = True
        # rows of qkv's weights are used without calling it, so that no Cast could stand in front of them
        self._wide[island.where.replace("attn", "norm1")] = True

    def _stem(self, island: Island) -> None:
        self._wide |= dict.fromkeys(("", *STEM), True)  # the model's own weights are prefix tokens and positions

    def _stream(self, island: Island) -> None:
        first = _block(island.where)
        self._model.blocks[first].register_forward_pre_hook(_widened)
        for number, block in enumerate(self._model.blocks[first:], start=first):
            name = f"blocks.{number}"
            for norm in NORMS:
                self._wide.setdefault(f"{name}.{norm}", False)
            self._wide |= dict.fromkeys((f"{name}.reducer", f"{name}.ls1", f"{name}.ls2"), True)
            for last in (block.ls1, block.ls2):  # what is added to the stream; without weights it computes nothing
                last.register_forward_hook(_giving(torch.float32))
            if isinstance(block, PostNormBlock):  # its attention reads the stream itself
                self._attention(Island("attention", f"{name}.attn", 0.0, False))
        self._wide.setdefault("norm", False)


def _as_weights(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs in the number format of the module's weights."""
    dtype = next(module.parameters()).dtype
    return tuple(_to(value, dtype) for value in inputs)


def _as_queries(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What attention adds to its scores, in the number format of its queries."""
    q, k, v, bias, *more = inputs
    return (q, k, v, _to(bias, q.dtype), *more)


def _giving(dtype: torch.dtype) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook after which the output is of ``dtype``."""
    return lambda module, inputs, output: _to(output, dtype)


def _widened(module: nn.Module, inputs: tuple[TokenState, ...]) -> tuple[TokenState, ...]:
    """The tokens that enter a block, with all that is remembered of them, in fp32."""
    return (_state_in_fp32(inputs[0]), *inputs[1:])


def _state_in_fp32(state: TokenState) -> TokenState:
    """The state and what is parked of it, in fp32."""
    names = ("x", "size", "source", "score")
    parts: dict[str, Any] = {name: _to(getattr(state, name), torch.float32) for name in names}
    return state._replace(**parts, parked=None if state.parked is None else _state_in_fp32(state.parked))


def _to(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of floats in ``dtype``; the same object where it is so already, which leaves no trace in a graph."""
    floats = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype
    return value.to(dtype) if floats else value
