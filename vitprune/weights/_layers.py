"""Passes over images that hand a model's linear layers to a method, with the statistics that it needs.

All of them hold the statistics of one block at a time. Moments go from the first block to the last and see what has
been removed in front of a block by then; gradients go from the last block to the first, from the tokens that entered
each block, of which all blocks' are kept: 4 (depth + 1) N C bytes an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from ..model.state import TokenState
from ..model.vit import Vit
from ..statistics import batches, blocks_of, detached, features
from .base import LayerView, Progress, Read

Linears = Mapping[str, nn.Linear]


class Call(NamedTuple):
    """One product of tokens with rows of a Linear."""

    name: str
    rows: slice
    inputs: Tensor  # [B, T, in]
    outputs: Tensor  # [B, T, rows]


class _Recorder(TorchFunctionMode):
    """Notes the products with the given layers, also those with rows of them that a block makes by itself."""

    def __init__(self, layers: Linears) -> None:
        super().__init__()
        self.of = {layer.weight.untyped_storage().data_ptr(): (name, layer.weight) for name, layer in layers.items()}
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            x, weight = args[:2]
            name, whole = self.of.get(weight.untyped_storage().data_ptr(), ("", weight))
            if name:
                first = (weight.storage_offset() - whole.storage_offset()) // weight.shape[1]
                x3, out3 = (part if part.ndim > 2 else part[:, None] for part in (x, out))
                out = out3 if out.ndim > 2 else out3[:, 0]  # the graph must pass through what is noted
                self.calls.append(Call(name, slice(first, first + weight.shape[0]), x3, out3))
        return out


@contextmanager
def recorded(layers: Linears) -> Iterator[list[Call]]:
    """While open, the products with ``layers``, in order."""
    recorder = _Recorder(layers)
    with recorder:
        yield recorder.calls


class Stage(NamedTuple):
    """A part of the model that tokens pass: a block, or what makes the output of the last one's tokens."""

    run: Callable[[TokenState], Any]
    layers: dict[str, nn.Linear]  # those of its layers that are to be pruned, by name


