import math

import pytest
import torch

from framework import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def rms_norm_by_definition(x, gamma, epsilon):
    """One row after the other in double precision."""
    y, rstd = [], []
    for row in x.double().flatten(0, -2).tolist():
        scale = 1 / math.sqrt(sum(value * value for value in row) / len(row) + epsilon)
        rstd.append(scale)
        y.append([value * scale * weight for value, weight in zip(row, gamma.double().tolist(), strict=True)])
    return torch.tensor(y, dtype=torch.float64).view(x.shape), torch.tensor(rstd, dtype=torch.float64)


def assert_within_one_rounding(actual, expected, dtype):
    """At most the rounding of the result to its dtype (half a step, plus fp32 arithmetic)."""
    assert actual.dtype is dtype
    error = (actual.double() - expected).abs()
    assert bool((error <= TOLERANCE[dtype] * expected.abs() + 1e-6).all()), error.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (1, 4, 3, 96)])
def test_rms_norm_rounds_once(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype) * 3
    gamma = torch.randn(96, generator=generator).to(dtype)
    y, rstd = ops.npu_rms_norm(x, gamma, 1e-5)
    expected, expected_rstd = rms_norm_by_definition(x, gamma, 1e-5)
    assert_within_one_rounding(y, expected, dtype)
    assert rstd.shape == (*shape[:-1], 1)
    assert rstd.dtype is torch.float32
    torch.testing.assert_close(rstd.flatten().double(), expected_rstd, rtol=1e-5, atol=0)


def test_epsilon_is_added_to_the_mean_square_and_defaults_to_1e_6():
    x = torch.full((2, 32), 1e-3)
    y, _ = ops.npu_rms_norm(x, torch.ones(32))
    torch.testing.assert_close(y, torch.full((2, 32), 1e-3 / math.sqrt(2e-6)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_equals_the_same_row_in_a_batch(dtype):
    """One row takes the path with the fewest calls."""
    x = torch.randn(7, 576, generator=torch.Generator().manual_seed(1)).to(dtype)
    gamma = torch.randn(576, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole, rstd = ops.npu_rms_norm(x, gamma, 1e-5)
    for row in range(7):
        y, own = ops.npu_rms_norm(x[row : row + 1], gamma, 1e-5)
        # Each is rounded once; near a tie the two may fall on neighbouring values.
        torch.testing.assert_close(y, whole[row : row + 1], rtol=2 * TOLERANCE[dtype], atol=1e-6)
        torch.testing.assert_close(own, rstd[row : row + 1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
def test_add_rms_norm_is_the_norm_of_the_sum_and_the_sum(rows, dtype):
    generator = torch.Generator().manual_seed(3)
    x1, x2 = (torch.randn(rows, 64, generator=generator).to(dtype) for _ in range(2))
    gamma = torch.randn(64, generator=generator).to(dtype)
    y, rstd, total = ops.npu_add_rms_norm(x1, x2, gamma, 1e-6)
    expected_total = (x1.double() + x2.double()).to(dtype)
    assert torch.equal(total, expected_total)
    expected, expected_rstd = rms_norm_by_definition(expected_total, gamma, 1e-6)
    assert_within_one_rounding(y, expected, dtype)
    torch.testing.assert_close(rstd.flatten().double(), expected_rstd, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
def test_gemma_rms_norm_multiplies_by_one_plus_gamma(rows, dtype):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    gamma = torch.randn(64, generator=generator).to(dtype)
    y, _ = ops.npu_gemma_rms_norm(x, gamma, 1e-6)
    expected, _ = rms_norm_by_definition(x, 1 + gamma.double(), 1e-6)
    assert_within_one_rounding(y, expected, dtype)


def test_gamma_may_span_several_trailing_dimensions():
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(5))
    gamma = torch.randn(4, 8, generator=torch.Generator().manual_seed(6))
    y, rstd = ops.npu_rms_norm(x, gamma, 1e-6)
    expected, _ = rms_norm_by_definition(x.flatten(1), gamma.flatten(), 1e-6)
    torch.testing.assert_close(y.flatten(1).double(), expected, rtol=1e-5, atol=1e-6)
    assert rstd.shape == (3, 1, 1)
