"""4-bit weights and activations on the int4 units, one scale a row and one a token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from framework import ops
from framework.ops.layout import stack_experts
from framework.ops.quant_layout import int4_operand
from framework.quantization.schemes.base import DTYPE_NUMBERS, Operands, entering, grouped_matmul, held_bytes, inputs_of
from framework.quantization.tensor import QuantTensor

QUINT4X2 = 16  # of npu_dynamic_quant: torch's number of quint4x2


def as_int64(scale: Tensor) -> Tensor:
    """Return fp32 scales as the grouped operator takes them: their bits in the low half of int64."""
    return scale.float().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF  # a sign stays in the low half


def prepare(weight: QuantTensor, *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Weight int32 [K, N/8], scale fp32 [N]."""
    scale = row_scale(weight)
    operand = int4_operand(weight.codes, device)
    scale = scale.to(device)
    return Operands(operand, scale, inputs=inputs_of(weight, dtype, device), nbytes=held_bytes(operand, scale))


def row_scale(weight: QuantTensor) -> Tensor:
    """Return fp32 [N] of a symmetric weight with one scale a row."""
    if weight.scale is None or weight.scale.shape[1] != 1:
        raise ValueError("w4a4_dynamic takes int4 codes with one scale a row")
    if weight.zero is not None and bool(weight.zero.any()):
        raise ValueError("the int4 operators take symmetric codes")
    return weight.scale.float().squeeze(1)


def linear(x: Tensor, weight: Operands) -> Tensor:
    """[T, K] -> [T, N]."""
    x = entering(x, weight)
    codes, scale = ops.npu_dynamic_quant(x, dst_type=QUINT4X2)
    return ops.npu_quant_matmul(  # type: ignore[no-any-return]
        codes, weight.weight, weight.scale, pertoken_scale=scale.flatten(), output_dtype=DTYPE_NUMBERS[x.dtype]
    )


def prepare_experts(weights: Iterable[QuantTensor], *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Weight int32 [E, K, N/8], scale int64 [E, N]."""
    weights = list(weights)
    operand = stack_experts([int4_operand(weight.codes, device) for weight in weights])
    operand = ops.npu_format_cast(operand, ops.ACL_FORMAT_FRACTAL_NZ)
    scale = as_int64(torch.stack([row_scale(weight) for weight in weights])).to(device)
    return Operands(operand, scale, nbytes=held_bytes(operand, scale))


def grouped(x: Tensor, counts: Tensor, weight: Operands) -> Tensor:
    """[T, K] sorted by expert -> [T, N]."""
    codes, scale = ops.npu_dynamic_quant(x, dst_type=QUINT4X2)
    return grouped_matmul(
        codes,
        weight.weight,
        counts,
        scale=weight.scale,
        per_token_scale=scale.flatten(),
        output_dtype=DTYPE_NUMBERS[x.dtype],
    )
