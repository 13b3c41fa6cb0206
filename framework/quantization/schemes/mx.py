"""Microscaling formats on A5: blocks of 32 share a power of two; fp8 or fp4 weights and activations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from framework import ops
from framework.ops import packing
from framework.ops.quant_layout import mx_experts_operand, mx_operand
from framework.quantization.schemes.base import DTYPE_NUMBERS, Operands, entering, grouped_matmul, held_bytes, inputs_of
from framework.quantization.tensor import QuantTensor

BLOCK_GROUPS = [1, 1, 32]
E8M0 = ops.FLOAT8_E8M0FNU
FP4 = ops.FLOAT4_E2M1FN_X2


def _codes(weight: QuantTensor) -> Tensor:
    """Return e4m3 [N, K], or e2m1 codes two a byte [N, K/2]."""
    return weight.codes if weight.element == "e4m3" else packing.pack_fp4(weight.codes)


def _scales(weight: QuantTensor) -> Tensor:
    """Return e8m0 bytes in pairs, uint8 [N, ceil(K/64), 2]; an odd last block is paired with 0."""
    if weight.scale is None:
        raise ValueError("an MX scheme takes codes with e8m0 scales, this weight is float")
    scale = weight.scale
    if scale.shape[1] % 2:
        scale = torch.nn.functional.pad(scale, (0, 1))
    return scale.unflatten(1, (-1, 2)).contiguous()


def prepare(weight: QuantTensor, *, dtype: torch.dtype, device: torch.device, beside_fp8: bool = False) -> Operands:
    """Weight [K, N] (fp4: [K/2, N]) and scale [ceil(K/64), N, 2]: views, which the operator wants transposed alike.

    `beside_fp8`: a weight in fp4 for activations in fp8.
    """
    pairs = _scales(weight)
    operand = mx_operand(_codes(weight).contiguous(), pairs, weight.element, dtype, device, beside_fp8=beside_fp8)
    scale = pairs.to(device).transpose(0, 1)
    inputs = inputs_of(weight, dtype, device)
    return Operands(operand, scale, inputs=inputs, nbytes=held_bytes(operand, scale))


def linear_fp8(x: Tensor, weight: Operands) -> Tensor:
    """[T, K] -> [T, N], activations in e4m3."""
    codes, scale = ops.npu_dynamic_mx_quant(entering(x, weight), dst_type=ops.FLOAT8_E4M3FN)
    return _product(x, codes, scale, weight)


def linear_fp4(x: Tensor, weight: Operands) -> Tensor:
    """[T, K] -> [T, N], activations in e2m1, ties away from zero."""
    codes, scale = ops.npu_dynamic_mx_quant(entering(x, weight), dst_type=FP4, round_mode="round")
    return _product(x, codes, scale, weight, x1_dtype=FP4, x2_dtype=FP4)


def linear_fp8_fp4(x: Tensor, weight: Operands) -> Tensor:
    """[T, K] -> [T, N], weights in e2m1, activations in e4m3."""
    codes, scale = ops.npu_dynamic_mx_quant(entering(x, weight), dst_type=ops.FLOAT8_E4M3FN)
    return _product(x, codes, scale, weight, x2_dtype=FP4, group_sizes=[0, 0, 32])


def _product(x: Tensor, codes: Tensor, scale: Tensor, weight: Operands, **others: object) -> Tensor:
    return ops.npu_quant_matmul(  # type: ignore[no-any-return]
        codes,
        weight.weight,
        weight.scale,
        scale_dtype=E8M0,
        pertoken_scale=scale,
        pertoken_scale_dtype=E8M0,
        output_dtype=DTYPE_NUMBERS[x.dtype],
        **{"group_sizes": BLOCK_GROUPS, **others},
    )


def prepare_dual(weight: QuantTensor, *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Weight uint8 [N, K/2], `scale` e8m0 [N, ceil(K/64), 2], `offset` the outer scale fp32 [ceil(K/512), N]."""
    if weight.outer is None:
        raise ValueError("mxfp4_dualscale takes codes with an outer scale")
    codes = _codes(weight).contiguous().view(torch.int8).to(device)
    operand = ops.npu_format_cast(codes, ops.ACL_FORMAT_FRACTAL_NZ, customize_dtype=ops.INT8)
    scale, outer = _scales(weight).to(device), weight.outer.float().t().contiguous().to(device)
    inputs = inputs_of(weight, dtype, device)
    return Operands(operand, scale, outer, inputs=inputs, nbytes=held_bytes(operand, scale, outer))


def linear_dual(x: Tensor, weight: Operands) -> Tensor:
    """[T, K] -> [T, N]."""
    codes, outer, inner = ops.npu_dynamic_dual_level_mx_quant(entering(x, weight))
    return ops.npu_dual_level_quant_matmul(  # type: ignore[no-any-return]
        codes, weight.weight, outer, weight.offset, inner, weight.scale, output_dtype=DTYPE_NUMBERS[x.dtype]
    )


def prepare_experts(
    weights: Iterable[QuantTensor], *, dtype: torch.dtype, device: torch.device, beside_fp8: bool = False
) -> Operands:
    """Weight [E, K, N] (fp4: [E, K/2, N]) and scale [E, ceil(K/64), N, 2]: transposed views."""
    weights = list(weights)
    pairs = [_scales(weight) for weight in weights]
    codes = [_codes(weight).contiguous() for weight in weights]
    operand = mx_experts_operand(codes, pairs, weights[0].element, dtype, device, beside_fp8=beside_fp8)
    scale = torch.stack(pairs).to(device).transpose(1, 2)
    return Operands(operand, scale, nbytes=held_bytes(operand, scale))


def grouped_fp8(x: Tensor, counts: Tensor, weight: Operands) -> Tensor:
    """[T, K] sorted by expert -> [T, N]."""
    codes, scale = ops.npu_dynamic_mx_quant(x, dst_type=ops.FLOAT8_E4M3FN)
    return grouped_matmul(codes, weight.weight, counts, scale=weight.scale, **_grouped(x, scale))


def grouped_fp4(x: Tensor, counts: Tensor, weight: Operands) -> Tensor:
    """[T, K] sorted by expert -> [T, N]."""
    codes, scale = ops.npu_dynamic_mx_quant(x, dst_type=FP4, round_mode="round")
    dtypes = {"x_dtype": FP4, "weight_dtype": FP4}
    return grouped_matmul(codes, weight.weight, counts, scale=weight.scale, **dtypes, **_grouped(x, scale))


def grouped_fp8_fp4(x: Tensor, counts: Tensor, weight: Operands) -> Tensor:
    """[T, K] sorted by expert -> [T, N]. The operator takes the weight's scale as antiquant_scale here."""
    codes, scale = ops.npu_dynamic_mx_quant(x, dst_type=ops.FLOAT8_E4M3FN)
    given = _grouped(x, scale)
    del given["scale_dtype"]
    return grouped_matmul(codes, weight.weight, counts, antiquant_scale=weight.scale, weight_dtype=FP4, **given)


def _grouped(x: Tensor, scale: Tensor) -> dict[str, object]:
    return {
        "per_token_scale": scale,
        "scale_dtype": E8M0,
        "per_token_scale_dtype": E8M0,
        "output_dtype": DTYPE_NUMBERS[x.dtype],
    }
