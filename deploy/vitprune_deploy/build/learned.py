"""Widths that a method learns while it trains, in place of their search: the training, and the plan that lands.

The training aims at the budget as the latency table predicts it. Then the plan is taken from what was learned, built
and measured; where it takes too long, or far less than it may, another one is taken from the same training, since
latency does not depend on the values of weights. Tokens are not reduced beside it.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from . import several, sparse
from .bench import Bench, load_vit, save_vit, save_weights, write_json
from .sizes import dense_counts, multiples_of_units, sizes
from .training import LR, batches, share

if TYPE_CHECKING:
    from vitprune.learn import Learned, Trained
    from vitprune.model.vit import Vit
    from vitprune.plan import Plan
    from vitprune.search.counts import Counts
    from vitprune.search.landing import Row
    from vitprune.search.latency import LatencyTable
    from vitprune.structure.base import Budget, Multiples, StructureMethod

LEARNING = "learning.json"  # the held-out losses on the way; null where nothing is learned
STATE = "method.safetensors"
NEAR = 0.97  # of the budget: a plan that takes as much has landed, one that takes less is followed by a larger one
TIGHTER = 0.995  # than the measured time asks for, so that the next plan is not over by noise


def settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``learn`` depends on besides earlier stages; nothing where nothing is learned."""
    profile = bench.profile
    if profile.prune.learned.method is None:
        return {}
    return {
        "learned": profile.prune.learned.model_dump(mode="json"),
        "budget": profile.budget.model_dump(mode="json"),
        "batches": [profile.recover.batch, profile.recover.augment],
        "multiples": list(multiples(bench)),
        "seed": profile.seed,
    }


def learn(bench: Bench, folder: Path) -> None:
    """Train the dense model with the method on all devices, and write it and all that the method knows."""
    import torch

    if bench.profile.prune.learned.method is None:
        write_json(folder / LEARNING, None)
    elif torch.cuda.device_count() > 1:
        share(torch.cuda.device_count(), bench, folder, "learn")
    else:
        train(bench, folder)


def train(bench: Bench, folder: Path) -> None:
    """The same in this process, which may be one of several."""
    from accelerate import PartialState

    from vitprune.recover import RecoverSettings, recover

    wanted = bench.profile.prune.learned
    student, method = _method(bench)
    recipe = method.recipe if wanted.recipe == "published" else None
    lr = wanted.lr or (recipe.lr if recipe else LR)
    found = recover(
        student,
        bench.dense,
        lambda epoch: batches(bench, epoch),
        bench.calibration,
        RecoverSettings(wanted.max_steps, wanted.max_seconds, lr, seed=bench.profile.seed, recipe=recipe),
        progress=bench.shows.progress,
        checkpoint=bench.work / "learning.pt",
        method=method,
    )
    if not PartialState().is_main_process:
        return
    save_vit(found.model, folder, "learned")
    save_weights({name: value.detach().cpu() for name, value in method.state_dict().items()}, folder / STATE)
    write_json(folder / LEARNING, [check._asdict() for check in found.checks])


def search(bench: Bench, folder: Path) -> None:
    """Take plans from what was learned until one is measured to be within the budget, and write it as a search does."""
    table, trained = _table(bench), _trained(bench)
    rows, taken = _land(bench, trained, table, folder)
    chosen, found = taken.row, taken.found
    status, reason = _status(bench, taken, len(rows) - 1)
    save_vit(found.model, folder, "learned")
    plan = sparse.with_zeros(found.plan, bench.profile)
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan.to_dict(), default_flow_style=None, sort_keys=False))
    write_json(folder / "frontier.json", _rows([chosen.point]))
    account = {
        "method": None,
        "methods": {"none": found.checks[-1].loss},
        "status": status,
        "reason": reason,
        "budget_ms": taken.budget_ms,
        "dense_ms": taken.dense_ms,
        "dense_predicted_ms": rows[0].point.predicted_ms,
        "chosen": chosen.to_dict(),
        "measured": [row.to_dict() for row in rows] if bench.profile.search.landings else [],
        "evaluations": [],
        "rank_correlation": None,
        "held_out_loss": found.checks[-1].loss,
        "table": table.to_dict(),
        "sparse": sparse.search_kernels(bench, folder),
    }
    write_json(folder / "search.json", account)


