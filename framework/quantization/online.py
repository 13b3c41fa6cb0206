"""Float weights to quantized ones, round to nearest: what `quantization.online` does at load."""

from __future__ import annotations

import torch
from torch import Tensor

from framework import ops
from framework.quantization.tensor import MX_BLOCK, QuantTensor

# Codes of each integer scheme are -MOST - 1 .. MOST, scales amax / MOST.
MOST = {"w8a8_dynamic": 127, "w8a16": 127, "w4a16": 7}
BITS = {127: 8, 7: 4}
MX = {"mxfp8": 8, "mxfp4": 4, "mxfp4_dualscale": 4, "w4a8_mxfp": 4}


def quantize(weight: Tensor, scheme: str, group: int) -> QuantTensor:
    """Quantize a weight [N, K] of whole rows.

    Args:
        weight: fp32, fp16 or bf16.
        scheme: w8a8_dynamic, w8a16, w4a16, mxfp8, mxfp4, mxfp4_dualscale or w4a8_mxfp.
        group: input features that share a scale (integers; 0: all of a row). Blocks of MX are 32.

    Returns:
        Symmetric integer codes with fp32 scales amax / 127 or amax / 7 (an all-zero group: scale 1), or MX codes as
        npu_dynamic_mx_quant makes them (fp4: ties away from zero), under outer scales amax / 6 of 512 if two-level.

    Raises:
        ValueError: any other scheme.
    """
    if scheme in MOST:
        return _integers(weight.float(), MOST[scheme], group)
    if scheme not in MX:
        raise ValueError(f"no weight is made {scheme} at load")
    outer = None
    if scheme == "mxfp4_dualscale":
        codes, outer, scale = ops.npu_dynamic_dual_level_mx_quant(weight, round_mode="round")
    elif scheme == "mxfp8":
        codes, scale = ops.npu_dynamic_mx_quant(weight, dst_type=ops.FLOAT8_E4M3FN, round_mode="rint")
    else:
        codes, scale = ops.npu_dynamic_mx_quant(weight, dst_type=ops.FLOAT4_E2M1FN_X2, round_mode="round")
    bits = MX[scheme]
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    scale = scale.view(torch.uint8).flatten(1)[:, : -(-weight.shape[1] // MX_BLOCK)].contiguous()
    element = "e4m3" if bits == 8 else "e2m1"
    return QuantTensor(codes, scale, group_size=MX_BLOCK, bits=bits, element=element, outer=outer)


def _integers(weight: Tensor, most: int, group: int) -> QuantTensor:
    n, k = weight.shape
    size = group or k
    grouped = weight.view(n, k // size, size)
    largest = grouped.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / most)
    codes = (grouped / scale).round_().clamp_(-most - 1, most).to(torch.int8)
    return QuantTensor(codes.view(n, k), scale.squeeze(-1), group_size=size, bits=BITS[most])
