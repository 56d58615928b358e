from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from vitprune.model.resample import resample_grid, resample_matrix

CPU = torch.device("cpu")


@pytest.mark.parametrize("new", [(7, 5), (14, 10), (3, 9), (4, 2), (1, 1), (30, 31)])
def test_agrees_with_timms_antialiased_resampling(new):
    positions = torch.randn(1, 35, 8, generator=torch.Generator().manual_seed(0))
    want = resample_abs_pos_embed(positions, new_size=list(new), old_size=[7, 5], num_prefix_tokens=0)
    # fp32, values of about 1; the two sum up to 35 products in another order
    torch.testing.assert_close(resample_grid(positions, (7, 5), new), want, rtol=0, atol=5e-6)


def test_halving_four_positions_weighs_them_by_the_widened_kernel():
    # distances of the inputs from the first output's centre, in units of the step 2: 0.25, 0.25, 0.75, 1.25
    a, b, c = ((1.5 * x - 2.5) * x * x + 1 if x < 1 else ((-0.5 * x + 2.5) * x - 4) * x + 2 for x in (0.25, 0.75, 1.25))
    row = torch.tensor([a, a, b, c]) / (2 * a + b + c)
    torch.testing.assert_close(resample_matrix(4, 2, CPU), torch.stack([row, row.flip(0)]), rtol=0, atol=1e-6)


def test_the_same_grid_stays_bit_for_bit():
    assert torch.equal(resample_matrix(14, 14, CPU), torch.eye(14))
    positions = torch.randn(1, 14 * 9, 8)
    assert torch.equal(resample_grid(positions, (14, 9), (14, 9)), positions)


def test_keeps_the_type_of_the_embedding():
    assert resample_grid(torch.randn(1, 16, 8).double(), (4, 4), (6, 6)).dtype == torch.float64
    assert resample_grid(torch.randn(1, 16, 8).bfloat16(), (4, 4), (6, 6)).dtype == torch.bfloat16
