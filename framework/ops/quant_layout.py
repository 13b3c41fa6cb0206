"""Weight operands of the matmuls with quantized activations, in the layout that their device multiplies fastest.

What the CPU's own forms cost in memory, per weight: int8 8 bits, as stored. int4 8 bits instead of 4, as codes. MX 16
bits instead of 8.25 (fp8) or 4.25 (fp4), as bf16 values, which hold them exactly. `held_bytes` in framework.ops.layout
counts them. The operands as documented work on the CPU, too, and cost no more memory than their checkpoint, but one
row then takes five to ten times as long: every call unpacks the weight. Two-level MX has no other form (bf16 does not
hold it exactly).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from framework import ops
from framework.ops.cpu import mx, packed
from framework.ops.layout import stack_experts, tiled

# Bytes of codes dequantized at a time: 16 to 32 MB of fp32.
_CHUNK_BYTES = 1 << 22
_FP8_TILES = {"customize_dtype": ops.FLOAT8_E4M3FN, "input_dtype": ops.FLOAT4_E2M1FN_X2}


def int8_operand(codes: Tensor, device: torch.device) -> Tensor:
    """Return [K, N] for int8 codes [N, K]."""
    if device.type == "cpu":
        return codes.contiguous().t()
    return tiled(codes.t().contiguous().to(device))


def int4_operand(codes: Tensor, device: torch.device) -> Tensor:
    """Return int32 [K, N/8] for int8 codes -8..7 [N, K]; on the CPU a stand-in that only its operators read."""
    if device.type == "cpu":
        n, k = codes.shape
        form = packed.CpuWeight("codes", codes.contiguous())
        return packed.carry(_stand_in((k, n // 8), torch.int32), form)
    operand: Tensor = ops.npu_convert_weight_to_int4pack(codes.t().contiguous().to(device).int())
    return operand


def mx_operand(
    codes: Tensor,
    scale_bytes: Tensor,
    element: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    beside_fp8: bool = False,
) -> Tensor:
    """Return the weight [K, N] (fp4 [K/2, N]) for `mx.quantize`'s codes [N, K] or [N, K/2].

    `beside_fp8`: fp4 for activations in fp8, which an NPU wants in the tiles of those.

    For bf16 activations on the CPU it is a stand-in that only `npu_quant_matmul` reads; it goes with the scale
    `scale_bytes.transpose(0, 1)`, as any other.
    """
    if device.type != "cpu" and beside_fp8:
        return ops.npu_format_cast(codes.to(device), ops.ACL_FORMAT_FRACTAL_NZ, **_FP8_TILES).t()  # type: ignore[no-any-return]
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return codes.to(device).t()
    step = max(_CHUNK_BYTES // codes.shape[1], 1)
    values = [
        mx.dequantize(codes[first : first + step], scale_bytes[first : first + step], element).bfloat16()
        for first in range(0, codes.shape[0], step)
    ]
    form = packed.CpuWeight("dense", torch.cat(values))
    return packed.carry(_stand_in(codes.t().shape, codes.dtype), form)


def mx_experts_operand(
    codes: Sequence[Tensor],
    scale_bytes: Sequence[Tensor],
    element: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    beside_fp8: bool = False,
) -> Tensor:
    """Return the operand [E, K, N] (fp4 [E, K/2, N]) of all experts: on an NPU tiled before it is transposed."""
    if device.type == "cpu":
        pairs = zip(codes, scale_bytes, strict=True)
        return stack_experts([mx_operand(own, scale, element, dtype, device) for own, scale in pairs])
    tiles = _FP8_TILES if beside_fp8 else {}
    stacked: Tensor = ops.npu_format_cast(torch.stack(list(codes)).to(device), ops.ACL_FORMAT_FRACTAL_NZ, **tiles)
    return stacked.transpose(1, 2)


def _stand_in(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of that shape behind which there is one element."""
    return torch.zeros(1).to(dtype).expand(shape)
