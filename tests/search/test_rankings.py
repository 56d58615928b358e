from __future__ import annotations

import pytest
import torch
from tiny import images, tiny_vit

from vitprune.criteria.base import Ranking
from vitprune.errors import DamagedFile, InputError
from vitprune.plan import BlockPlan, Plan
from vitprune.search.losses import Sizes, measure_losses
from vitprune.search.rankings import INDEX, Rankings, StoredWeights

SIZES = Sizes((4, 2, 0), (64, 32, 0))


def by_hand() -> Rankings:
    attn = Ranking(torch.tensor([2, 0, 1]), torch.linspace(0, 1, 4), {2: torch.ones(5, 2)})
    mlp = Ranking(torch.tensor([3, 1, 0, 2]), torch.linspace(0, 1, 5))
    return Rankings({(0, "attn"): attn, (0, "mlp"): mlp})


def test_a_plan_keeps_what_goes_last_in_ascending_order():
    plan = by_hand().plan("abc", [2], [3], [20], patches=49, reducer="evit")
    assert plan == Plan("abc", 49, "evit", (BlockPlan((0, 1), (0, 1, 2), 20),))


def test_weights_are_given_for_halves_that_lose_a_part():
    rankings = by_hand()
    assert set(rankings.weights([2], [3])) == {(0, "attn")}
    assert rankings.weights([3], [4]) == {}
    assert rankings.weights([0], [0]) == {}
    with pytest.raises(InputError, match="block 0 attn has compensated weights for 2 units, not for 1"):
        rankings.weights([1], [4])


def test_a_half_that_was_not_ranked_keeps_nothing():
    assert by_hand().kept(1, "mlp", 0) == ()
    with pytest.raises(InputError, match="block 1 has no mlp of which 3 units could be kept"):
        by_hand().kept(1, "mlp", 3)


@pytest.mark.parametrize("criterion", ["obs", "random"])
def test_stored_rankings_are_the_ones_that_would_have_been_kept_in_memory(tmp_path, criterion):
    model, pictures = tiny_vit(), images(4)
    table, memory = measure_losses(model, pictures, SIZES, criterion=criterion)
    stored_table, _ = measure_losses(model, pictures, SIZES, criterion=criterion, store=tmp_path)
    loaded = Rankings.load(tmp_path)
    assert stored_table == table
    assert loaded.halves.keys() == memory.halves.keys()
    for key, ranking in memory.halves.items():
        assert torch.equal(loaded.halves[key].order, ranking.order)
        assert torch.equal(loaded.halves[key].error, ranking.error)
        assert loaded.halves[key].weights.keys() == ranking.weights.keys()
    for key, weight in memory.weights([2, 2], [32, 64]).items():
        assert torch.equal(loaded.weights([2, 2], [32, 64])[key], weight)


def test_a_folder_that_was_not_finished_does_not_load(tmp_path):
    measure_losses(tiny_vit(), images(2), SIZES, store=tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(DamagedFile, match=r"rankings\.json is not an index of rankings"):
        Rankings.load(tmp_path)


def test_a_file_that_is_cut_off_is_named(tmp_path):
    measure_losses(tiny_vit(), images(2), SIZES, store=tmp_path)
    file = tmp_path / "01.mlp.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DamagedFile, match=r"01\.mlp\.safetensors is not a ranking"):
        Rankings.load(tmp_path)


def test_stored_weights_have_no_other_counts(tmp_path):
    measure_losses(tiny_vit(), images(2), SIZES, store=tmp_path)
    weights = StoredWeights(tmp_path / "00.attn.safetensors", [2])
    assert weights[2].shape == (32, 16)
    assert 3 not in weights
