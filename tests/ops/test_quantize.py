"""Integer activation quantization against literal numpy formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from framework import ops
from framework.ops.cpu import quantize

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
ROWS = arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.sampled_from([8, 16, 40])), elements=FLOATS)
QMAX = {"int8": (ops.INT8, 127), "int4": (ops.INT4, 7)}


def nibbles(packed):
    """int32 words to signed codes, by arithmetic on Python integers."""
    words = packed.reshape(-1).tolist()
    codes = [(word >> 4 * place) & 15 for word in words for place in range(8)]
    return np.array([code - 16 if code > 7 else code for code in codes]).reshape(*packed.shape[:-1], -1)


def codes_of(tensor):
    return nibbles(tensor) if tensor.dtype is torch.int32 else tensor.numpy().astype(int)


@given(ROWS, st.floats(2**-10, 2**10, width=32), st.integers(-128, 127))
def test_static_codes_are_the_rounded_affine_values_saturated(x, scale, zero):
    scales, zeros = torch.full((x.shape[1],), scale), torch.full((x.shape[1],), float(zero))
    # fp32 arithmetic step by step, as the formula of the operator says.
    exact = np.rint(np.float32(x * np.float32(scale)) + np.float32(zero))
    for dtype, lowest, highest in ((ops.INT8, -128, 127), (ops.INT4, -8, 7)):
        y = ops.npu_quantize(torch.from_numpy(x), scales, zeros, dtype, -1, False)
        assert np.array_equal(codes_of(y), np.clip(exact, lowest, highest))


def test_static_rounds_to_even_and_takes_one_scale_for_all():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 1000.0, -1000.0]])
    for given_dtype in (1, 12, ops.INT8):
        y = ops.npu_quantize(x, torch.ones(1), None, given_dtype, -1, False)
        assert y.tolist() == [[0, 2, 2, 0, -2, -2, 127, -128]]


@pytest.mark.parametrize(("axis", "div_mode"), [(-1, False), (0, False), (-2, False), (-1, True), (1, True), (2, True)])
def test_the_axis_names_the_dimension_of_the_scales(axis, div_mode):
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 3
    dimension = (1 if axis == -2 else 2) if not div_mode else axis % 3
    scales = torch.rand(x.shape[dimension]) + 0.5
    y = ops.npu_quantize(x, scales, None, ops.INT8, axis, div_mode)
    shape = [1, 1, 1]
    shape[dimension] = -1
    by_row = scales.numpy().reshape(shape)
    expected = np.rint(x.numpy() / by_row if div_mode else x.numpy() * by_row)
    assert np.array_equal(y.numpy(), np.clip(expected, -128, 127))


def test_div_mode_divides_by_the_scales():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) * 20
    scales, zeros = torch.rand(6) + 0.1, torch.tensor([0, 3, -5, 100, 7, 1])
    expected = np.clip(np.rint(x.numpy() / scales.numpy() + zeros.numpy()), -128, 127)
    y = ops.npu_quantize(x, scales, zeros.to(torch.int32), ops.INT8)
    assert np.array_equal(y.numpy(), expected)
    unsigned = ops.npu_quantize(x, scales, zeros.abs().to(torch.uint8), 13)
    assert unsigned.dtype is torch.uint8
    assert unsigned.min() >= 0


@given(ROWS, st.sampled_from(["int8", "int4"]))
def test_a_dynamic_row_is_scaled_by_its_largest_magnitude(x, kind):
    dtype, largest = QMAX[kind]
    y, scale = ops.npu_dynamic_quant(torch.from_numpy(x), dst_type=dtype)
    expected = np.abs(x).max(-1) * np.float32(1 / largest)
    assert scale.dtype is torch.float32
    assert np.array_equal(scale.numpy(), expected)
    codes = codes_of(y)
    assert np.abs(codes).max() <= largest
    safe = np.where(expected == 0, 1, expected).astype(np.float32)[:, None]
    assert np.array_equal(codes, np.rint(x / safe).astype(int))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_have_scale_and_codes_zero(dtype, kind):
    x = torch.zeros(2, 3, 16, dtype=dtype)
    x[1, 1] = torch.linspace(-4, 4, 16).to(dtype)
    y, scale = ops.npu_dynamic_quant(x, dst_type=QMAX[kind][0])
    assert scale.shape == (2, 3)
    codes = codes_of(y)
    assert not codes[0].any()
    assert scale[0].tolist() == [0, 0, 0]
    assert codes[1, 1].min() == -QMAX[kind][1]
    assert codes[1, 1].max() == QMAX[kind][1]


@given(st.floats(2**-149, 2**-120, width=32))
def test_the_smallest_rows_stay_within_the_range(value):
    y, _ = ops.npu_dynamic_quant(torch.tensor([[value, -value, value / 3, 0, 0, 0, 0, 0]]))
    assert y.abs().max() <= 127


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_scale(value):
    _, scale = ops.npu_dynamic_quant(torch.tensor([[1.0, value], [1.0, 2.0]]))
    assert not scale[0].isfinite()
    assert scale[1].isfinite()


def test_smooth_scales_multiply_first_by_group_of_rows():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    smooth = torch.rand(3, 8) + 0.5
    for arguments, rows in (
        ({"smooth_scales": smooth[1]}, [1] * 5),
        ({"smooth_scales": smooth, "group_index": torch.tensor([2, 2, 5], dtype=torch.int32)}, [0, 0, 2, 2, 2]),
    ):
        y, scale = ops.npu_dynamic_quant(x, **arguments)
        expected, expected_scale = ops.npu_dynamic_quant(x * smooth[rows])
        assert torch.equal(y, expected)
        assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize(
    ("number", "dtype", "largest"), [(292, torch.float8_e4m3fn, 448), (23, torch.float8_e5m2, 57344)]
)
def test_fp8_rows_fill_the_range(number, dtype, largest):
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    y, scale = ops.npu_dynamic_quant(x, dst_type=number)
    assert y.dtype is dtype
    assert y.float().abs().amax(-1).tolist() == [largest] * 3
    restored = y.float() * scale[:, None]
    assert float((restored - x).abs().max()) <= float(x.abs().max()) * (2**-4 if largest == 448 else 2**-3)


def test_the_packed_scale_has_the_words_of_the_documentation():
    words = ops.npu_trans_quant_param(torch.tensor([0.0123456, 1.0, 2.7182817]))
    assert words.tolist() == [0x40003C4A4000, 0x40003F800000, 0x4000402DE000]
    assert ops.npu_trans_quant_param(torch.tensor([1.0]), torch.tensor([-3.0])).tolist() == [0x7FA03F800000]
    assert ops.npu_trans_quant_param(torch.tensor([2.7182817]), torch.tensor([300.0])).tolist() == [0x5FE0402DE000]


@given(st.floats(2**-100, 2**100, width=32), st.integers(-400, 400))
def test_the_packed_scale_reads_back_truncated_and_saturated(scale, offset):
    words = ops.npu_trans_quant_param(torch.tensor([scale]), torch.tensor([float(offset)]))
    read = quantize.scale_of(words).item()
    assert 0 <= (scale - read) / scale < 2**-10
    assert quantize.offset_of(words).item() == min(max(offset, -256), 255)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.npu_quantize(x, torch.ones(8), None, 14),
        lambda x: ops.npu_quantize(x, torch.ones(8), None, ops.INT4, -1, True),
        lambda x: ops.npu_dynamic_quant(x, quant_mode="pertensor"),
        lambda x: ops.npu_dynamic_quant(x, dst_type=ops.HIFLOAT8),
        lambda x: ops.npu_trans_quant_param(torch.ones(1), round_mode=1),
    ],
)
def test_what_has_no_cpu_kernel_is_refused(call):
    with pytest.raises(NotImplementedError, match="npu_"):
        call(torch.ones(1, 8))