def linears(model: Vit) -> dict[str, nn.Linear]:
    """All layers whose weights may be removed, by name: those of the blocks, of the pooling and the heads."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".reducer." not in name
    }


def stages(model: Vit, chosen: Linears) -> list[Stage]:
    """The blocks, then the classifier, each with its layers among ``chosen``."""
    found = [
        Stage(block, {name: layer for name, layer in chosen.items() if name.startswith(f"blocks.{number}.")})
        for number, block in enumerate(blocks_of(model))
    ]
    last = {name: layer for name, layer in chosen.items() if not name.startswith("blocks.")}
    return [*found, Stage(model.classify, last)]


def view(name: str, layer: nn.Linear, **known: Any) -> LayerView:
    """``layer`` with what is ``known`` of it; weights that are 0 have been removed before."""
    weight = layer.weight.detach()
    return LayerView(name, weight, weight != 0, **known)


class Plain:
    """The layers without statistics."""

    def __init__(self, chosen: Linears) -> None:
        self.chosen = chosen

    def __iter__(self) -> Iterator[LayerView]:
        for name, layer in self.chosen.items():
            yield view(name, layer)


class Moments:
    """The layers with the second moments of what they read, from the first block to the last.

    Layers that are changed when the next one is asked for change what later blocks read.
    """

    def __init__(self, model: Vit, chosen: Linears, images: Tensor, progress: Progress | None) -> None:
        self.model, self.images, self.progress = model, images, progress
        self.stages = stages(model, chosen)

    def __iter__(self) -> Iterator[LayerView]:
        with torch.no_grad():
            states: list[Any] = [self.model.embed(batch) for batch in batches(self.model, self.images)]
        for number, stage in enumerate(self.stages):
            moments = self._moments(stage, states)
            for name, layer in stage.layers.items():
                yield view(name, layer, moments=moments.pop(name))
            with torch.no_grad():
                states = [stage.run(state) for state in states]
            if self.progress is not None:
                self.progress(number + 1, len(self.stages), "second moments")

    @torch.no_grad()
    def _moments(self, stage: Stage, states: list[Any]) -> dict[str, Tensor]:
        """[in, in] of each layer of ``stage``; of rows that read different tokens, those that read the most count."""
        sums: dict[str, Tensor] = {}
        tokens: dict[str, int] = {}
        for state in states if stage.layers else ():
            with recorded(stage.layers) as calls:
                stage.run(state)
            widest = {call.name: call for call in sorted(calls, key=lambda call: call.inputs.shape[1])}
            for name, call in widest.items():
                flat = call.inputs.flatten(0, -2)
                sums[name] = sums.get(name, 0) + (flat.T @ flat).double()
                tokens[name] = tokens.get(name, 0) + len(flat)
        return {name: total / tokens[name] for name, total in sums.items()}


class Gradients:
    """The layers with their inputs and slopes, from the last block to the first; the model must not change meanwhile.

    Args:
        labels: classes of the images, [M]; None: drawn from the model's own output (see ``statistics.gate_gradients``).
    """

    def __init__(
        self, model: Vit, chosen: Linears, images: Tensor, labels: Tensor | None, seed: int, progress: Progress | None
    ) -> None:
        self.model, self.progress = model, progress
        self.stages = stages(model, chosen)
        self.states = self._states(images)
        self.slopes = self._slopes(labels, torch.Generator().manual_seed(seed))

    def __iter__(self) -> Iterator[LayerView]:
        slopes = self.slopes
        for done, (stage, states) in enumerate(zip(reversed(self.stages), reversed(self.states), strict=True)):
            if done == 0 or stage.layers or any(other.layers for other in self.stages[: -done - 1]):
                reads, slopes = self._back(stage, states, slopes)
                for name, layer in stage.layers.items():
                    yield view(name, layer, reads=reads.pop(name))
            if self.progress is not None:
                self.progress(done + 1, len(self.stages), "gradients of weights")

    @torch.no_grad()
    def _states(self, images: Tensor) -> list[list[TokenState]]:
        """The tokens that enter each stage, batch by batch."""
        entering = [[self.model.embed(batch) for batch in batches(self.model, images)]]
        for stage in self.stages[:-1]:
            entering.append([stage.run(state) for state in entering[-1]])
        return entering

    @torch.no_grad()
    def _slopes(self, labels: Tensor | None, generator: torch.Generator) -> list[list[Tensor]]:
        """Gradient of each image's loss at the model's output, batch by batch."""
        found: list[list[Tensor]] = []
        first = 0
        for state in self.states[-1]:
            output = self.model.classify(state)
            if not bool(torch.isfinite(output).all()):
                raise InputError(
                    "the model's answers to the calibration images are no numbers (NaN or infinite); look for such "
                    "values in its weights and in the images"
                )
            known = None if labels is None else labels[first : first + len(output)].to(output.device)
            found.append([slope_of_loss(output, self.model.config.classes, known, generator)])
            first += len(output)
        return found

    def _back(
        self, stage: Stage, states: list[TokenState], slopes: list[list[Tensor]]
    ) -> tuple[dict[str, tuple[Read, ...]], list[list[Tensor]]]:
        """What the stage's layers read with its slopes, and the slopes at its input, from those at its output."""
        reads: dict[str, list[Read]] = {name: [] for name in stage.layers}
        images, done, before = sum(len(state.x) for state in states), 0, []
        for state, slope in zip(states, slopes, strict=True):
            entering, parts = detached(state)
            with torch.enable_grad(), recorded(stage.layers) as calls:
                left = stage.run(entering)
            out = features(left) if isinstance(left, TokenState) else [left]
            wanted = [*parts, *(call.outputs for call in calls)]
            found = torch.autograd.grad(out, wanted, slope, allow_unused=True)
            before.append([torch.zeros_like(p) if g is None else g for p, g in zip(parts, found, strict=False)])
            used = [(call, there) for call, there in zip(calls, found[len(parts) :], strict=True) if there is not None]
            for name, mine in reads.items():
                _keep(mine, [pair for pair in used if pair[0].name == name], images, done)
            done += len(state.x)
        return {name: tuple(parts) for name, parts in reads.items()}, before


