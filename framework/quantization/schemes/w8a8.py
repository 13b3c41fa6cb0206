"""8-bit weights and activations on the int8 units: scales of the activations from the file, or one a token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from framework import ops
from framework.ops.layout import tiled
from framework.ops.quant_layout import int8_operand
from framework.quantization.schemes.base import (
    DTYPE_NUMBERS,
    Operands,
    entering,
    grouped_matmul,
    held_bytes,
    inputs_of,
)
from framework.quantization.tensor import QuantTensor

QINT8 = 12  # of npu_quantize: torch's number of qint8


def expert_weight(weights: Sequence[QuantTensor], device: torch.device) -> Tensor:
    """Return int8 codes [N, K] of all experts as the operand [E, K, N]: a transposed view, tiled on an NPU."""
    return tiled(torch.stack([weight.codes for weight in weights]).to(device)).transpose(1, 2)


def prepare_static(weight: QuantTensor, *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Weight int8 [K, N], deq_scale fp32 [N], correction int32 [N]; what quantizes the activations, fp32.

    A file that gives weight and input scales but no merged ones (compressed-tensors) gets them here:
    deq_scale = input_scale * weight_scale, correction = -input_offset * sum_k code.
    """
    if weight.scale is None or weight.zero is not None:
        raise ValueError("w8a8_static takes symmetric int8 codes")
    k = weight.shape[1]
    scale, offset = (weight.whole[name].float().reshape(-1) for name in ("input_scale", "input_offset"))
    deq_scale = weight.rows.get("deq_scale")
    if deq_scale is None:
        deq_scale = scale * weight.scale.float().squeeze(1)
    bias = weight.rows.get("quant_bias")
    if bias is None:
        bias = -(offset.double() * weight.codes.sum(1, dtype=torch.int64)).round().to(torch.int32)
    operand = int8_operand(weight.codes, device)
    factor, shift = (value.expand(k).contiguous().to(device) for value in (1.0 / scale, offset))
    deq_scale, bias = deq_scale.float().contiguous().to(device), bias.contiguous().to(device)
    return Operands(
        operand,
        deq_scale,
        bias=bias,
        inputs={**inputs_of(weight, dtype, device), "scale": factor, "offset": shift},
        nbytes=held_bytes(operand, deq_scale, bias),
    )


def linear_static(x: Tensor, weight: Operands) -> Tensor:
    """[T, K] -> [T, N]. The scales stay fp32: rounded to bf16 they move up to 8 % of the codes by one."""
    x = entering(x, weight)
    codes = ops.npu_quantize(x.float(), weight.inputs["scale"], weight.inputs["offset"], QINT8, axis=-1, div_mode=False)
    return ops.npu_quant_matmul(  # type: ignore[no-any-return]
        codes, weight.weight, weight.scale, bias=weight.bias, output_dtype=DTYPE_NUMBERS[x.dtype]
    )


def prepare_dynamic(weight: QuantTensor, *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Weight int8 [K, N], scale fp32 [N]; `offset` fp32 [N] = scale * zero where codes are not symmetric."""
    if weight.scale is None or weight.scale.shape[1] != 1:
        raise ValueError("w8a8_dynamic takes int8 codes with one scale a row")
    operand = int8_operand(weight.codes, device)
    scale = weight.scale.float().squeeze(1).to(device)
    offset = None
    if weight.zero is not None and bool(weight.zero.any()):
        offset = scale * weight.zero.float().squeeze(1).to(device)
    nbytes = held_bytes(operand, scale, offset)
    return Operands(operand, scale, offset, inputs=inputs_of(weight, dtype, device), nbytes=nbytes)


def linear_dynamic(x: Tensor, weight: Operands) -> Tensor:
    """[T, K] -> [T, N]."""
    x = entering(x, weight)
    codes, scale = ops.npu_dynamic_quant(x)
    if weight.offset is None:
        return ops.npu_quant_matmul(  # type: ignore[no-any-return]
            codes, weight.weight, weight.scale, pertoken_scale=scale.flatten(), output_dtype=DTYPE_NUMBERS[x.dtype]
        )
    # the two terms can be far larger than their difference: in bf16 most of it would be lost
    product = ops.npu_quant_matmul(codes, weight.weight, weight.scale, output_dtype=DTYPE_NUMBERS[torch.int32])
    y = product.float() * weight.scale - codes.sum(-1, keepdim=True, dtype=torch.int32) * weight.offset
    return (y * scale.reshape(-1, 1)).to(x.dtype)


def prepare_experts(weights: Iterable[QuantTensor], *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Weight int8 [E, K, N], scale [E, N] in bf16 for bf16 activations, else fp32."""
    weights = list(weights)
    if any(weight.scale is None or weight.scale.shape[1] != 1 for weight in weights):
        raise ValueError("w8a8_dynamic takes int8 codes with one scale a row")
    if any(weight.zero is not None and bool(weight.zero.any()) for weight in weights):
        raise ValueError("the grouped operator takes symmetric int8 codes")
    operand = expert_weight(weights, device)
    kept = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    scale = torch.stack([weight.scale.squeeze(1) for weight in weights if weight.scale is not None])
    scale = scale.to(device=device, dtype=kept)
    return Operands(operand, scale, nbytes=held_bytes(operand, scale))


def grouped(x: Tensor, counts: Tensor, weight: Operands) -> Tensor:
    """[T, K] sorted by expert -> [T, N]."""
    codes, scale = ops.npu_dynamic_quant(x)
    return grouped_matmul(
        codes,
        weight.weight,
        counts,
        scale=weight.scale,
        per_token_scale=scale.flatten(),
        output_dtype=DTYPE_NUMBERS[x.dtype],
    )
