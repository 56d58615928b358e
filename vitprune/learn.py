"""Learn what to keep of a model while it trains, with one of the methods in ``vitprune/structure``.

from vitprune.budgets import macs_budget
from vitprune.learn import learn
from vitprune.surgery import prune

found = learn("wdpruning", model, macs_budget(model.config, 0.5), batches, held_out, RecoverSettings(steps=3000))
slim = prune(found.model, found.plan)  # and then recover(slim, model, ...)
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from . import parts
from .model.vit import Vit, fingerprint
from .plan import Plan
from .recover import Batches, Check, Progress, RecoverSettings, recover
from .structure.base import MULTIPLES, Budget, Multiples, StructureMethod
from .surgery import build

SETTINGS = RecoverSettings()


class Learned(NamedTuple):
    """What a method found.

    Attributes:
        plan: what stays, within the budget; made for ``model``.
        model: all of the model, with the weights that it learned beside the plan.
        checks: held-out losses on the way, of the model as it was gated then.
        method_weights: of the plan's token method, as ``surgery.prune`` takes them; mostly there is none.
    """

    plan: Plan
    model: Vit
    checks: tuple[Check, ...]
    method_weights: dict[str, Tensor]


class Trained(NamedTuple):
    """A training that is over, of which a plan can be taken within its budget, or within less."""

    model: Vit
    method: StructureMethod
    checks: tuple[Check, ...]

    def within(self, share: float) -> Learned:
        """What the method leaves within ``share`` of the dense model's cost, told as its budget is.

        Raises:
            BelowLeast: the least that may be left costs more.
        """
        device = next(self.model.parameters()).device
        model, method = build(self.model.config, self.model.state_dict()).cpu(), deepcopy(self.method).cpu()
        method.budget = method.budget._replace(share=share)
        kept = method.finish(model)
        plan = Plan(fingerprint(model), model.config.patches, kept.reducer, kept.blocks)
        return Learned(plan, model.to(device).eval(), self.checks, dict(kept.method_weights))


def structure_method(name: str) -> type[StructureMethod]:
    """The method that the file ``name`` in ``vitprune/structure`` defines.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    return parts.load("vitprune.structure", name, StructureMethod)  # type: ignore[type-abstract]


def learn(
    name: str,
    model: Vit,
    budget: Budget,
    batches: Batches,
    held_out: Tensor,
    settings: RecoverSettings = SETTINGS,
    *,
    multiples: Multiples = MULTIPLES,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> Learned:
    """Train a copy of ``model`` with the method ``name``; ``model`` itself is the teacher, and stays as it is.

    Args:
        budget: what may be left; see ``vitprune.budgets``.
        batches, held_out, settings, progress, checkpoint: as ``recover`` takes them. A ``settings.recipe`` of the
            method's own, ``structure_method(name).recipe``, trains as its authors do, at ``settings.lr``, which is
            theirs where it is ``recipe.lr``; without one it learns from the model's answers alone.
        multiples: of kept counts.
        options: of the method, such as ``blocks`` of wdpruning.

    Raises:
        InputError: there is no such method, or the budget cannot be met.
        NotSupported: the method cannot prune such a model.
    """
    student, method = untrained(name, model, budget, multiples, settings, **options)
    found = recover(
        student, model, batches, held_out, settings, progress=progress, checkpoint=checkpoint, method=method
    )
    return Trained(student, method, found.checks).within(budget.share)


def untrained(
    name: str, model: Vit, budget: Budget, multiples: Multiples, settings: RecoverSettings, **options: Any
) -> tuple[Vit, StructureMethod]:
    """A copy of ``model`` and the method that is to train it. Arguments and errors as of ``learn``."""
    student = build(model.config, model.state_dict()).to(next(model.parameters()).device)
    return student, structure_method(name)(student, budget, multiples, settings.steps, **options)
