import pytest
import torch

from framework import ops
from framework.ops.cpu import packed
from framework.ops.layout import held_bytes, weight_operand

STEP = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
CPU = torch.device("cpu")


def rounded(value, dtype):
    return torch.tensor(value, dtype=torch.float64).to(dtype).double().item()


def product_by_definition(x, codes_kn, scale, offset, group_size, bias):
    """y = x @ cast(cast(code + offset) * scale) + bias in double; cast rounds to x's dtype."""
    dtype = x.dtype
    k, n = codes_kn.shape
    weight = torch.empty(k, n, dtype=torch.float64)
    scale = scale.reshape(-1, scale.shape[-1]).double()
    offset = None if offset is None else offset.reshape(-1, offset.shape[-1]).double()
    for row in range(k):
        group = row // group_size if group_size else 0
        for column in range(n):
            value = float(codes_kn[row, column])
            if offset is not None:
                value = rounded(value + offset[group, min(column, offset.shape[1] - 1)].item(), dtype)
            weight[row, column] = rounded(value * scale[group, min(column, scale.shape[1] - 1)].item(), dtype)
    y = x.double() @ weight
    return y if bias is None else y + bias.double()


def problem(k=64, n=16, groups=2, bits=4, dtype=torch.bfloat16, rows=3):
    generator = torch.Generator().manual_seed(0)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (k, n), generator=generator, dtype=torch.int32)
    scale = (torch.rand(groups, n, generator=generator) * 0.1 + 0.01).to(dtype)
    offset = (torch.randn(groups, n, generator=generator) * half / 2).to(dtype)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    return x, codes, scale, offset


def assert_close(actual, expected, dtype):
    assert actual.dtype is dtype
    magnitude = expected.abs().max()
    assert float((actual.double() - expected).abs().max()) <= float(2 * STEP[dtype] * magnitude + 1e-6 * magnitude)


def as_operand(codes, bits):
    return ops.npu_convert_weight_to_int4pack(codes) if bits == 4 else codes.to(torch.int8)


def test_int4_packing_puts_the_first_code_in_the_low_bits():
    codes = torch.tensor([[1, -2, 3, -4, 5, -6, 7, -8]], dtype=torch.int32)
    packed_codes = ops.npu_convert_weight_to_int4pack(codes)
    assert packed_codes.dtype is torch.int32
    assert packed_codes.item() & 0xFFFFFFFF == 0x87A5C3E1


def test_int4_packing_masks_what_exceeds_four_bits():
    codes = torch.tensor([[16 + 3, -9, 8, 0, 0, 0, 0, 0]], dtype=torch.int32)
    assert ops.npu_convert_weight_to_int4pack(codes).item() == 0x3 | (0x7 << 4) | (0x8 << 8)
    with pytest.raises(ValueError, match="int4 packing"):
        ops.npu_convert_weight_to_int4pack(codes[:, :7])


@pytest.mark.parametrize("dtype", list(STEP))
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_offset_is_added_and_both_steps_round(bits, dtype, with_offset, with_bias):
    x, codes, scale, offset = problem(bits=bits, dtype=dtype)
    offset = offset if with_offset else None
    bias = torch.randn(16, dtype=torch.float32) if with_bias else None
    y = ops.npu_weight_quant_batchmatmul(
        x, as_operand(codes, bits), scale, antiquant_offset=offset, bias=bias, antiquant_group_size=32
    )
    assert_close(y, product_by_definition(x, codes, scale, offset, 32, bias), dtype)


@pytest.mark.parametrize("shape", [(1,), (16,), (1, 16)])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_group_is_named_group_size_0(bits, shape):
    x, codes, _, _ = problem(bits=bits)
    scale, offset = torch.rand(shape).bfloat16(), torch.randn(shape).bfloat16()
    y = ops.npu_weight_quant_batchmatmul(x, as_operand(codes, bits), scale, offset)
    assert_close(y, product_by_definition(x, codes, scale, offset, 0, None), torch.bfloat16)


def test_a_weight_packed_along_k_may_be_given_as_a_transposed_view():
    x, codes, scale, offset = problem()
    along_k = ops.npu_convert_weight_to_int4pack(codes.t().contiguous())
    y = ops.npu_weight_quant_batchmatmul(x, along_k.t(), scale, offset, antiquant_group_size=32)
    assert_close(y, product_by_definition(x, codes, scale, offset, 32, None), torch.bfloat16)


def test_a_last_group_may_be_short():
    x, codes, scale, offset = problem(k=48)
    y = ops.npu_weight_quant_batchmatmul(x, as_operand(codes, 4), scale, offset, antiquant_group_size=32)
    assert_close(y, product_by_definition(x, codes, scale, offset, 32, None), torch.bfloat16)


def test_what_has_no_cpu_kernel_is_refused():
    x, codes, scale, _ = problem()
    with pytest.raises(NotImplementedError, match="quantized output"):
        ops.npu_weight_quant_batchmatmul(x, as_operand(codes, 4), scale, quant_scale=scale)


