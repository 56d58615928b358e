from __future__ import annotations

import pytest
import torch
from tiny import images, tiny_vit
from torch.nn import functional as F

from vitprune import statistics
from vitprune.errors import InputError
from vitprune.model.vit import fingerprint
from vitprune.search.counts import Counts
from vitprune.search.losses import Evaluator, Sizes, evaluate_counts, kl_to_dense, measure_losses
from vitprune.surgery import prune

SIZES = Sizes((4, 3, 2, 1, 0), (64, 48, 32, 0), (40, 30, 20))
PLANS = [
    Counts((4, 4, 4), (64, 64, 64), (49, 49, 49)),
    Counts((4, 3, 4), (48, 32, 0), (40, 30, 30)),
    Counts((4, 3, 1), (48, 32, 64), (40, 30, 30)),  # agrees with the one before in two blocks
    Counts((4, 0, 2), (64, 0, 32), (30, 30, 20)),
]


@pytest.fixture(scope="module", params=["evit", "tome"])
def ranked(request):
    model, pictures = tiny_vit(depth=3), images(10)
    _, rankings = measure_losses(model, pictures, SIZES, token_method=request.param)
    return model, pictures, rankings, request.param


@torch.no_grad()
def by_surgery(model, pictures, rankings, plan, method) -> float:
    made = rankings.plan(fingerprint(model), plan.heads, plan.mlp, plan.patches_out(49), patches=49, reducer=method)
    slim = prune(model, made, rankings.weights(plan.heads, plan.mlp))
    dense, changed = model(pictures).log_softmax(-1), slim(pictures).log_softmax(-1)
    return float(F.kl_div(changed, dense, log_target=True, reduction="batchmean"))


def test_losses_are_those_of_the_models_that_surgery_makes(ranked, monkeypatch):
    model, pictures, rankings, method = ranked
    monkeypatch.setattr(statistics, "ELEMENTS_PER_BATCH", 12_000)  # batches of three images
    losses = evaluate_counts(model, rankings, PLANS, pictures, token_method=method)
    assert losses[0] == pytest.approx(0, abs=1e-10)
    for plan, loss in zip(PLANS[1:], losses[1:], strict=True):
        assert loss == pytest.approx(by_surgery(model, pictures, rankings, plan, method), rel=1e-3)  # fp32 logits


def test_a_second_call_gives_what_the_first_gave_and_the_model_is_as_it_was(ranked):
    model, pictures, rankings, method = ranked
    before = fingerprint(model)
    evaluator = Evaluator(model, rankings, pictures, token_method=method)
    losses = evaluator(PLANS)
    assert evaluator(PLANS[::-1]) == losses[::-1]
    assert evaluator([]) == []
    assert fingerprint(model) == before
    assert all(block.keep is None and block.reducer is None for block in model.blocks)


def test_plans_that_agree_in_their_first_blocks_run_these_once(ranked):
    model, pictures, rankings, method = ranked
    evaluator = Evaluator(model, rankings, pictures, token_method=method)
    ran = []
    handles = [b.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, b in enumerate(model.blocks)]
    evaluator(PLANS[1:3])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 2]


def test_plans_that_cannot_be_are_refused(ranked):
    model, pictures, rankings, method = ranked
    with pytest.raises(InputError, match="plan 0 leaves 20 patch tokens at block 1, but without attention it cannot"):
        evaluate_counts(model, rankings, [Counts((4, 0, 4), (64,) * 3, (49, 20, 20))], pictures, token_method=method)
    with pytest.raises(InputError, match="plan 0 leaves 20 patch tokens at block 1, but no token method was named"):
        evaluate_counts(model, rankings, [Counts((4, 4, 4), (64,) * 3, (49, 20, 20))], pictures)
    with pytest.raises(InputError, match="plan 0 has 1 blocks, the model has 3"):
        evaluate_counts(model, rankings, [Counts((4,), (64,), (49,))], pictures)


def test_kl_to_dense_of_two_classes_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)
    dense, changed = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log(), torch.tensor([[1.0, 1.0], [1.0, 1.0]]).log()
    found = kl_to_dense(dense, changed)
    torch.testing.assert_close(found, torch.tensor([0.13081203594113694, 0.0], dtype=torch.float64))
