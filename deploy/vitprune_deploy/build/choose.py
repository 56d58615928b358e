"""The stages that decide what stays: latencies of the parts, losses of single changes, and the search over both."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..files import canonical_sha256, sha256_file
from ..remote.watch import watched
from . import learned, runtimes, several, sparse
from .bench import RANKINGS, Bench, write_json
from .contest import Contest, Entry, losses_file, target
from .embedding import measure_whole, of_dense, searched_share
from .make import export_to_time, served_dialect
from .sizes import dense_counts, sizes

if TYPE_CHECKING:
    from vitprune.search.counts import Counts, TokenMethod
    from vitprune.search.landing import Landed, Measured
    from vitprune.search.problem import Problem

    from ..latency.table import Request

FASTEST_SPEEDUP = 8.0  # the frontier of frontier.json goes down to this, or to the fastest plan there is
LANDING_SHARE = 0.25  # of measure.max_seconds, for one round of landing


def table_request(bench: Bench) -> Request:
    """What the latency table must cover."""
    from ..latency.table import Request

    profile, allowed = bench.profile, sizes(bench)
    limit = profile.measure.max_seconds
    return Request(
        batch=profile.batch,
        threads=profile.budget.threads,
        tokens=allowed.patches,
        heads=allowed.heads,
        mlp=allowed.mlp,
        qk=allowed.qk,
        v=allowed.v,
        methods=tuple(bench.token_methods()),
        runtime=profile.runtime.name,
        precision=profile.runtime.precision,
        told=profile.tells_precision,
        ort_attention=served_dialect(profile, profile.graph_precision)["ort_attention"],
        seed=profile.seed,
        **({} if limit is None else {"seconds": limit}),
    )


def table_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``measure`` depends on besides the model: the device, and what is asked of it."""
    from ..latency.table import table_key

    given = bench.profile.measure.table
    recorded = sha256_file(Path(given)) if given else None
    return {**table_key(bench.base_config, table_request(bench), runtimes.device(bench.profile)), "recorded": recorded}


def measure(bench: Bench, folder: Path) -> None:
    """Measure the table on this device, or take the recorded one that the profile names, if it belongs here."""
    from ..latency.table import accept, measure_table, read_table

    request, given = table_request(bench), bench.profile.measure.table
    measure_whole(bench, folder)
    if given:
        table = read_table(Path(given))
        for warning in accept(table, bench.base.config, request, runtimes.device(bench.profile)):
            bench.shows.say(f"warning: {warning}")
        write_json(folder / "latency_table.json", table.to_dict())
        write_json(folder / "wholes.json", [])
        return
    with watched(runtimes.on(bench.profile), bench.shows.say) as machine:
        found = measure_table(
            bench.base, request, runtimes.loader(bench.profile), folder / "pieces", progress=bench.shows.progress
        )
    shaky = [whole for whole in found.wholes if whole.measurement.unstable]
    if shaky:
        bench.shows.say(
            f"warning: {len(shaky)} of {len(found.wholes)} whole models could not be measured exactly, other processes "
            "are at work here; the search measures its candidates, but predictions may be off"
        )
    write_json(folder / "latency_table.json", found.table.to_dict())
    write_json(folder / "wholes.json", [[whole.counts.to_dict(), asdict(whole.measurement)] for whole in found.wholes])
    write_json(folder / "pieces.json", [asdict(piece) for piece in found.pieces])
    write_json(folder / "machine.json", machine)
    shutil.rmtree(folder / "pieces")


