"""Dequantize, swiglu, quantize: literal rows in float64, and the fused matmul against its parts."""

import numpy as np
import pytest
import torch

from framework import ops
from framework.ops.cpu import mx

T, H, E, K = 7, 64, 3, 96
COUNTS = torch.tensor([3, 0, 2])  # and two rows after the last group


def generator(seed):
    return torch.Generator().manual_seed(seed)


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def literal(values, *, left, mode=0, smooth=1.0):
    """Fp64 rows [T, 2H] -> [T, H]."""
    a, b = (values[:, ::2], values[:, 1::2]) if mode == 1 else np.split(values, 2, 1)
    if mode:
        gate, linear = np.minimum(a, 7.0), np.clip(b, -7.0, 7.0)
        return gate * sigmoid(1.702 * gate) * (linear + 1.0) * smooth
    active, linear = (a, b) if left else (b, a)
    return active * sigmoid(active) * linear * smooth


def check_rows(codes, scales, expected):
    largest = np.abs(expected).max(1)
    np.testing.assert_allclose(scales.numpy(), largest / 127, rtol=1e-5)
    difference = np.abs(codes.numpy() - expected / np.where(largest, largest / 127, 1)[:, None])
    assert difference.max() < 0.5 + 1e-3
    assert codes.dtype is torch.int8 and scales.dtype is torch.float32


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
def test_sums_become_codes_of_the_gated_activation(left, mode, grouped, smooth, dtype):
    sums = torch.randint(-3000, 3000, (T, 2 * H), generator=generator(0), dtype=torch.int32)
    x = sums if dtype is torch.int32 else (sums / 1000).to(dtype)
    experts = E if grouped else 1
    weight_scale = torch.rand(experts, 2 * H, generator=generator(1)) * (0.1 if dtype is torch.int32 else 2)
    tokens = torch.rand(T, generator=generator(2)) * 0.1
    factors = torch.rand(experts, H, generator=generator(3)) + 0.5 if smooth else None
    of_row = [0, 0, 0, 2, 2, 0, 0] if grouped else [0] * T
    values = x.double().numpy() * weight_scale.double().numpy()[of_row] * tokens.double().numpy()[:, None]
    expected = literal(values, left=left, mode=mode, smooth=factors.double().numpy()[of_row] if smooth else 1.0)
    if grouped:
        expected[5:] = 0
    codes, scales = ops.npu_dequant_swiglu_quant(
        x, weight_scale=weight_scale, activation_scale=tokens[:, None], quant_scale=factors,
        group_index=COUNTS if grouped else None, activate_left=left, quant_mode=1, swiglu_mode=mode,
    )  # fmt: skip
    check_rows(codes, scales, expected)


def test_a_bias_is_added_to_the_sums_and_a_row_of_zeros_has_scale_zero():
    sums = torch.randint(-300, 300, (T, 2 * H), generator=generator(0), dtype=torch.int32)
    bias = torch.randint(-300, 300, (2 * H,), generator=generator(1), dtype=torch.int32)
    sums[2] = -bias
    scale = torch.full((1, 2 * H), 0.01)
    codes, scales = ops.npu_dequant_swiglu_quant(sums, weight_scale=scale, bias=bias, activate_left=True, quant_mode=1)
    check_rows(codes, scales, literal((sums + bias).double().numpy() * 0.01, left=True))
    assert scales[2] == 0 and not codes[2].any()


def test_static_quantization_is_refused():
    with pytest.raises(NotImplementedError, match="quant_mode=0"):
        ops.npu_dequant_swiglu_quant(torch.zeros(2, 4))
    with pytest.raises(NotImplementedError, match="dst_type"):
        ops.npu_dequant_swiglu_quant(torch.zeros(2, 4), quant_mode=1, dst_type=ops.FLOAT8_E4M3FN)


@pytest.mark.parametrize("kind", [0, 1])
def test_the_fused_int8_matmul_equals_raw_sums_and_the_step_after_it(kind):
    x = torch.randint(-128, 128, (T, K), generator=generator(0), dtype=torch.int8)
    weight = torch.randint(-128, 128, (E, K, 2 * H), generator=generator(1), dtype=torch.int8)
    scale, tokens = torch.rand(E, 2 * H) * 0.01, torch.rand(T) * 0.01
    codes, scales = ops.npu_grouped_matmul_swiglu_quant_v2(
        x, [weight], [scale], tokens, COUNTS if kind else COUNTS.cumsum(0), group_list_type=kind
    )
    (sums,) = ops.npu_grouped_matmul(
        [x], [weight], group_list=COUNTS, group_list_type=1, split_item=2, group_type=0, output_dtype=ops.INT32
    )
    apart = ops.npu_dequant_swiglu_quant(
        sums, weight_scale=scale, activation_scale=tokens, group_index=COUNTS, activate_left=True, quant_mode=1
    )
    torch.testing.assert_close(scales, apart[1])
    assert (codes.int() - apart[0].int()).abs().max() <= 1
    assert not codes[5:].any() and not scales[5:].any()


@pytest.mark.parametrize("smooth_shape", [(E, H), (E,)])
def test_smoothing_factors_of_the_fused_int4_matmul_are_those_of_the_expert(smooth_shape):
    x = torch.zeros(T, K // 8, dtype=torch.int32) + 0x11111111
    weight = torch.zeros(E, K, 2 * H // 8, dtype=torch.int32) + 0x11111111
    scale = torch.ones(E, 2 * H).view(torch.int32).long()
    smooth = torch.rand(smooth_shape, generator=generator(0)) + 0.5
    codes, scales = ops.npu_grouped_matmul_swiglu_quant_v2(
        x, [weight], [scale], torch.ones(T) / K, COUNTS, smooth_scale=smooth, group_list_type=1
    )
    values = smooth.view(E, -1).double().expand(E, H)[[0, 0, 0, 2, 2]].numpy() * sigmoid(1.0)
    check_rows(codes[:5], scales[:5], values)


@pytest.mark.parametrize("target", [ops.FLOAT8_E4M3FN, ops.FLOAT4_E2M1FN_X2])
def test_the_fused_mx_matmul_quantizes_the_activation_of_the_fp32_product(target):
    x, x_scale = mx.quantize(torch.randn(T, K, generator=generator(0)), "e4m3")
    weight, scale = mx.quantize(torch.randn(E, 2 * H, K, generator=generator(1)), "e4m3")
    codes, scales = ops.npu_grouped_matmul_swiglu_quant_v2(
        x, [weight.transpose(1, 2)], [scale.transpose(1, 2)], x_scale, COUNTS.cumsum(0), dequant_mode=2, quant_mode=2,
        quant_dtype=target, weight_scale_dtype=ops.FLOAT8_E8M0FNU, x_scale_dtype=ops.FLOAT8_E8M0FNU,
    )  # fmt: skip
    rows, weights = mx.dequantize(x, x_scale, "e4m3"), mx.dequantize(weight, scale, "e4m3")
    product = torch.stack([rows[i] @ weights[e].t() for i, e in enumerate([0, 0, 0, 2, 2])])
    gate, up = product.chunk(2, 1)
    expected = mx.quantize(torch.nn.functional.silu(gate) * up, {292: "e4m3", 296: "e2m1"}[target])
    assert torch.equal(scales[:5], expected[1]) and not scales[5:].any()
    assert (codes[:5].view(torch.uint8) != expected[0].view(torch.uint8)).float().mean() < 0.02