@pytest.mark.parametrize("rows", [1, 3, 130])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "n", "groups"), [(64, 16, 2), (96, 64, 3), (128, 128, 1), (256, 48, 2), (64, 192, 2)])
def test_the_cpus_own_layout_multiplies_by_code_plus_offset_times_scale(k, n, groups, bits, rows):
    """It rounds scale and scale * offset to bf16 where the documented operator rounds the weight twice."""
    x, codes, scale, offset = problem(k, n, groups, bits, rows=rows)
    scale, offset = scale.float(), offset.float()
    operand = weight_operand(
        codes.t().to(torch.int8), bits=bits, scale=scale, offset=offset, dtype=torch.bfloat16, device=CPU
    )
    documented = as_operand(codes, bits)
    assert (operand.shape, operand.dtype, operand.nbytes) == (
        documented.shape,
        documented.dtype,
        documented.nbytes,
    )
    form = packed.private(operand)
    assert form is not None
    assert held_bytes(operand) == form.codes.nbytes + form.scale_and_zero.nbytes
    y = ops.npu_weight_quant_batchmatmul(
        x, operand, scale.bfloat16(), offset.bfloat16(), antiquant_group_size=k // groups
    )
    scale_k, zero_k = (
        parameter.repeat_interleave(k // groups, 0).double()
        for parameter in (scale.bfloat16(), _zero_as_packed(scale, offset, bits))
    )
    exact = x.double() @ (codes.double() * scale_k + zero_k)
    assert_close(y, exact, torch.bfloat16)
    plain = ops.npu_weight_quant_batchmatmul(
        x, documented, scale.bfloat16(), offset.bfloat16(), antiquant_group_size=k // groups
    )
    magnitude = float(plain.double().abs().max())
    assert float((y.double() - plain.double()).abs().max()) <= 2**-5 * magnitude


def _zero_as_packed(scale, offset, bits):
    zero = scale * offset
    if bits == 4:
        return zero.bfloat16()
    # The low half carries zero + 8 s, and 8 s is taken back by its own codes.
    return (zero + 8 * scale).bfloat16().double() - 8 * scale.bfloat16().double()


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_take_another_path_to_the_same_result(bits, monkeypatch):
    x, codes, scale, offset = problem(576, 320, 18, bits, rows=130)
    operand = weight_operand(
        codes.t().to(torch.int8), bits=bits, scale=scale, offset=offset, dtype=torch.bfloat16, device=CPU
    )
    form = packed.private(operand)
    monkeypatch.setattr(packed, "_CHUNK_DEQUANTIZED", 128 * 576)
    by_blocks = packed.multiply(x, form)
    monkeypatch.setattr(packed, "_DEQUANTIZE_FROM_ROWS", 10**9)
    by_kernel = packed.multiply(x, form)
    torch.testing.assert_close(by_blocks, by_kernel, rtol=2**-7, atol=float(by_kernel.abs().max()) * 2**-8)


def test_torchs_int4_layout_is_known_on_this_processor():
    """An unknown layout is no error, but prefill then loses a factor of two: look at packed.block_rows."""
    assert packed.block_rows() in (32, 64)


@pytest.mark.parametrize(
    ("k", "n", "groups", "dtype"),
    [(64, 24, 2, torch.bfloat16), (64, 16, 4, torch.bfloat16), (64, 16, 2, torch.float16)],
    ids=["N not a multiple of 16", "groups of 16", "fp16"],
)
def test_what_torchs_kernel_does_not_take_keeps_the_documented_operand(k, n, groups, dtype):
    x, codes, scale, offset = problem(k, n, groups, dtype=dtype)
    operand = weight_operand(codes.t().to(torch.int8), bits=4, scale=scale, offset=offset, dtype=dtype, device=CPU)
    assert packed.private(operand) is None
    assert torch.equal(operand, as_operand(codes, 4))
    y = ops.npu_weight_quant_batchmatmul(x, operand, scale, offset, antiquant_group_size=k // groups)
    assert_close(y, product_by_definition(x, codes, scale, offset, k // groups, None), dtype)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 5])
def test_float_linear_accumulates_in_fp32_and_rounds_once(rows, cast):
    from framework.ops.linear import linear

    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(cast)
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(2)).to(cast)
    y = linear(x, weight)
    assert_close(y, x.double() @ weight.double().t(), cast)


def test_a_large_float_weight_is_widened_in_parts(monkeypatch):
    from framework.ops import linear

    monkeypatch.setattr(linear, "_CHUNK_WEIGHTS", 64 * 7)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).half()
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(2)).half()
    assert_close(linear.linear(x, weight), x.double() @ weight.double().t(), torch.float16)


def test_the_format_cast_keeps_the_tensor():
    weight = torch.randn(4, 4)
    assert ops.npu_format_cast(weight, ops.ACL_FORMAT_FRACTAL_NZ) is weight
    assert torch.ops.npu.npu_format_cast.Tensor(weight, weight).shape == weight.shape