def slim_model(bench: Bench, plan: Plan) -> Vit:
    """What ``plan`` leaves of the model that was learned with it."""
    from vitprune.surgery import prune

    return prune(load_vit(bench.folders["search"], "learned"), plan)


def multiples(bench: Bench) -> Multiples:
    """Of kept counts: those of the sizes that the latency table has times of."""
    from vitprune.structure.base import Multiples

    profile, block = bench.profile, bench.dense.config.blocks[0]
    mlp, head_dim = multiples_of_units(profile, block.mlp, block.v_dim)
    return Multiples(profile.head_multiple, mlp, head_dim, profile.prune.head_dims.minimum)


def _method(bench: Bench) -> tuple[Vit, StructureMethod]:
    """A copy of the dense model, and the method that is to train it within the budget, or as near as may be."""
    from vitprune.learn import untrained
    from vitprune.recover import RecoverSettings
    from vitprune.structure.base import BelowLeast

    wanted = bench.profile.prune.learned
    assert wanted.method is not None  # else nothing is learned
    steps, budget = RecoverSettings(wanted.max_steps), _budget(bench, _table(bench))
    try:
        return untrained(wanted.method, bench.dense, budget, multiples(bench), steps)
    except BelowLeast as error:
        return untrained(wanted.method, bench.dense, budget._replace(share=error.least), multiples(bench), steps)


def _budget(bench: Bench, table: LatencyTable) -> Budget:
    from vitprune.budgets import latency_budget

    predicted_ms = table.predict_ms(dense_counts(bench))
    wanted_ms = min(several.budget_ms(bench, predicted_ms), predicted_ms)
    return latency_budget(bench.dense.config, table, wanted_ms, last_for_prefix=_prefix_only(bench))


def _trained(bench: Bench) -> Trained:
    """What the stage ``learn`` left."""
    from safetensors.torch import load_file

    from vitprune.learn import Trained
    from vitprune.recover import Check

    folder = bench.folders["learn"]
    _, method = _method(bench)
    method.load_state_dict(load_file(folder / STATE))
    checks = tuple(Check(**row) for row in bench.json("learn", LEARNING))
    return Trained(load_vit(folder, "learned"), method, checks)


class _Taken(NamedTuple):
    """A plan taken from what was learned, and its time beside the dense model's; ``least``: no less may be left."""

    row: Row
    found: Learned
    dense_ms: float
    budget_ms: float
    least: bool

    @property
    def share(self) -> float:
        """Of the budget."""
        return self.row.measured.ms / self.budget_ms


def _land(bench: Bench, trained: Trained, table: LatencyTable, folder: Path) -> tuple[list[Row], _Taken]:
    """The dense model's row and one for each plan that was taken; and the plan nearest to the budget within it, or the
    fastest where none is.
    """
    rows: list[Row] = []
    taken: list[_Taken] = []
    asked = _budget(bench, table).share
    for number in range(1, max(1, bench.profile.search.landings) + 1):
        found, least = _take(bench, trained, asked)
        if any(found.plan == one.found.plan for one in taken):
            break
        dense, row = _measured(bench, found, table, number, folder)
        rows += [row] if rows else [dense, row]
        dense_ms = dense.measured.ms
        taken.append(_Taken(row, found, dense_ms, several.budget_ms(bench, dense_ms), least))
        if NEAR <= taken[-1].share <= 1 or least:
            break
        if taken[-1].share > 1:  # what was taken may cost less than it might have, by the multiples
            asked = min(asked, row.point.predicted_ms / dense.point.predicted_ms)
        asked = min(1.0, asked * TIGHTER / taken[-1].share)
    shutil.rmtree(folder / "candidates", ignore_errors=True)
    within = [one for one in taken if one.share <= 1]
    return rows, max(within, key=lambda one: one.share) if within else min(taken, key=lambda one: one.share)


