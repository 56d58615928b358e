"""CAIT's merging, as reconstructed: neighbours across, then down, and a grid after each."""

from __future__ import annotations

import pytest
import torch
from test_macs import deit_small
from tiny import tiny_config

from vitprune.errors import InputError, NotSupported
from vitprune.macs import macs
from vitprune.model.state import TokenState
from vitprune.schedules import counts
from vitprune.surgery import build
from vitprune.tokens.base import Place
from vitprune.tokens.cait import CAIT


def grid(rows: int, columns: int) -> TokenState:
    """Tokens whose two channels are their row and column, behind a class token."""
    places = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns)))
    return TokenState(torch.cat([torch.full((1, 2), 9.0), places])[None], 1, 16)


def test_a_square_is_merged_across_and_the_rest_down():
    reducer = CAIT(Place(dim=2, patches=16))
    across = reducer(grid(4, 4), None, 8)
    want = torch.cartesian_prod(torch.arange(4.0), torch.tensor([0.5, 2.5]))
    assert torch.equal(across.x[0, 1:], want)
    down = reducer(across, None, 4)
    assert down.x[0].tolist() == [[9, 9], [0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]


def test_an_odd_last_column_and_row_are_merged_with_themselves():
    reducer = CAIT(Place(dim=2, patches=9))
    across = reducer(grid(3, 3), None, 6)
    assert across.x[0, 1:].tolist() == [[r, c] for r in range(3) for c in (0.5, 2)]
    assert reducer(across, None, 4).x[0, 1:].tolist() == [[0.5, 0.5], [0.5, 2], [2, 0.5], [2, 2]]


def test_a_trained_merge_reads_both_neighbours():
    reducer = CAIT(Place(dim=2, patches=4))
    with torch.no_grad():
        reducer.merge.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]]))  # the first's row, the second's column
    assert reducer(grid(2, 2), None, 2).x[0, 1:].tolist() == [[0, 1], [1, 1]]


def test_counts_and_costs_are_those_of_the_assumed_places():
    assert [1 + n for n in counts("cait", "assumed", 12, 196, 1)] == [197] * 4 + [99] * 4 + [50] * 4
    assert macs(deit_small({4: 98, 8: 49}, "cait")) == pytest.approx(2.664e9, rel=0.02)  # without the Linear layers


def test_other_counts_and_other_grids_are_one_sentence():
    with pytest.raises(
        InputError, match="cait can leave 98 or 196 patch tokens of the 196 that enter block 4, not 100"
    ):
        counts("cait", {4: 100}, 12, 196, 1)
    with pytest.raises(
        NotSupported, match="cait merges neighbours of a square grid, and this model's patches are 7 x 8"
    ):
        build(tiny_config(reducer="cait", keep={0: 28}, image_size=(28, 32)))
