"""4-bit weights, 8-bit activations: scales a row or a group, one a token.

The operators take groups of 256, or one scale a row. Other groups run as one int8 product a group, whose results are
added in fp32: the same sum, in the same precision.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from framework import ops
from framework.ops.layout import stack_experts
from framework.ops.quant_layout import int4_operand, int8_operand
from framework.quantization.schemes.base import (
    DTYPE_NUMBERS,
    Operands,
    entering,
    experts_of_rows,
    grouped_matmul,
    held_bytes,
    inputs_of,
)
from framework.quantization.schemes.w4a4 import as_int64
from framework.quantization.schemes.w8a8 import expert_weight
from framework.quantization.tensor import QuantTensor

OP_GROUP = 256
# The grouped kernel splits x into 16 * high + low with low in -8..7, and adds 8 * sum_k w for the shift.
_SHIFT = 8.0


def prepare(weight: QuantTensor, *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Weight int32 [K, N/8] and scale int64 [K/256, N]; or, for other groups, int8 [K, N] and fp32 [G, N]."""
    codes, scale, group = _symmetric(weight)
    n, k = codes.shape
    if (group == k or group % OP_GROUP == 0) and k % OP_GROUP == 0 and n % 8 == 0:
        operand = int4_operand(codes, device)
        repeats = (k if group == k else group) // OP_GROUP
        scale = as_int64(scale.repeat_interleave(repeats, dim=1).t().contiguous()).to(device)
        inputs = inputs_of(weight, dtype, device)
        return Operands(operand, scale, group_size=OP_GROUP, inputs=inputs, nbytes=held_bytes(operand, scale))
    scale = scale.t().contiguous().to(device)
    operand = int8_operand(codes, device) if len(scale) == 1 else _pieces(codes, len(scale), device)
    inputs = inputs_of(weight, dtype, device)
    return Operands(operand, scale, inputs=inputs, nbytes=held_bytes(operand, scale))


def _pieces(codes: Tensor, groups: int, device: torch.device) -> Tensor:
    """Return [G, .., K/G, N] for int8 codes [.., N, K]: each group an operand of its own.

    Not tiled: a part of a tiled operand is none, and tiling each would need G tensors.
    """
    pieces = codes.to(device).unflatten(-1, (groups, -1)).movedim(-2, 0).contiguous().transpose(-1, -2)
    return pieces if device.type == "cpu" else pieces.contiguous()


def _symmetric(weight: QuantTensor) -> tuple[Tensor, Tensor, int]:
    """Return int8 codes [N, K], fp32 scale [N, G], the group."""
    if weight.scale is None:
        raise ValueError("w4a8_dynamic takes int4 codes")
    if weight.zero is not None and bool(weight.zero.any()):
        raise ValueError("w4a8_dynamic takes symmetric codes")
    return weight.codes, weight.scale.float(), weight.group_size


def linear(x: Tensor, weight: Operands) -> Tensor:
    """[T, K] -> [T, N]."""
    x = entering(x, weight)
    codes, scale = ops.npu_dynamic_quant(x)
    per_token, dtype = scale.flatten(), DTYPE_NUMBERS[x.dtype]
    if weight.group_size:
        return ops.npu_quant_matmul(  # type: ignore[no-any-return]
            codes,
            weight.weight,
            weight.scale,
            pertoken_scale=per_token.unsqueeze(1),
            output_dtype=dtype,
            group_sizes=[0, 0, OP_GROUP],
        )
    assert weight.scale is not None
    groups = weight.scale.shape[0]
    size = codes.shape[-1] // groups
    if groups == 1:
        return ops.npu_quant_matmul(  # type: ignore[no-any-return]
            codes, weight.weight, weight.scale[0], pertoken_scale=per_token, output_dtype=dtype
        )
    y = torch.zeros((), device=x.device)
    for g in range(groups):
        part = codes[:, g * size : (g + 1) * size].contiguous()
        product = ops.npu_quant_matmul(part, weight.weight[g], weight.scale[g], output_dtype=DTYPE_NUMBERS[torch.int32])
        y = y + product.float() * weight.scale[g]
    return (y * per_token.unsqueeze(1)).to(x.dtype)


def _clipped(x: Tensor, counts: Tensor, alpha: Tensor | None) -> Tensor:
    """Clip each row [K] at its expert's share `alpha` [E] of the row's largest value (activation clip)."""
    if alpha is None:
        return x
    most = alpha[experts_of_rows(counts, x.shape[0])].to(x.dtype) * x.abs().amax(-1)
    return torch.minimum(torch.maximum(x, -most.unsqueeze(1)), most.unsqueeze(1))


def prepare_experts(weights: Iterable[QuantTensor], *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Weight int32 [E, K, N/8], scale int64 [E, 1 or K/256, N], correction fp32 [E, N]; other groups as int8 pieces.

    The correction is summed from the codes, not taken from the file, whose tensor is rounded and one rank's too many.
    """
    weights = list(weights)
    forms = [_symmetric(weight) for weight in weights]
    (n, k), group = forms[0][0].shape, forms[0][2]
    scale = torch.stack([scale.t() for _, scale, _ in forms])
    inputs = {}
    if "alpha" in weights[0].whole:
        inputs["alpha"] = torch.cat([weight.whole["alpha"].float() for weight in weights]).to(device)
    if (group == k or (group % OP_GROUP == 0 and k % OP_GROUP == 0)) and n % 8 == 0:
        repeats = 1 if group == k else group // OP_GROUP
        operand = stack_experts([int4_operand(codes, device) for codes, _, _ in forms])
        operand = ops.npu_format_cast(operand, ops.ACL_FORMAT_FRACTAL_NZ)
        bias = torch.stack([_SHIFT * weight.dequantize().double().sum(1).float() for weight in weights]).to(device)
        scale = as_int64(scale.repeat_interleave(repeats, dim=1).contiguous()).to(device)
        nbytes = held_bytes(operand, scale, bias)
        return Operands(operand, scale, bias=bias, group_size=group, inputs=inputs, nbytes=nbytes)
    groups, scale = scale.shape[1], scale.contiguous().to(device)
    if groups == 1:
        operand = expert_weight(weights, device)
    else:
        operand = _pieces(torch.stack([codes for codes, _, _ in forms]), groups, device)
    return Operands(operand, scale, inputs=inputs, nbytes=held_bytes(operand, scale))


def grouped(x: Tensor, counts: Tensor, weight: Operands) -> Tensor:
    """[T, K] sorted by expert -> [T, N]."""
    codes, scale = ops.npu_dynamic_quant(_clipped(x, counts, weight.inputs.get("alpha")))
    per_token, dtype = scale.flatten(), DTYPE_NUMBERS[x.dtype]
    if weight.group_size:
        return grouped_matmul(
            codes,
            weight.weight,
            counts,
            scale=weight.scale,
            bias=weight.bias,
            per_token_scale=per_token,
            output_dtype=dtype,
        )
    assert weight.scale is not None
    groups = weight.scale.shape[1]
    size = codes.shape[-1] // groups
    if groups == 1:
        return grouped_matmul(
            codes, weight.weight, counts, scale=weight.scale[:, 0], per_token_scale=per_token, output_dtype=dtype
        )
    y, experts = torch.zeros((), device=x.device), experts_of_rows(counts, x.shape[0])
    for g in range(groups):
        part = codes[:, g * size : (g + 1) * size].contiguous()
        product = grouped_matmul(part, weight.weight[g], counts, output_dtype=DTYPE_NUMBERS[torch.int32])
        y = y + product.float() * weight.scale[:, g][experts]
    return (y * per_token.unsqueeze(1)).to(x.dtype)
