"""The search for the plan that loses the least inside a latency budget.

Tokens, heads, their dims, MLP width and depth compete for the same measured milliseconds in one exact problem. Names
are imported when they are first used; only those of ``losses`` need torch.

    from vitprune import search
    from vitprune.tokens.evit import EViT

    method = search.TokenMethod.of("evit", EViT)
    sizes = search.Sizes(search.multiples(6, 1), search.multiples(1536, 64), search.ladder(196, 12, 49))
    losses, rankings = search.measure_losses(model, images, sizes, criterion="obs", token_method="evit")
    table = search.LatencyTable.from_dict(json.load(open("latency_table.json")))  # from `vitprune-deploy measure`
    problem = search.Problem(table, losses, method, sizes)

    dense_ms = problem.predict_ms(problem.dense())
    plans = problem.solve([dense_ms / 3, dense_ms])      # one pass ...
    point = plans.best(dense_ms / 2)                     # ... answers every budget: counts, predicted_ms, loss
    evaluate = search.Evaluator(model, rankings, images, token_method="evit")
    refined = search.refine(problem, dense_ms / 2, evaluate)  # corrected by the true loss of whole plans
    landed = search.land(problem, search.Target(speedup=2), measure, first=[refined.winner.point])

Where to bring your own:

* losses: fill a ``LossTable`` with any numbers that add up, in any unit; or weight them, ``problem.reweighted``.
* times: ``LatencyTable.fill`` takes measured ``Pieces`` from anywhere; ``land`` takes any ``measure``.
* choices that a ``Problem`` does not know (weight patterns): describe blocks by ``Stay``, ``Move`` and
  ``Either`` and call ``solve`` yourself; it knows nothing but losses, times and labels.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .choices import Block, Choice, Either, Move, Stay
    from .correct import Effort, Refined, refine
    from .counts import Counts, Sizes, TokenMethod
    from .frontier import Point, from_rows, pick, to_rows
    from .landing import Approach, Landed, Measured, Target, land
    from .latency import Circumstances, LatencyTable, Levels, Pieces
    from .losses import Evaluator, LossTable, Rankings, measure_losses, with_token_method
    from .problem import Plans, Problem, ladder, multiples
    from .solver import Frontier, Solution, solve

_HOMES = {
    "choices": ("Block", "Choice", "Either", "Move", "Stay"),
    "correct": ("Effort", "Refined", "refine"),
    "counts": ("Counts", "Sizes", "TokenMethod"),
    "frontier": ("Point", "from_rows", "pick", "to_rows"),
    "landing": ("Approach", "Landed", "Measured", "Target", "land"),
    "latency": ("Circumstances", "LatencyTable", "Levels", "Pieces"),
    "losses": ("Evaluator", "LossTable", "Rankings", "measure_losses", "with_token_method"),
    "problem": ("Plans", "Problem", "ladder", "multiples"),
    "solver": ("Frontier", "Solution", "solve"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Approach",
    "Block",
    "Choice",
    "Circumstances",
    "Counts",
    "Effort",
    "Either",
    "Evaluator",
    "Frontier",
    "Landed",
    "LatencyTable",
    "Levels",
    "LossTable",
    "Measured",
    "Move",
    "Pieces",
    "Plans",
    "Point",
    "Problem",
    "Rankings",
    "Refined",
    "Sizes",
    "Solution",
    "Stay",
    "Target",
    "TokenMethod",
    "from_rows",
    "ladder",
    "land",
    "measure_losses",
    "multiples",
    "pick",
    "refine",
    "solve",
    "to_rows",
    "with_token_method",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"vitprune.search has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, *_HOMES]
