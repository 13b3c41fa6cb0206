"""Plain weights: one cast, one matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from framework import ops
from framework.ops.linear import linear as float_linear
from framework.quantization.schemes.base import Operands
from framework.quantization.tensor import QuantTensor


def prepare(weight: QuantTensor, *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Dequantize where needed, cast to the activations' dtype, tile for the NPU's matmul."""
    values = weight.codes if weight.is_float else weight.dequantize()
    operand = values.to(device=device, dtype=dtype).contiguous()
    operand = ops.npu_format_cast(operand, ops.ACL_FORMAT_FRACTAL_NZ)
    return Operands(operand, nbytes=operand.nbytes)


def linear(x: Tensor, operands: Operands) -> Tensor:
    """[T, K] -> [T, N]."""
    return float_linear(x, operands.weight)
