"""8-bit weights, float activations: `npu_weight_quant_batchmatmul` on int8 codes."""

from __future__ import annotations

import torch

from framework.quantization.schemes import weight_only
from framework.quantization.schemes.base import Operands
from framework.quantization.tensor import QuantTensor


def prepare(weight: QuantTensor, *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Weight int8 [K, N], scale and offset [G, N] in `dtype`."""
    if weight.bits != 8:
        raise ValueError(f"w8a16 takes codes of 8 bits, not {weight.bits}")
    return weight_only.operands(weight, dtype, device)


linear = weight_only.linear
