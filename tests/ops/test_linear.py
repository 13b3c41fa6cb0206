"""Rows added for oneDNN's sake: few numbers of rows in all, and nothing of them in the result."""

import sys

import pytest
import torch

from framework.ops import linear as linear_module
from framework.ops.linear import linear, of_few_heights


def test_all_numbers_of_rows_become_few_and_none_grows_by_more_than_a_quarter():
    heights = {rows: len(of_few_heights(torch.empty(rows, 1))) for rows in range(1, 513)}
    assert len(set(heights.values())) <= 32
    assert all(rows <= height <= 1.25 * rows for rows, height in heights.items())
    assert [heights[rows] for rows in (1, 8, 128, 320, 512)] == [1, 8, 128, 320, 512]


@pytest.mark.parametrize("bfloat16_rows", [0, 31, sys.maxsize])  # none native, Intel without AMX, the others
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 9, 33, 100])
def test_rows_are_those_of_the_exact_product(rows, bfloat16_rows, monkeypatch):
    monkeypatch.setattr(linear_module, "bfloat16_rows", lambda: bfloat16_rows)
    draw = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 64, generator=draw).bfloat16() for n in (rows, 48))
    exact = x.double() @ weight.double().t()
    found = linear(x, weight)
    assert found.shape == exact.shape
    # half a step of bf16, and what fp32 sums of 64 products may be off
    assert torch.all((found.double() - exact).abs() <= exact.abs() * 2**-8 + 64 * 2**-20)