def loss_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``losses`` depends on besides the model and the images."""
    return {
        "sizes": {name: list(v) for name, v in vars(sizes(bench)).items() if v or name not in ("qk", "v")},
        "criterion": bench.profile.prune.criterion,
        "probes": bench.profile.search.probe_images,
        "holdout": bench.profile.search.holdout_images,
        "methods": [method.judged_as for method in bench.token_methods()],
        **({"learned": True} if bench.profile.prune.learned.method else {}),
    }


def survey_losses(bench: Bench, folder: Path) -> None:
    """Measure what each single change costs: of heads and hidden units once, of tokens with each method in question."""
    from vitprune.search.losses import measure_losses, with_token_method

    if bench.profile.prune.learned.method:  # nobody asks for them
        (folder / RANKINGS).mkdir()
        write_json(folder / RANKINGS / "rankings.json", {})
        return
    names = list(dict.fromkeys(method.judged_as for method in bench.token_methods()))
    allowed, probes, rounds = sizes(bench), bench.profile.search.probe_images, max(1, len(names))
    first, _ = measure_losses(
        bench.base,
        bench.search_images,
        allowed,
        criterion=bench.profile.prune.criterion,
        token_method=names[0] if names else None,
        method_weights=bench.method_weights(names[0]) if names else None,
        probes=probes,
        progress=_nth(bench, 0, rounds),
        store=folder / RANKINGS,
    )
    others = [
        with_token_method(
            first,
            name,
            bench.base,
            bench.search_images,
            allowed,
            method_weights=bench.method_weights(name),
            probes=probes,
            progress=_nth(bench, number, rounds),
        )
        for number, name in enumerate(names[1:], start=1)
    ]
    for table in (first, *others):
        write_json(folder / losses_file(table.token_method), table.to_dict())


def _nth(bench: Bench, number: int, of: int) -> Any:
    """Progress of the ``number``-th of several equal parts."""
    return lambda done, total, what: bench.shows.progress(number * total + done, of * total, what)


def search_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``search`` depends on besides earlier stages."""
    profile = bench.profile
    return {
        "budget": profile.budget.model_dump(mode="json"),
        "search": profile.search.model_dump(mode="json"),
        "measure": profile.measure.model_dump(mode="json"),
        "token_blocks": profile.prune.tokens.blocks,
        "allocation": profile.prune.allocation,
        "schedule": bench.schedule(),
        "weights": profile.prune.weights.model_dump(mode="json", include={"pattern", "where"})
        if profile.prune.weights.enabled
        else None,
        "seed": profile.seed,
        "others": [sha256_file(one.folders["measure"] / "latency_table.json") for one in bench.others],
        "plan": sha256_file(bench.lead.folders["search"] / "plan.yaml") if bench.lead else None,
    }


def search(bench: Bench, folder: Path) -> None:
    """Find the plan, first on predicted times with each token method, then on measured ones with the best of them."""
    from vitprune.model.vit import fingerprint

    if bench.lead:
        _follow(bench, bench.lead, folder)
        return
    if bench.profile.prune.learned.method:
        learned.search(bench, folder)
        return
    methods: list[TokenMethod | None] = [*bench.token_methods()] or [None]
    contest = [Entry(bench, method).search() for method in methods]
    best = min(contest, key=lambda one: one.held_out_loss)
    kernels = sparse.search_kernels(bench, folder)
    landed = _land(bench, best, folder)
    method, counts = best.method.name if best.method else None, landed.chosen.point.counts
    plan = best.rankings.plan(
        fingerprint(bench.base),
        counts.heads,
        counts.mlp,
        counts.patches_out(bench.dense.config.patches),
        patches=bench.dense.config.patches,
        reducer=method,
        kept_qk=counts.qk,
        kept_v=counts.v,
    )
    plan = sparse.with_zeros(of_dense(bench, plan), bench.profile)
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan.to_dict(), default_flow_style=None, sort_keys=False))
    write_json(folder / "frontier.json", frontier(best.problem.on(landed.table)))
    write_json(folder / "search.json", _account(contest, best, landed, searched_share(bench)) | {"sparse": kernels})


def frontier(problem: Problem) -> list[dict[str, Any]]:
    """The best plan for every budget from the dense model's time down, as rows."""
    from vitprune.search.frontier import to_rows

    dense_ms = problem.predict_ms(problem.dense())
    return to_rows(problem.solve([dense_ms / FASTEST_SPEEDUP, dense_ms]).points())


def _land(bench: Bench, best: Contest, folder: Path) -> Landed:
    """Measure plans near the budget until one lands under it, or trust the table where the profile says so."""
    from vitprune.search.landing import Approach, land

    finalists = [one.point for one in best.refined.finalists] if best.refined else []
    if bench.profile.search.landings == 0:
        return _trusted(bench, best)
    candidates = folder / "candidates"

    def on_one(device: Bench, plans: list[Counts]) -> list[Measured]:
        runtime = device.profile.runtime
        return measure_counts(device, plans, best.method, candidates / f"{runtime.name}-{runtime.precision}")

    landed = land(
        best.problem,
        target(bench),
        lambda plans: several.measured_on_all(bench, plans, on_one),
        Approach(rounds=bench.profile.search.landings),
        first=finalists,
        anchors=several.anchors(bench),
        true_loss=best.held_out,
        refine=best.refine_again,
    )
    shutil.rmtree(candidates, ignore_errors=True)
    return landed


