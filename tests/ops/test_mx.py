"""MX block formats against the literal rules, in Python floats and exact fractions of powers of two."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from framework import ops
from framework.ops import packing
from framework.ops.cpu import mx
from framework.ops.quant_layout import mx_operand

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-qwen3"
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
# Non-negative values by code, NaN and Inf codes left out.
FP8 = {
    "e4m3": [(2**-9 * m if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)) for e in range(16) for m in range(8)][:-1],
    "e5m2": [(2**-16 * m if e == 0 else (1 + m / 4) * 2.0 ** (e - 15)) for e in range(31) for m in range(4)],
}
GRIDS = {**FP8, "e2m1": FP4}
EMAX = {"e4m3": 8, "e5m2": 15, "e2m1": 2}
NUMBERS = {"e4m3": ops.FLOAT8_E4M3FN, "e5m2": ops.FLOAT8_E5M2, "e2m1": ops.FLOAT4_E2M1FN_X2}
TARGETS = [("e4m3", "rint"), ("e5m2", "rint"), ("e2m1", "rint"), ("e2m1", "round"), ("e2m1", "floor")]


def code_of(value, grid, mode):
    """Index of the rounded magnitude, and the sign bit: exact comparisons of floats."""
    magnitude, negative = abs(value), math.copysign(1, value) < 0
    above = next((index for index, entry in enumerate(grid) if entry >= magnitude), len(grid) - 1)
    if magnitude >= grid[-1] or grid[above] == magnitude:
        return (len(grid) - 1 if magnitude >= grid[-1] else above), negative
    below = above - 1
    if mode == "floor":
        return (above if negative else below), negative
    to_below, to_above = magnitude - grid[below], grid[above] - magnitude
    if to_below == to_above:
        return (above if mode == "round" or above % 2 == 0 else below), negative
    return (below if to_below < to_above else above), negative


def quantized_by_definition(row, element, mode):
    """Codes (with sign, as integers) and scale bytes of one row of finite floats."""
    width = 8 if element == "e2m1" else 128
    codes, scales = [], []
    for first in range(0, len(row), 32):
        block = [float(value) for value in row[first : first + 32]]
        largest = max(abs(value) for value in block)
        # frexp: largest = m * 2^e, m in [0.5, 1); numbers below 2^-126 have the exponent field 0.
        field = math.frexp(largest)[1] - 1 + 127 if largest >= 2.0**-126 else 0
        byte = max(field - EMAX[element], 0)
        factor = 0.0 if byte == 0 else 2.0 ** (127 - byte)
        for value in block:
            scaled = float(np.float32(np.float32(value) * np.float32(factor)))
            index, negative = code_of(scaled, GRIDS[element], mode)
            codes.append(index + width * negative)
        scales.append(byte)
    return codes, scales + [0] * (len(scales) % 2)


def as_integers(codes, element):
    octets = codes.view(torch.uint8).tolist()
    return [nibble for octet in octets for nibble in (octet & 15, octet >> 4)] if element == "e2m1" else octets


def test_the_worked_vector():
    x = torch.zeros(64)
    x[:8] = torch.tensor([1, -2, 3.5, 500, -0.01, 0.3, 448, -7])
    x[32:36] = torch.tensor([5, -0.2, 0.75, 6.9])
    codes, scale = ops.npu_dynamic_mx_quant(x.bfloat16(), dst_type=292)
    assert scale.tolist() == [[127, 121]]
    octets = codes.view(torch.uint8).tolist()
    assert octets[:9] == [56, 192, 70, 126, 133, 42, 126, 206, 0]
    assert octets[32:37] == [122, 213, 100, 126, 0]
    codes, scale = ops.npu_dynamic_mx_quant(x.bfloat16())
    assert scale.tolist() == [[133, 127]]
    assert codes.tolist() == [0x80, 0x70, 0x08, 0x87, *[0] * 12, 0x86, 0x72, *[0] * 14]


@pytest.mark.parametrize(("element", "mode"), TARGETS)
@given(
    row=st.integers(1, 70).flatmap(
        lambda n: arrays.arrays(
            np.float32,
            2 * n,
            elements=st.one_of(
                st.floats(-1000, 1000, width=32),
                st.integers(-56, 56).map(lambda quarters: quarters / 4),
                st.sampled_from([0.0, -0.0, 2.0**-140, -(2.0**-126), 2.0**100]),
            ),
        )
    )
)
def test_codes_and_scales_follow_the_rule_of_the_exponent_field(element, mode, row):
    codes, scale = mx.quantize(torch.from_numpy(row), element, mode)
    expected, expected_scale = quantized_by_definition(row, element, mode)
    assert scale.flatten().tolist() == expected_scale
    assert scale.shape == (-(-len(row) // 64), 2)
    assert as_integers(codes, element) == expected


@pytest.mark.parametrize("element", ["e4m3", "e5m2", "e2m1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantized_values_are_element_times_power_of_two(element, dtype):
    x = (torch.randn(3, 96, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    codes, scale = mx.quantize(x, element)
    grid = [*GRIDS[element], *[float("nan")] * ((8 if element == "e2m1" else 128) - len(GRIDS[element]))]
    values = [*grid, *(-value for value in grid)]
    expected = [
        [values[code] * 2.0 ** (scale[row, k // 64, k // 32 % 2].item() - 127) for k, code in enumerate(codes_of_row)]
        for row, codes_of_row in enumerate(as_integers(row_codes, element) for row_codes in codes)
    ]
    restored = mx.dequantize(codes, scale, element)
    assert restored.tolist() == expected
    assert torch.equal(ops.npu_anti_mx_quant(codes, scale, dst_type=6, src_type=NUMBERS[element]), restored)
    # Each is exact in bf16, and quantizing it again changes nothing.
    assert torch.equal(restored.bfloat16().float(), restored)
    again, scale_again = mx.quantize(restored, element)
    assert torch.equal(mx.dequantize(again, scale_again, element), restored)


@pytest.mark.parametrize("element", ["e4m3", "e5m2", "e2m1"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_what_is_not_finite_is_nan(element, value):
    x = torch.ones(64)
    x[40] = value
    codes, scale = mx.quantize(x, element)
    assert scale[0, 1] == 255
    restored = mx.dequantize(codes, scale, element)
    assert restored[32:].isnan().all()
    assert torch.equal(restored[:32], torch.ones(32))


def test_exponent_bytes_and_their_values():
    octets = torch.arange(256).to(torch.uint8)
    values = packing.e8m0_values(octets)
    assert values[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert values[255].isnan()
    assert torch.equal(packing.e8m0_bytes(values), octets)


@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
def test_blocks_may_lie_along_another_dimension(element):
    x = torch.randn(2, 96, 10, generator=torch.Generator().manual_seed(1))
    codes, scale = ops.npu_dynamic_mx_quant(x, axis=1, dst_type=NUMBERS[element])
    along_last, scale_along_last = mx.quantize(x.transpose(1, 2), element)
    assert scale.shape == (2, 2, 10, 2)
    assert torch.equal(scale, scale_along_last.transpose(1, 2))
    restored = mx.dequantize(along_last, scale_along_last, element).transpose(1, 2)
    assert torch.equal(
        ops.npu_anti_mx_quant(codes, scale, axis=1, dst_type=ops.FLOAT32, src_type=NUMBERS[element]), restored
    )


@pytest.mark.parametrize("k", [64, 512, 544, 1056])
def test_two_levels_scale_blocks_of_512_to_the_range_of_fp4(k):
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1.0], [300.0], [0.0]])
    codes, level0, level1 = ops.npu_dynamic_dual_level_mx_quant(x)
    assert level0.shape == (3, -(-k // 512))
    for row in range(3):
        scaled = x[row].numpy().copy()
        for block in range(level0.shape[1]):
            part = slice(512 * block, 512 * (block + 1))
            largest = np.abs(scaled[part]).max() / np.float32(6)
            assert level0[row, block] == largest
            scaled[part] = scaled[part] / (largest or np.float32(1))
        expected, expected_scale = quantized_by_definition(scaled, "e2m1", "rint")
        assert as_integers(codes[row], "e2m1") == expected
        assert level1[row].flatten().tolist() == expected_scale


def test_two_levels_of_a_constant():
    codes, level0, level1 = ops.npu_dynamic_dual_level_mx_quant(torch.full((1, 512), 8.0).bfloat16())
    assert (codes == 0x77).all()
    assert level0.item() == pytest.approx(4 / 3)
    assert (level1 == 127).all()


def test_two_levels_round_to_the_dtype_of_the_input_between_them():
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(9)).bfloat16()
    codes, level0, level1 = ops.npu_dynamic_dual_level_mx_quant(x)
    expected, expected_scale = mx.quantize((x.float() / level0).bfloat16(), "e2m1")
    assert torch.equal(codes, expected)
    assert torch.equal(level1, expected_scale)


def test_casting_to_fp4_packs_and_back_unpacks():
    x = torch.tensor([[0.5, -6.0, 4.0, 1.5], [0.0, -0.5, 3.0, 2.0]])
    packed = ops.npu_dtype_cast(x.to(torch.float8_e4m3fn), 296)
    assert packed.tolist() == [[0xF1, 0x36], [0x90, 0x45]]
    assert torch.equal(ops.npu_dtype_cast(packed, ops.FLOAT32, 296), x)
    assert ops.npu_dtype_cast(x, 15).dtype is torch.bfloat16
    beyond = torch.tensor([100.0, -float("inf"), float("inf"), -0.0])
    assert ops.npu_dtype_cast(beyond, 296).tolist() == [0xF7, 0x87]


def random_operand(rows, k, element, seed):
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * 3
    return mx.quantize(x, element, "round" if element == "e2m1" else "rint")


SCHEMES = {
    "mxfp8": ("e4m3", "e4m3"),
    "mxfp8-e5m2": ("e5m2", "e4m3"),
    "mxfp4": ("e2m1", "e2m1"),
    "w4a8": ("e4m3", "e2m1"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("output", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 64, 16), (5, 96, 24), (130, 320, 40)])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_is_that_of_the_dequantized_operands(scheme, output, rows, k, n, prepared, with_bias, monkeypatch):
    monkeypatch.setattr(mx, "_CHUNK_WEIGHTS", 7 * k)
    x_element, w_element = SCHEMES[scheme]
    x, x_scale = random_operand(rows, k, x_element, 1)
    weight, w_scale = random_operand(n, k, w_element, 2)
    operand = weight.t()
    if prepared:
        operand = mx_operand(weight, w_scale, w_element, torch.bfloat16, torch.device("cpu"))
        assert (operand.shape, operand.dtype) == (weight.t().shape, weight.dtype)
    bias = torch.randn(n) if with_bias else None
    y = ops.npu_quant_matmul(
        x,
        operand,
        w_scale.transpose(0, 1),
        pertoken_scale=x_scale,
        bias=bias,
        output_dtype={torch.bfloat16: 15, torch.float16: ops.FLOAT16, torch.float32: 6}[output],
        x1_dtype=296 if x_element == "e2m1" else None,
        x2_dtype=296 if w_element == "e2m1" else None,
        scale_dtype=293,
        pertoken_scale_dtype=293,
        group_sizes=[1, 1, 32],
    )
    exact = mx.dequantize(x, x_scale, x_element).double() @ mx.dequantize(weight, w_scale, w_element).double().t()
    if bias is not None:
        exact += bias.double()
    assert y.dtype is output
    step = torch.finfo(output).eps
    bound = step / 2 * 1.01 * exact.abs() + 1e-6 * exact.abs().max()
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("output", [15, ops.FLOAT32])
@pytest.mark.parametrize("k", [512, 1056])
def test_the_two_level_product_has_both_scales(k, output):
    x, weight = (torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)) for rows in (3, 10))
    (xc, x0, x1), (wc, w0, w1) = (ops.npu_dynamic_dual_level_mx_quant(tensor) for tensor in (x, weight))
    bias = torch.randn(10)
    y = ops.npu_dual_level_quant_matmul(xc, wc, x0, w0.t(), x1, w1, bias=bias, output_dtype=output)
    exact = bias.double().repeat(3, 1)
    for block in range(x0.shape[1]):
        part = slice(512 * block, min(512 * (block + 1), k))
        partial = mx.dequantize(xc, x1, "e2m1")[:, part].double() @ mx.dequantize(wc, w1, "e2m1")[:, part].double().t()
        exact += x0[:, block, None].double() * w0[None, :, block].double() * partial
    torch.testing.assert_close(y.double(), exact, rtol=2**-8 if output == 15 else 2e-6, atol=1e-5)


def exact_codes(weight, element):
    """Codes and scale bytes of values that are exact in the format: a look-up, no rounding."""
    grid = np.array(GRIDS[element])
    codes, scales = np.zeros(weight.shape, np.uint8), np.zeros((len(weight), weight.shape[1] // 32), np.uint8)
    for row, block in np.ndindex(scales.shape):
        part = weight[row, 32 * block : 32 * (block + 1)].astype(float)
        byte = max(math.frexp(np.abs(part).max())[1] - 1 + 127 - EMAX[element], 0)
        index = np.searchsorted(grid, np.abs(part) / 2.0 ** (byte - 127))
        assert np.array_equal(grid[index] * 2.0 ** (byte - 127), np.abs(part))
        codes[row, 32 * block : 32 * (block + 1)] = index + np.signbit(part) * (8 if element == "e2m1" else 128)
        scales[row, block] = byte
    codes = torch.from_numpy(codes)
    codes = packing.pack_fp4(codes) if element == "e2m1" else codes.view(torch.float8_e4m3fn)
    return codes, torch.from_numpy(scales).view(len(weight), -1, 2)


LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def golden_linear(folder, name):
    vectors = np.load(GOLDEN / folder / "linear.npz")
    return (vectors[f"model.layers.0.{name}.{part}"] for part in ("x", "W_rows16", "y_sim"))


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize(
    ("folder", "activations", "weights"),
    [
        ("modelslim-mxfp8", {"dst_type": 292}, "e4m3"),
        ("modelslim-mxfp4", {"dst_type": 296, "round_mode": "round"}, "e2m1"),
        ("modelslim-w4a8-mxfp", {"dst_type": 292}, "e2m1"),
    ],
)
def test_the_quantizers_own_layers_come_out(folder, activations, weights, name):
    x, weight, y = golden_linear(folder, name)
    codes, scale = exact_codes(weight, weights)
    x_codes, x_scale = ops.npu_dynamic_mx_quant(torch.from_numpy(x), **activations)
    ours = ops.npu_quant_matmul(
        x_codes,
        codes.t(),
        scale.transpose(0, 1),
        pertoken_scale=x_scale,
        output_dtype=ops.FLOAT32,
        x1_dtype=296 if activations["dst_type"] == 296 else None,
        x2_dtype=296 if weights == "e2m1" else None,
        group_sizes=[1, 1, 32],
    )
    np.testing.assert_allclose(ours.numpy(), y[:, :16], rtol=1e-5, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize("name", LINEARS)
def test_two_level_activations_of_the_quantizer_come_out(name):
    x, weight, y = golden_linear("modelslim-mxfp4-dualscale", name)
    codes, level0, level1 = ops.npu_dynamic_dual_level_mx_quant(torch.from_numpy(x))
    values = mx.dequantize(codes, level1, "e2m1").double() * level0.double().repeat_interleave(512, 1)[:, : x.shape[1]]
    np.testing.assert_allclose(
        values.numpy() @ weight.T.astype(float), y[:, :16], rtol=1e-5, atol=1e-6 * np.abs(y).max()
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.npu_dynamic_mx_quant(x, block_size=64),
        lambda x: ops.npu_dynamic_mx_quant(x, scale_alg=1),
        lambda x: ops.npu_dynamic_mx_quant(x, dst_type=ops.FLOAT4_E1M2FN_X2),
        lambda x: ops.npu_dynamic_mx_quant(x, dst_type=45),
        lambda x: ops.npu_dynamic_dual_level_mx_quant(x, smooth_scale=x),
        lambda x: ops.npu_anti_mx_quant(x, x, src_type=ops.HIFLOAT8),
    ],
)
def test_what_has_no_cpu_kernel_is_refused(call):
    with pytest.raises(NotImplementedError, match="npu_"):
        call(torch.ones(1, 64))


def test_fp8_rounds_to_nearest_even_only():
    with pytest.raises(ValueError, match="round_mode"):
        ops.npu_dynamic_mx_quant(torch.ones(64), dst_type=292, round_mode="floor")