def _take(bench: Bench, trained: Trained, share: float) -> tuple[Learned, bool]:
    """What is left within ``share`` of the dense cost, or the least that may be, and whether it is that."""
    from vitprune.structure.base import BelowLeast

    try:
        found, least = trained.within(share), False
    except BelowLeast as error:
        found, least = trained.within(error.least), True
    if _prefix_only(bench):
        *before, last = found.plan.blocks
        found = found._replace(plan=replace(found.plan, blocks=(*before, replace(last, patches=0))))
    return found, least


def _measured(bench: Bench, found: Learned, table: LatencyTable, number: int, folder: Path) -> tuple[Row, Row]:
    """The dense model and what was taken, timed in one interleave; as predicted where nothing is to be measured."""
    from vitprune.search.landing import Measured, Row

    from .choose import measure_counts

    plans = [dense_counts(bench), _counts(found.plan, found.model)]
    points = [_point(counts, table, found.checks[-1].loss * bool(place)) for place, counts in enumerate(plans)]
    if bench.profile.search.landings:
        times = measure_counts(bench, plans, None, folder / "candidates")
    else:
        times = [Measured(*(point.predicted_ms,) * 3) for point in points]
    dense, row = (Row(number, point, ms) for point, ms in zip(points, times, strict=True))
    return dense, row


def _status(bench: Bench, taken: _Taken, plans: int) -> tuple[str, str]:
    """What a search says of a plan, one of so many that were taken."""
    if taken.share <= 1:
        landed = bench.profile.search.landings
        how = "and measured" if landed else "and predicted by the latency table, not measured"
        return "under", f"learned by {bench.profile.prune.learned.method}, {how}"
    took = f"{taken.row.measured.ms:.4g} ms of a budget of {taken.budget_ms:.4g} ms"
    took = f"the fastest of {plans} plans that were taken from what was learned takes {took}"
    return ("unreachable", f"{took}, and no less may be left") if taken.least else ("over", took)


def _point(counts: Counts, table: LatencyTable, loss: float) -> Any:
    from vitprune.search.frontier import Point

    ms = table.predict_ms(counts)
    return Point(ms, ms, loss, counts, None)


def _rows(points: list[Any]) -> list[dict[str, Any]]:
    from vitprune.search.frontier import to_rows

    return to_rows(points)


def _table(bench: Bench) -> LatencyTable:
    from vitprune.search.latency import LatencyTable

    return LatencyTable.from_dict(bench.json("measure", "latency_table.json"))


def _counts(plan: Plan, model: Vit) -> Counts:
    """What ``plan`` keeps of ``model``; dims of heads where some of them go."""
    from vitprune.search.counts import Counts

    heads, mlp = ([len(getattr(block, name)) for block in plan.blocks] for name in ("heads", "mlp"))
    patches = plan.patches_after()
    if not any(block.qk or block.v for block in plan.blocks):
        return Counts(tuple(heads), tuple(mlp), tuple(patches))
    dims = [
        tuple(
            (len(kept[0]) if (kept := getattr(block, name)) else size) if block.heads else 0
            for block, size in zip(plan.blocks, whole, strict=True)
        )
        for name, whole in (
            ("qk", [b.qk_dim for b in model.config.blocks]),
            ("v", [b.v_dim for b in model.config.blocks]),
        )
    ]
    return Counts(tuple(heads), tuple(mlp), tuple(patches), *dims)


def _prefix_only(bench: Bench) -> bool:
    """Whether the last block is to be computed for the prefix tokens alone."""
    return 0 in sizes(bench).patches
