from __future__ import annotations

import pytest

from vitprune.errors import InputError
from vitprune.search.counts import Counts, TokenMethod


def test_counts_survive_the_way_through_plain_lists():
    counts = Counts((6, 0, 4), (1536, 768, 0), (196, 196, 98))
    assert Counts.from_dict(counts.to_dict()) == counts


def test_patches_out_names_only_the_blocks_that_reduce():
    assert Counts((6, 6, 6, 6), (8, 8, 8, 8), (100, 70, 70, 49)).patches_out(196) == [100, 70, None, 49]
    assert Counts.dense([3, 3], [8, 8], 49).patches_out(49) == [None, None]


@pytest.mark.parametrize(
    ("plain", "why"),
    [
        ({"heads": [1], "mlp": [1]}, "KeyError 'patches'"),
        ({"heads": [1], "mlp": [1, 2], "patches": [4]}, "one entry per block"),
        ({"heads": [1.5], "mlp": [1], "patches": [4]}, "whole numbers"),
        ({"heads": [True], "mlp": [1], "patches": [4]}, "whole numbers"),
        ({"heads": 3, "mlp": [1], "patches": [4]}, "TypeError"),
        ({"heads": [-1], "mlp": [1], "patches": [4]}, "at least 0 heads"),
        ({"heads": [1, 1], "mlp": [1, 1], "patches": [4, 5]}, "block 1 of the counts leaves 5 patch tokens of 4"),
        ({"heads": [], "mlp": [], "patches": []}, "one entry per block"),
    ],
)
def test_garbage_is_refused_with_its_reason(plain, why):
    with pytest.raises(InputError, match=why):
        Counts.from_dict(plain)


def test_a_token_method_is_read_off_its_reducer_class():
    class Halving:
        where, proportional, needs_class_token, stand_in = "before", True, False, None

        grid, watches = False, True

        @staticmethod
        def fewest(patches, prefix):
            return patches // 2

        @staticmethod
        def reaches(patches, left, prefix):
            return patches // 2 <= left < patches

    method = TokenMethod.of("halving", Halving)
    assert method[:4] == ("halving", "before", True, False)
    assert method.fewest(49, 1) == 24
    assert method.judged_as == "halving"
    assert method.watches
