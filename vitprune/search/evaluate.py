"""The true loss of whole plans: KL to the dense model on images, for the search to correct its sums by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from .. import parts
from ..errors import InputError
from ..model.state import TokenState
from ..model.vit import Vit, fingerprint
from ..statistics import Half, Progress, batches, blocks_of
from ..surgery import make_reducer, prune
from ..tokens.base import Reducer
from .counts import Counts
from .probes import distance, ending_early, put_in
from .rankings import Rankings

Attn = tuple[int, int | None, int | None]  # heads, and dims of their queries and keys, and of their values; None: all
Choice = tuple[Attn, int, int | None]  # attention, hidden units, and patch tokens that a block leaves; None: all
NO_HEADS: Attn = (0, None, None)


def evaluate_counts(
    model: Vit,
    rankings: Rankings,
    counts: Sequence[Counts],
    images: Tensor,
    *,
    token_method: str | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Mean loss of each plan of ``counts`` on ``images``; see ``Evaluator``, which is the cheaper for several calls."""
    return Evaluator(model, rankings, images, token_method=token_method)(counts, progress)


class Evaluator:
    """Computes the mean loss of whole plans on the same images again and again.

    The dense outputs and the slim halves that plans were made of are kept, and plans that agree in their first blocks
    run these only once.

    Args:
        model: the dense model; changed and restored during a call.
        rankings: of this model.
        images: [M, channels, height, width].
        token_method: name of the token method; None where no plan reduces tokens.
        method_weights: of the token method, as ``surgery.prune`` takes them.
    """

    def __init__(
        self,
        model: Vit,
        rankings: Rankings,
        images: Tensor,
        *,
        token_method: str | None = None,
        method_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.rankings, self.sha256 = model, rankings, fingerprint(model)
        self.method, self.method_weights = token_method, method_weights
        if token_method is not None:
            parts.load("vitprune.tokens", token_method, Reducer)  # type: ignore[type-abstract]
        self.halves: dict[tuple[int, Half, int | Attn], nn.Module | None] = {}
        self.reducers: dict[int, Reducer] = {}
        with torch.no_grad():
            self.entering = [model.embed(batch) for batch in batches(model, images)]
            self.dense = [_through(model, state) for state in self.entering]

    @torch.no_grad()
    def __call__(self, counts: Sequence[Counts], progress: Progress | None = None) -> list[float]:
        """Mean loss of each plan, in nats per image (or of cosine distance, for models without a classifier).

        Raises:
            InputError: a plan keeps other counts than were ranked, or reduces tokens where it cannot.
        """
        plans = [self._choices(number, plan) for number, plan in enumerate(counts)]
        self._make_halves(plans)
        sums, images = [0.0] * len(plans), 0
        for number, (state, dense) in enumerate(zip(self.entering, self.dense, strict=True), start=1):
            for plan, output in self._descend(state, 0, list(range(len(plans))), plans):
                sums[plan] += float(distance(self.model)(dense, output).sum())
            images += len(dense)
            if progress is not None:
                progress(number, len(self.entering), f"{len(plans)} plans evaluated")
        return [total / images for total in sums]

    def _choices(self, number: int, plan: Counts) -> list[Choice]:
        """What ``plan`` leaves of each block."""
        if len(plan.heads) != len(self.model.blocks):
            raise InputError(f"plan {number} has {len(plan.heads)} blocks, the model has {len(self.model.blocks)}")
        out = plan.patches_out(self.model.config.patches)
        for block, (heads, keep) in enumerate(zip(plan.heads, out, strict=True)):
            if keep and (not heads or self.method is None):
                lacks = "no token method was named" if heads else "without attention it cannot"
                raise InputError(f"plan {number} leaves {keep} patch tokens at block {block}, but {lacks}")
        attention = [(heads, *(plan.dims(block) or (None, None))) for block, heads in enumerate(plan.heads)]
        return list(zip(attention, plan.mlp, out, strict=True))

    def _make_halves(self, plans: Sequence[Sequence[Choice]]) -> None:
        """Prune what the plans need and was not made before: as few whole models as bear all of it."""
        attention: list[list[Attn]] = []
        mlps: list[list[int]] = []
        for block in range(len(self.model.blocks)):
            wanted = [plan[block] for plan in plans]
            attention.append(sorted({a for a, _, _ in wanted if (block, "attn", a) not in self.halves}, key=str))
            mlps.append(sorted({m for _, m, _ in wanted if (block, "mlp", m) not in self.halves}))
        nothing = [None] * len(attention)
        for row in zip_longest(zip_longest(*attention), zip_longest(*mlps)):
            self._make_row([a or NO_HEADS for a in row[0] or nothing], [m or 0 for m in row[1] or nothing])

    def _make_row(self, attention: Sequence[Attn], units: Sequence[int]) -> None:
        """Prune one half of each kind for every block."""
        heads = [h for h, _, _ in attention]
        qk, v = ([dims[kind] or 0 for dims in attention] for kind in (1, 2))
        out, patches = [None] * len(heads), self.model.config.patches
        plan = self.rankings.plan(self.sha256, heads, units, out, patches=patches, kept_qk=qk, kept_v=v)
        slim = prune(self.model, plan, self.rankings.weights(heads, units, qk, v))
        for block, made in enumerate(blocks_of(slim)):
            self.halves[block, "attn", attention[block]] = made.attn
            self.halves[block, "mlp", units[block]] = made.mlp

    def _descend(
        self, state: TokenState, depth: int, members: list[int], plans: Sequence[Sequence[Choice]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Outputs of the plans ``members``, which agree in the first ``depth`` blocks; ``state`` has left these."""
        if depth == len(self.model.blocks):
            output = self.model.classify(state)
            yield from ((plan, output) for plan in members)
            return
        groups: dict[Choice, list[int]] = {}
        for plan in members:
            groups.setdefault(plans[plan][depth], []).append(plan)
        for choice, group in groups.items():
            yield from self._descend(self._run(depth, choice, state), depth + 1, group, plans)

    def _run(self, index: int, choice: Choice, state: TokenState) -> TokenState:
        """The tokens that leave block ``index`` when it is what ``choice`` says."""
        attention, mlp, keep = choice
        block = blocks_of(self.model)[index]
        change: dict[str, Any] = {"attn": self.halves[index, "attn", attention], "mlp": self.halves[index, "mlp", mlp]}
        if keep and self.method is not None:
            change |= {"reducer": self._reducer(self.method, index), "keep": keep}
        elif index == len(self.model.blocks) - 1 and self.model.config.reads_prefix_only:
            change |= {"prefix_only": True}
        with put_in(block, **change):
            return block(state)

    def _reducer(self, method: str, index: int) -> Reducer:
        if index not in self.reducers:
            made = make_reducer(method, self.model.config, index, self.method_weights)
            self.reducers[index] = made.to(next(self.model.parameters()).device)
        return self.reducers[index]


def _through(model: Vit, state: TokenState) -> Tensor:
    """The output for tokens that enter the first block."""
    with ending_early(model):
        for block in model.blocks:
            state = block(state)
    return model.classify(state)