def _keep(reads: list[Read], calls: list[tuple[Call, Tensor]], images: int, done: int) -> None:
    """Write what a layer's ``calls`` of a batch read, and their slopes, behind those of the ``done`` images before."""
    if not reads:
        for call, slope in calls:
            room = (part.new_empty(images, *part.shape[1:]) for part in (call.inputs, slope))
            reads.append(Read(call.rows, *room))
    for read, (call, slope) in zip(reads, calls, strict=True):
        read.inputs[done : done + len(slope)] = call.inputs.detach()
        read.slopes[done : done + len(slope)] = slope


def slope_of_loss(output: Tensor, classes: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Gradient of the negative log-likelihood of ``labels``, or of outputs drawn from the model's own, at ``output``.

    Without a classifier the loss is the inner product of Gaussian noise with the normalised features.
    """
    if not classes:
        noise = torch.randn(output.shape, generator=generator).to(output)
        with torch.enable_grad():
            x = output.detach().requires_grad_()
            (slope,) = torch.autograd.grad(-(F.normalize(x, dim=-1) * noise).sum(), x)
        return slope
    shares = output.detach().softmax(-1)
    if labels is None:
        labels = torch.multinomial(shares.cpu(), 1, generator=generator).squeeze(1).to(output.device)
    return shares - F.one_hot(labels, output.shape[-1]).to(shares)


class Curvatures:
    """The layers with the diagonal of the Hessian, estimated by Hutchinson's v * H v with random signs v.

    Without ``labels`` the loss is KL(dense || changed), whose Hessian is the Fisher information.
    """

    def __init__(
        self, model: Vit, chosen: Linears, images: Tensor, labels: Tensor | None, seed: int, progress: Progress | None
    ) -> None:
        self.chosen = chosen
        self.found = hessian_diagonal(model, chosen, images, labels, seed=seed, progress=progress)

    def __iter__(self) -> Iterator[LayerView]:
        for name, layer in self.chosen.items():
            yield view(name, layer, curvature=self.found[name])


PROBES = 16  # random signs for each of the batches
PROBED = 8  # images at a time: their signs' chances average out over all images


def hessian_diagonal(
    model: Vit,
    chosen: Linears,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    probes: int = PROBES,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Estimated diagonal of the Hessian of the mean loss in each layer's weight, [out, in] by name."""
    generator = torch.Generator().manual_seed(seed)
    weights = [layer.weight for layer in chosen.values()]
    before = [weight.requires_grad for weight in weights]
    sums = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
    done = 0
    for weight in weights:
        weight.requires_grad_()
    try:
        for batch in images.to(weights[0].device).split(PROBED):
            known = None if labels is None else labels[done : done + len(batch)]
            for total, part in zip(sums, _probed(model, weights, batch, known, probes, generator), strict=True):
                total += part
            done += len(batch)
            if progress is not None:
                progress(done, len(images), "diagonal of the Hessian")
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
    return {name: total / (probes * len(images)) for name, total in zip(chosen, sums, strict=True)}


def _probed(
    model: Vit,
    weights: list[Tensor],
    images: Tensor,
    labels: Tensor | None,
    probes: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Sum over probes v of v * H v, H that of the summed loss of ``images``."""
    with torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]):  # the fused attention has no second derivative
        slopes = torch.autograd.grad(_loss(model, images, labels), weights, create_graph=True)
        sums = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
        for _ in range(probes):
            signs = [
                (torch.randint(0, 2, w.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(w) for w in weights
            ]
            products = torch.autograd.grad(slopes, weights, signs, retain_graph=True)
            for total, sign, product in zip(sums, signs, products, strict=True):
                total += sign * product
    return sums


def _loss(model: Vit, images: Tensor, labels: Tensor | None) -> Tensor:
    """Summed over ``images``: cross entropy with ``labels``, or the divergence from the model's own output."""
    output = model(images)
    if not model.config.classes:
        features = F.normalize(output, dim=-1)
        return (features - features.detach()).square().sum() / 2
    if labels is not None:
        return F.cross_entropy(output, labels.to(output.device), reduction="sum")
    own = output.detach().log_softmax(-1)
    return F.kl_div(output.log_softmax(-1), own, reduction="sum", log_target=True)
