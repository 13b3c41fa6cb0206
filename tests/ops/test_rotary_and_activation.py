import math

import pytest
import torch

from framework import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_rounded_once(actual, expected, dtype):
    assert actual.dtype is dtype
    error = (actual.double() - expected).abs()
    assert bool((error <= STEP[dtype] * expected.abs() + 3e-6).all()), error.max()


def rotated_by_definition(x, cos, sin, mode):
    """Each output from its own two inputs, in double precision."""
    x, cos, sin = x.double(), cos.double().expand(x.shape), sin.double().expand(x.shape)
    y = torch.empty_like(x)
    size = x.shape[-1]
    for i in range(size):
        if mode == "half":
            partner, sign = (i + size // 2, -1) if i < size // 2 else (i - size // 2, 1)
        else:
            partner, sign = (i + 1, -1) if i % 2 == 0 else (i - 1, 1)
        y[..., i] = x[..., i] * cos[..., i] + sign * x[..., partner] * sin[..., i]
    return y


@pytest.mark.parametrize("table_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rotary_mul_rotates_pairs_of_columns(tokens, mode, dtype, table_dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, 3, 16, generator=generator).to(dtype)
    cos, sin = (torch.randn(1, tokens, 1, 16, generator=generator).to(table_dtype or dtype) for _ in range(2))
    y = ops.npu_rotary_mul(x, cos, sin, mode)
    assert_rounded_once(y, rotated_by_definition(x, cos, sin, mode), dtype)


def test_rotary_mul_takes_a_slice_of_a_fused_projection():
    qkv = torch.randn(4, 5 * 16, generator=torch.Generator().manual_seed(1))
    x = qkv[:, 16:48].view(1, 4, 2, 16)
    cos, sin = torch.randn(2, 1, 4, 1, 16, generator=torch.Generator().manual_seed(2))
    assert_rounded_once(ops.npu_rotary_mul(x, cos, sin), rotated_by_definition(x, cos, sin, "half"), torch.float32)
    assert torch.equal(qkv[:, 16:48].view(1, 4, 2, 16), x)


def test_rotary_mul_refuses_what_it_does_not_compute():
    x = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match="quarter"):
        ops.npu_rotary_mul(x, x, x, "quarter")
    with pytest.raises(NotImplementedError, match="rotate"):
        ops.npu_rotary_mul(x, x, x, "half", torch.eye(4))


def elementwise(function, x):
    return torch.tensor([function(value) for value in x.double().flatten().tolist()], dtype=torch.float64).view(x.shape)


def silu(value):
    return value / (1 + math.exp(-value))


def gelu_tanh(value):
    return 0.5 * value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def gelu_erf(value):
    return 0.5 * value * (1 + math.erf(value / math.sqrt(2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6])
def test_swiglu_is_silu_of_the_first_half_times_the_second_rounded_once(rows, dtype):
    x = (torch.randn(rows, 48, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)
    before = x.clone()
    y = ops.npu_swiglu(x)
    assert_rounded_once(y, elementwise(silu, x[:, :24]) * x[:, 24:].double(), dtype)
    assert torch.equal(x, before)


def test_swiglu_halves_the_dimension_it_is_given():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(4))
    assert_rounded_once(ops.npu_swiglu(x, 0), elementwise(silu, x[:4]) * x[4:].double(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("approximate", "gelu"), [(1, gelu_tanh), (0, gelu_erf)])
def test_geglu_activates_the_right_half_unless_told_left(approximate, gelu, dtype):
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    first, second = x[:, :16], x[:, 16:]
    y, activated = ops.npu_geglu(x, -1, approximate)
    assert_rounded_once(y, first.double() * elementwise(gelu, second), dtype)
    assert_rounded_once(activated, elementwise(gelu, second), dtype)
    y, _ = ops.npu_geglu(x, -1, approximate, activate_left=True)
    assert_rounded_once(y, elementwise(gelu, first) * second.double(), dtype)


@pytest.mark.parametrize(("approximate", "gelu"), [("tanh", gelu_tanh), ("none", gelu_erf)])
def test_gelu_mul_activates_the_first_half(approximate, gelu):
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(6))
    y = ops.npu_gelu_mul(x, approximate=approximate)
    assert_rounded_once(y, elementwise(gelu, x[:, :16]) * x[:, 16:].double(), torch.float32)
