"""Zero-TPrune: PageRank on the attention graph, and what goes for being alike."""

from __future__ import annotations

import torch

from vitprune.model.state import AttentionView, TokenState
from vitprune.tokens.base import Place
from vitprune.tokens.zero_tprune import ZeroTPrune


def view(votes: torch.Tensor, keys: torch.Tensor) -> AttentionView:
    """Attention of one head whose rows are ``votes`` [N, N], with ``keys`` [N, D] for the likeness."""

    class Fixed(AttentionView):
        def all_rows(self):
            return votes[None, None]

    return Fixed(keys[None, None], keys[None, None], keys[None, None], 1.0, None)


VOTES = torch.tensor([[0.2, 0.4, 0.1, 0.2, 0.1],
                      [0.1, 0.5, 0.1, 0.2, 0.1],
                      [0.0, 0.5, 0.2, 0.2, 0.1],
                      [0.1, 0.4, 0.1, 0.3, 0.1],
                      [0.2, 0.3, 0.2, 0.2, 0.1]])  # fmt: skip


def test_one_iteration_gives_what_is_voted_for_on_average():
    late = ZeroTPrune(Place(11, 12))
    keys = torch.eye(5)
    torch.testing.assert_close(late._importance(view(VOTES, keys))[0], VOTES.mean(0))


def test_many_iterations_give_the_stationary_ranks():
    early = ZeroTPrune(Place(0, 12))
    rank = early._importance(view(VOTES, torch.eye(5)))[0]
    torch.testing.assert_close(rank @ VOTES, rank, rtol=1e-5, atol=1e-6)


def test_the_like_go_first_and_then_the_least_important():
    state = TokenState(torch.arange(5.0)[None, :, None], 1, 4)
    # means of the votes: patches 1: 0.42, 3: 0.22, 2: 0.14, 4: 0.10; the second half of them is 2 and 4
    keys = torch.tensor([[1.0, 0], [1, 0], [0.9, 0.1], [0, -1], [0, 1]])  # 2 is like 1; 4 is like none
    late = ZeroTPrune(Place(11, 12))
    assert late(state, view(VOTES, keys), 3).x.flatten().tolist() == [0, 1, 3, 2]  # one goes: the least important
    assert late(state, view(VOTES, keys), 2).x.flatten().tolist() == [0, 1, 3]  # 2 for its likeness, 4 after it
    assert late._unlike(keys[[1, 3, 2, 4]][None], 1)[0].tolist() == [0, 1, 3]
