"""Plain weights: one cast, one matmul."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from framework.ops.layout import tiled
from framework.ops.linear import linear as float_linear
from framework.quantization.schemes.base import Operands, grouped_matmul
from framework.quantization.tensor import QuantTensor


def prepare(weight: QuantTensor, *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Dequantize where needed, cast to the activations' dtype, tile for the NPU's matmul."""
    values = weight.codes if weight.is_float else weight.dequantize()
    operand = tiled(values.to(device=device, dtype=dtype).contiguous())
    return Operands(operand, nbytes=operand.nbytes)


def linear(x: Tensor, operands: Operands, bias: Tensor | None = None) -> Tensor:
    """[T, K] -> [T, N], the bias [N] added by the same call."""
    return float_linear(x, operands.weight, bias)


def prepare_experts(weights: Iterable[QuantTensor], *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Weight [E, K, N], the transposed view of [E, N, K]."""
    weights = list(weights)
    first = weights[0]
    stacked = torch.empty((len(weights), *first.shape), dtype=dtype, device=device)
    for e, weight in enumerate(weights):
        stacked[e].copy_(weight.codes if weight.is_float else weight.dequantize())
    operand = tiled(stacked)
    return Operands(operand.transpose(1, 2), nbytes=operand.nbytes)


def grouped(x: Tensor, counts: Tensor, operands: Operands) -> Tensor:
    """[T, K] sorted by expert -> [T, N]."""
    return grouped_matmul(x, operands.weight, counts)
