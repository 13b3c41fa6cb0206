"""Weight layouts: what `npu_weight_quant_batchmatmul` reads fastest on the device at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class CpuWeight:
    """The CPU's own form of a packed weight [K, N], carried by the tensor it shares its bytes with.

    `kind`: `int4` or `int8` (codes of 8 bits as two codes of 4 bits), or `dense`.
    `codes`: torch's int4pack bytes [N, K/2] (int8: [N, K]), or the fp32 weight [N, K].
    `scale_and_zero`: [G, N, 2] bf16 for the int4pack kernel, else None.
    """

    kind: str
    codes: Tensor
    group_size: int
    scale_and_zero: Tensor | None = None

    def multiply(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        if self.scale_and_zero is None:
            return functional.linear(x, self.codes)
        if self.kind == "int8":
            x = torch.cat((x, x), dim=1)
        return torch._weight_int4pack_mm_for_cpu(x, self.codes, self.group_size, self.scale_and_zero)


def private(weight: Tensor) -> CpuWeight | None:
    """Return the CPU's own form of a weight, if `device_layout` made one."""
    return getattr(weight, "_cpu_weight", None)


def device_layout(
    weight: Tensor,
    *,
    scale: Tensor,
    offset: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    values: Tensor | None = None,
) -> Tensor:
    """Return the weight operand in the layout that its device multiplies fastest; same shape, dtype, bytes.

    On an NPU that is the weight itself. On the CPU its storage may be rewritten into the order of torch's
    int4 kernel; the tensor then carries a `CpuWeight`, and only `npu_weight_quant_batchmatmul` can read it
    (a view or a copy of it is meaningless).

    Args:
        weight: int32 [K, N/8] or int8 [K, N], as documented for the operator.
        scale: [G, N] of any float dtype; the more precise, the better the CPU's form.
        offset: [G, N] or None.
        group_size: K / G.
        dtype: of the activations.
        values: the weight [N, K] in fp32 exactly as its format dequantizes it; used for fp32 activations on
            the CPU, where torch's int4 kernel is a slow reference loop.

    Returns:
        The operand. Shapes that torch's int4 kernel does not take (N % 16, K % group, group not 32, 64, 128
        or 256, activations neither bf16 nor fp32) come back as they are and run the plain form.
    """
    if weight.device.type != "cpu":
        return weight
    if dtype is torch.float32 and values is not None:
        return _carry(weight.view(weight.shape), CpuWeight("dense", values.contiguous(), group_size))
    k = weight.shape[0]
    n = scale.shape[-1]
    if dtype is not torch.bfloat16 or n % 16 or k % group_size or group_size not in (32, 64, 128, 256):
        return weight
    scale = scale.float()
    zero = torch.zeros_like(scale) if offset is None else offset.float() * scale
    if weight.dtype is torch.int32:
        codes = unpack_int4(weight).t().int().add_(8)
        pairs = torch.stack((scale, zero), dim=-1)
        kind = "int4"
    else:
        # q + 128 = 16 h + l with h and l in 0..15, so q * s = (h - 8) * 16 s + (l - 8) * s + 8 s.
        unsigned = weight.t().int().add_(128)
        codes = torch.cat((unsigned >> 4, unsigned & 15), dim=1)
        high = torch.stack((scale * 16, torch.zeros_like(scale)), dim=-1)
        pairs = torch.cat((high, torch.stack((scale, zero + 8 * scale), dim=-1)))
        kind = "int8"
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
    operand = packed.view(-1).view(weight.dtype).view(weight.shape)
    return _carry(operand, CpuWeight(kind, packed, group_size, pairs.to(dtype).contiguous()))


def held_bytes(operand: Tensor) -> int:
    """Return the bytes of memory behind an operand, its private form included."""
    form = private(operand)
    if form is None:
        return operand.nbytes
    if form.scale_and_zero is None:
        return operand.nbytes + form.codes.nbytes
    return form.codes.nbytes + form.scale_and_zero.nbytes


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the int8 codes [.., N] of int32 carriers [.., N/8], low nibble first."""
    low_first = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (packed.unsqueeze(-1) >> low_first) & 15
    return ((nibbles ^ 8) - 8).to(torch.int8).flatten(-2)


def _carry(operand: Tensor, form: CpuWeight) -> Tensor:
    operand._cpu_weight = form  # type: ignore[attr-defined]
    return operand