def measure_counts(bench: Bench, plans: list[Counts], method: TokenMethod | None, folder: Path) -> list[Measured]:
    """The time of each plan, interleaved, as it would be shipped; their files stay in ``folder`` for the next call."""
    from vitprune.search.landing import Measured

    from ..latency.wholes import measure_models, slim

    profile, paths = bench.profile, {}
    folder.mkdir(parents=True, exist_ok=True)
    kernels, dense = sparse.search_kernels(bench, folder), dense_counts(bench)
    for number, counts in enumerate(plans):
        name = f"plan-{canonical_sha256(counts.to_dict())[:12]}"
        bench.shows.progress(number, 2 * len(plans), "export candidates")
        model = slim(bench.base, counts, method)
        if kernels and kernels["used"] and counts != dense:  # the budget's measure has no zeros
            model = sparse.stand_in(model, profile)
        paths[name] = export_to_time(bench, model, folder / f"{name}.onnx", like=bench.base)
    limit = profile.measure.max_seconds
    found = measure_models(
        paths,
        runtimes.loader(profile),
        batch=profile.batch,
        image_size=bench.dense.config.image_size,
        relative_half_width=profile.measure.relative_half_width,
        max_seconds=math.inf if limit is None else LANDING_SHARE * limit,
        seed=profile.seed,
        progress=lambda done, total, what: bench.shows.progress(total + done, 2 * total, f"time {what}"),
    )
    return [Measured(one.value_ms, one.low_ms, one.high_ms) for one in found]


def _follow(bench: Bench, lead: Bench, folder: Path) -> None:
    """Take the plan that was found for all devices, and measure it on this one."""
    from vitprune.search.counts import Counts
    from vitprune.search.landing import Measured

    for name in ("plan.yaml", "frontier.json"):
        shutil.copyfile(lead.folders["search"] / name, folder / name)
    found = lead.json("search", "search.json")
    counts = Counts.from_dict(found["chosen"]["counts"])
    method = next((one for one in bench.token_methods() if one.name == found["method"]), None)
    problem = Entry(bench, method).problem
    said = [problem.predict_ms(one) for one in (problem.dense(), counts)]
    if bench.profile.search.landings:
        dense, chosen = measure_counts(bench, [problem.dense(), counts], method, folder / "candidates")
        shutil.rmtree(folder / "candidates")
    else:
        dense, chosen = (Measured(ms, ms, ms) for ms in said)
    budget_ms, share = several.budget_ms(bench, dense.ms), searched_share(bench)
    status = "under" if chosen.ms <= budget_ms else "over"
    row = {"predicted_ms": said[1], "measured_ms": chosen.ms, "low_ms": chosen.low_ms, "high_ms": chosen.high_ms}
    here = {
        "status": status,
        "reason": f"the plan that was found for all devices, with {lead.profile.name} first",
        "budget_ms": budget_ms,
        "dense_ms": dense.ms / share,
        "dense_predicted_ms": said[0] / share,
        "chosen": {**found["chosen"], **row},
        "measured": [{**found["chosen"], **row}] if bench.profile.search.landings else [],
        "table": problem.table.to_dict(),
        "sparse": sparse.search_kernels(bench, folder),
    }
    write_json(folder / "search.json", {**found, **here})


def _trusted(bench: Bench, best: Contest) -> Landed:
    """The refinement's winner, by the table's word alone."""
    from vitprune.search.landing import Landed, Measured, Row

    dense_ms = best.problem.predict_ms(best.problem.dense())
    budget_ms = target(bench).budget_ms(dense_ms)
    point = best.refined.winner.point if best.refined else best.problem.solve([budget_ms]).fastest
    said = Measured(point.predicted_ms, point.predicted_ms, point.predicted_ms)
    status: Literal["under", "unreachable"] = "under" if best.refined else "unreachable"
    reason = "search.landings is 0: predicted by the latency table, not measured"
    return Landed(status, Row(0, point, said), budget_ms, dense_ms, (), best.problem.table, reason)


def _account(contest: Sequence[Contest], best: Contest, landed: Landed, share: float) -> dict[str, Any]:
    """What the search did, for the report. ``share``: the searched model's time over the dense one's."""
    tried = best.refined.tried if best.refined else ()
    correlation = best.refined.rank_correlation if best.refined else math.nan
    return {
        "method": best.method.name if best.method else None,
        "methods": {
            one.method.name if one.method else "none": one.held_out_loss if one.refined else None for one in contest
        },
        "status": landed.status,
        "reason": landed.reason,
        "budget_ms": landed.budget_ms,
        "dense_ms": landed.dense_ms / share,
        "dense_predicted_ms": landed.table.predict_ms(best.problem.dense()) / share,
        "chosen": landed.chosen.to_dict(),
        "measured": [row.to_dict() for row in landed.rows],
        "evaluations": [[one.sum_loss, one.true_loss] for one in tried],
        "rank_correlation": None if math.isnan(correlation) else correlation,
        "held_out_loss": best.held_out_loss if best.refined else None,
        "table": landed.table.to_dict(),
    }
