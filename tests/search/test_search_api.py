from __future__ import annotations

import subprocess
import sys

import pytest
from tiny import images, tiny_vit

from vitprune import search
from vitprune.model.vit import fingerprint
from vitprune.surgery import prune
from vitprune.tokens.evit import EViT
from vitprune.tokens.tome import ToMe


def test_every_public_name_is_there():
    assert sorted(search.__all__) == sorted(search._HOME)
    for name in search.__all__:
        assert getattr(search, name) is not None
    with pytest.raises(AttributeError, match=r"vitprune\.search has no 'sovle'"):
        search.sovle  # noqa: B018


def test_all_but_the_measuring_of_losses_works_without_torch():
    names = [name for name in search.__all__ if search._HOME[name] != "losses"]
    program = f"""
import sys
sys.modules["torch"] = sys.modules["timm"] = None  # importing them fails
from vitprune import search
for name in {names}:
    getattr(search, name)
blocks = [[search.Stay([[search.Choice(0.0, 2.0, "all"), search.Choice(0.5, 1.0, "half")]])] for _ in range(3)]
print(search.solve(blocks, [0.5], [5.6]).best(5.6).loss)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "0.5", done.stderr


def made_up_table(model, sizes):
    """Times that grow with the work."""
    full = model.config.patches
    tokens = (full, *(n for n in sizes.patches if n != full))
    grid = search.Levels(model.config.prefix, tokens, sizes.heads[:-1], sizes.mlp[:-1], 4096.0, 256.0)
    attn = {(n, h): 0.01 + 1e-3 * n * h for n in tokens for h in grid.heads}
    mlp = {(n, m): 0.01 + 1e-4 * n * m for n in tokens for m in grid.mlp}
    steps = dict.fromkeys(grid.steps(), 0.01)
    head = dict.fromkeys(tokens, 0.02)
    pieces = search.Pieces(attn, mlp, 0.1, head, attn, {"evit": steps, "tome": steps})
    return search.LatencyTable.fill(search.Circumstances({}, "none", "fp32", 1, None, (28, 28), "tiny"), grid, pieces)


@pytest.mark.parametrize(("name", "reducer"), [("evit", EViT), ("tome", ToMe)])
def test_the_steps_of_the_docstring_lead_from_a_model_to_a_really_smaller_one(name, reducer):
    model, pictures = tiny_vit(depth=3), images(8)
    method = search.TokenMethod.of(name, reducer)
    sizes = search.Sizes(search.multiples(4, 1), search.multiples(64, 16), search.ladder(49, 5, 12))
    losses, rankings = search.measure_losses(model, pictures, sizes, criterion="magnitude", token_method=name, probes=4)
    problem = search.Problem(made_up_table(model, sizes), losses, method, sizes)
    dense_ms = problem.predict_ms(problem.dense())
    plans = problem.solve([dense_ms / 3, dense_ms])
    evaluate = search.Evaluator(model, rankings, pictures, token_method=name)
    # every plan of the frontier can be evaluated: the search asks for nothing that surgery cannot make
    assert all(loss >= 0 for loss in evaluate([point.counts for point in plans.points(12)]))
    refined = search.refine(problem, dense_ms / 2, evaluate, search.Effort(evaluations=8))
    assert refined.winner.true_loss <= refined.unrefined.true_loss
    counts = refined.winner.point.counts
    assert problem.predict_ms(counts) <= dense_ms / 2
    plan = rankings.plan(fingerprint(model), counts.heads, counts.mlp, counts.patches_out(49), patches=49, reducer=name)
    slim = prune(model, plan, rankings.weights(counts.heads, counts.mlp))
    assert slim(pictures).shape == (8, 10)
    assert sum(p.numel() for p in slim.parameters()) <= sum(p.numel() for p in model.parameters())
