"""Integer `npu_quant_matmul` against int64 sums and literal fp32 steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framework import ops
from framework.ops.cpu import quant_matmul
from framework.ops.layout import held_bytes
from framework.ops.quant_layout import int4_operand, int8_operand

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-qwen3"
CPU = torch.device("cpu")
OUTPUTS = {torch.bfloat16: ops.BFLOAT16, torch.float16: ops.FLOAT16, torch.float32: ops.FLOAT32}


def integers(rows, columns, seed, low=-128, high=128):
    return torch.randint(low, high, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 0.001


def sums(x, weight):
    """int64 x [M, K] @ weight [N, K]^T."""
    return x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T


def truncated(scale):
    """The 19 high bits of fp32 values, by arithmetic on Python floats."""
    mantissa, exponent = np.frexp(scale.numpy().astype(float))
    return (np.trunc(mantissa * 2**11) / 2**11 * 2.0**exponent).astype(np.float32)


def same(y, expected, dtype):
    assert y.dtype is dtype
    return torch.equal(y, torch.from_numpy(expected).to(dtype))


@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 20), st.booleans(), st.integers(0, 99))
def test_the_int8_product_is_exact_for_any_sizes_and_layouts(m, k, n, transposed, seed):
    x, weight = integers(m, k, seed), integers(n, k, seed + 1)
    operand = weight.t() if transposed else weight.t().contiguous()
    y = quant_matmul.int8_product(x, operand)
    assert y.dtype is torch.int32
    assert np.array_equal(y.numpy(), sums(x, weight))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("m", [1, 17])
def test_the_largest_sums_are_exact_also_where_torchs_kernel_is_not(m, exact, monkeypatch):
    monkeypatch.setattr(quant_matmul, "_int_mm_is_exact", lambda: exact)
    x = torch.full((m, 4096 + 3), -128, dtype=torch.int8)
    weight = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(3, 4096 + 3)
    assert np.array_equal(quant_matmul.int8_product(x, weight.t()).numpy(), sums(x, weight))


def test_torchs_int8_kernel_is_exact_on_this_processor():
    """Where it is not, nothing breaks, but W8A8 loses most of its speed."""
    assert quant_matmul._int_mm_is_exact()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bias_dtype", [None, torch.int32, torch.float32, torch.bfloat16])
def test_dynamic_scales_multiply_by_channel_then_by_token(output, transposed, bias_dtype):
    x, weight = integers(5, 96, 0), integers(24, 96, 1)
    scale, tokens = random(24), random(5, seed=1)
    bias = (
        None
        if bias_dtype is None
        else (torch.randn(24, generator=torch.Generator().manual_seed(2)) * 50).to(bias_dtype)
    )
    operand = int8_operand(weight, CPU) if transposed else weight.t().contiguous()
    y = ops.npu_quant_matmul(x, operand, scale, pertoken_scale=tokens, bias=bias, output_dtype=OUTPUTS[output])
    total = sums(x, weight)
    if bias_dtype is torch.int32:
        total = total + bias.numpy()
    expected = (total.astype(np.float32) * scale.numpy()) * tokens.numpy()[:, None]
    if bias_dtype in (torch.float32, torch.bfloat16):
        expected = expected + bias.float().numpy()
    assert same(y, expected, output)


@pytest.mark.parametrize("scale_kind", ["fp32", "bf16", "int64", "one"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_static_scales_keep_19_bits_for_fp16_output_and_as_words(output, scale_kind):
    x, weight = integers(4, 64, 0), integers(16, 64, 1)
    scale = random(1 if scale_kind == "one" else 16)
    bias = integers(1, 16, 3)[0].int() * 100
    if scale_kind == "bf16":
        scale = scale.bfloat16()
    handed = ops.npu_trans_quant_param(scale) if scale_kind == "int64" else scale
    y = ops.npu_quant_matmul(x, weight.t(), handed, bias=bias, output_dtype=OUTPUTS[output])
    short = scale_kind == "int64" or (output is torch.float16 and scale_kind != "bf16")
    applied = truncated(scale) if short else scale.float().numpy()
    assert same(y, (sums(x, weight) + bias.numpy()).astype(np.float32) * applied, output)


def test_int32_output_ignores_the_scale():
    x, weight, bias = integers(3, 64, 0), integers(8, 64, 1), torch.arange(8, dtype=torch.int32)
    y = ops.npu_quant_matmul(x, weight.t(), random(8), bias=bias, output_dtype=ops.INT32)
    assert same(y, sums(x, weight) + bias.numpy(), torch.int32)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("as_words", [False, True])
def test_int8_is_the_output_by_default_and_saturates(as_words, with_offset):
    x, weight = integers(6, 64, 0), integers(16, 64, 1)
    scale = random(16)
    offset = torch.linspace(-300, 300, 16) if with_offset else None
    if as_words:
        y = ops.npu_quant_matmul(x, weight.t(), ops.npu_trans_quant_param(scale, offset))
    else:
        y = ops.npu_quant_matmul(x, weight.t(), scale, offset=offset)
    nine = np.clip(np.rint(sums(x, weight).astype(np.float32) * truncated(scale)), -256, 255)
    if with_offset:
        nine = nine + np.clip(np.rint(offset.numpy()), -256, 255)
    assert same(y, np.clip(nine, -128, 127), torch.int8)
    assert y.max() == 127
    assert y.min() == -128


@pytest.mark.parametrize("form", ["packed along N", "view of packed along K", "operand"])
@pytest.mark.parametrize("rows", [1, 5])
def test_int4_by_int4_is_int8_on_the_codes(rows, form):
    x, weight = integers(rows, 64, 0, -7, 8), integers(24, 64, 1, -8, 8)
    scale, tokens = random(24), random(rows, seed=1)
    match form:
        case "packed along N":
            operand = ops.npu_convert_weight_to_int4pack(weight.t().contiguous().int())
        case "view of packed along K":
            operand = ops.npu_convert_weight_to_int4pack(weight.int()).t()
        case _:
            operand = int4_operand(weight, CPU)
            assert (operand.shape, operand.dtype) == ((64, 3), torch.int32)
            assert held_bytes(operand) == 64 * 24
    packed = ops.npu_convert_weight_to_int4pack(x.int())
    y = ops.npu_quant_matmul(packed, operand, scale, pertoken_scale=tokens, output_dtype=ops.BFLOAT16)
    expected = (sums(x, weight).astype(np.float32) * scale.numpy()) * tokens.numpy()[:, None]
    assert same(y, expected, torch.bfloat16)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("offset_error", [None, 0.0, 0.25])
@pytest.mark.parametrize("groups", [1, 2])
def test_int8_by_int4_in_groups_adds_what_the_offset_says_beyond_its_own(groups, prepared, offset_error):
    """Hardware computes ((x - 8) @ w * s + offset) * tokens."""
    x, weight = integers(3, 256 * groups, 0), integers(16, 256 * groups, 1, -8, 8)
    scale, tokens = random(groups, 16), random(3, seed=1)
    words = scale.view(torch.int32).long()
    by_row = weight.double() * scale.double().repeat_interleave(256, 0).t()
    offset = None if offset_error is None else (8 * by_row.sum(1) + offset_error).float()
    operand = (
        int4_operand(weight, CPU) if prepared else ops.npu_convert_weight_to_int4pack(weight.t().contiguous().int())
    )
    y = ops.npu_quant_matmul(
        x,
        operand,
        words,
        offset=offset,
        pertoken_scale=tokens[:, None],
        output_dtype=ops.FLOAT32,
        group_sizes=[0, 0, 256],
    )
    exact = ((x.double() - 8) @ by_row.t() + 8 * by_row.sum(1) + (offset_error or 0.0)) * tokens.double()[:, None]
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)


def test_leading_dimensions_are_kept():
    x, weight = integers(6, 64, 0), integers(16, 64, 1)
    tokens = random(6)
    flat, shaped = (
        ops.npu_quant_matmul(rows, weight.t(), random(16), pertoken_scale=tokens, output_dtype=15)
        for rows in (x, x.view(2, 3, 64))
    )
    assert torch.equal(shaped, flat.view(2, 3, 16))


def integer_rows(weight, largest):
    """The codes and scales of W = code * scale, whose largest code is one of `largest`."""
    scales = np.stack([np.abs(weight).max(1) / code for code in largest]).astype(np.float64)
    codes = weight[None] / scales[..., None]
    best = np.abs(codes - np.rint(codes)).max(-1).argmin(0)
    rows = np.arange(len(weight))
    codes, scales = codes[best, rows], scales[best, rows]
    assert np.abs(codes - np.rint(codes)).max() < 1e-3
    return torch.from_numpy(np.rint(codes)).to(torch.int8), torch.from_numpy(scales).float()


# input_scale and input_offset of the checkpoint.
STATIC_INPUTS = {
    "self_attn.q_proj": (0.033935546875, -3.0),
    "self_attn.o_proj": (0.04248046875, 6.0),
    "mlp.gate_proj": (0.033203125, 1.0),
    "mlp.down_proj": (0.24609375, 7.0),
}


def golden_linear(folder, name):
    vectors = np.load(GOLDEN / folder / "linear.npz")
    return (vectors[f"model.layers.0.{name}.{part}"] for part in ("x", "W_rows16", "y_sim"))


@pytest.mark.parametrize("name", STATIC_INPUTS)
def test_static_layers_of_the_quantizer_come_out(name):
    x, weight, y = golden_linear("modelslim-w8a8", name)
    codes, scale = integer_rows(weight, (126, 127, 128))
    input_scale, input_offset = STATIC_INPUTS[name]
    quantized = ops.npu_quantize(
        torch.from_numpy(x), torch.tensor([1 / input_scale]), torch.tensor([input_offset]), ops.INT8, -1, False
    )
    bias = -int(input_offset) * codes.sum(1, dtype=torch.int32)
    ours = ops.npu_quant_matmul(quantized, codes.t(), scale * input_scale, bias=bias.int(), output_dtype=ops.FLOAT32)
    np.testing.assert_allclose(ours.numpy(), y[:, :16], rtol=2e-6, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize("name", STATIC_INPUTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_layers_of_the_quantizer_come_out(bits, name):
    x, weight, y = golden_linear(f"modelslim-w{bits}a{bits}-dynamic", name)
    codes, scale = integer_rows(weight, (126, 127, 128) if bits == 8 else (7,))
    quantized, tokens = ops.npu_dynamic_quant(torch.from_numpy(x), dst_type=ops.INT4 if bits == 4 else None)
    operand = int4_operand(codes, CPU) if bits == 4 else int8_operand(codes, CPU)
    ours = ops.npu_quant_matmul(quantized, operand, scale, pertoken_scale=tokens, output_dtype=ops.FLOAT32)
    np.testing.assert_allclose(ours.numpy(), y[:, :16], rtol=2e-6, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize(
    "options",
    [{"group_sizes": [1, 128, 128]}, {"y_scale": torch.ones(1)}, {"output_dtype": ops.HIFLOAT8}],
)
def test_what_has_no_cpu_kernel_is_refused(options):
    with pytest.raises(NotImplementedError, match="no CPU kernel"):
        ops.npu_quant_matmul(integers(1, 64, 0), integers(8, 64, 1).t(), random(8), **options)


def test_byte_operands_without_their_dtype_are_refused():
    octets = torch.zeros(2, 32, dtype=torch.uint8)
    scale = torch.zeros(2, 1, 2, dtype=torch.uint8)
    for options, message in (({}, "no MX elements"), ({"x1_dtype": 296, "x2_dtype": 296, "scale_dtype": 24}, "e8m0")):
        with pytest.raises(ValueError, match=message):
            ops.npu_quant_matmul(
                octets, octets.t(), scale.transpose(0, 1), pertoken_scale=scale, output_dtype=15, **options
            )
