"""Weight-only operands, in the layout that their device multiplies fastest; and operands of many experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from framework import ops
from framework.ops.cpu import packed
from framework.ops.nibbles import Nibbles

# Codes widened to int32 at a time, for packing: 16 MB.
_CHUNK_CODES = 1 << 22


def weight_operand(
    codes: Tensor | Nibbles,
    *,
    bits: int,
    scale: Tensor,
    offset: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    values: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return int32 [K, N/8] (4 bits) or int8 [K, N] (8 bits) for codes [N, K].

    On an NPU, and on the CPU for what torch's int4 kernel does not take (N % 16, K % group, a group other
    than 32, 64, 128 or 256, fp16), this is the operand as documented. Otherwise it has the documented shape,
    dtype and size, but its bytes are in the order of that kernel, or they are elsewhere (fp32). Then it
    carries a `packed.CpuWeight` and only `npu_weight_quant_batchmatmul` can read it: a view or a copy of it
    means nothing.

    Args:
        codes: int8 [N, K], signed; of 4 bits also as their file packs them.
        bits: 4 or 8.
        scale: [G, N] before any rounding to `dtype`.
        offset: [G, N] or None; value = (code + offset) * scale.
        dtype: of the activations.
        device: where the operator runs.
        values: makes the weight [N, K] in fp32 exactly as its format dequantizes it. It serves fp32
            activations on the CPU, where torch's int4 kernel is a slow reference loop.
    """
    n, k = codes.shape
    if device.type == "cpu" and dtype is torch.float32 and values is not None:
        shape, kind = ((k, n // 8), torch.int32) if bits == 4 else ((k, n), torch.int8)
        stand_in = torch.zeros(1, dtype=kind).expand(shape)
        return packed.carry(stand_in, packed.CpuWeight("dense", values().contiguous()))
    if device.type == "cpu" and dtype is torch.bfloat16 and packed.takes(n, k, scale.shape[0]):
        scale = scale.float()
        zero = None if offset is None else offset.float() * scale
        form = packed.pack(codes, scale, zero, bits)
        if bits == 4:
            return packed.carry(form.codes.view(-1).view(torch.int32).view(k, n // 8), form)
        return packed.carry(form.codes.view(torch.int8).view(k, n), form)
    features = (codes.unpack() if isinstance(codes, Nibbles) else codes).t().contiguous()
    if bits == 8:
        return features.to(device)
    chunks = features.split(max(_CHUNK_CODES // n, 1))
    return torch.cat([ops.npu_convert_weight_to_int4pack(chunk.to(device).int()) for chunk in chunks])


def tiled(operand: Tensor) -> Tensor:
    """Cast [.., R, C] to FRACTAL_NZ where its tiles of 16 rows and 32 bytes fit; matmuls take it plain, too."""
    rows, columns = operand.shape[-2:]
    if rows % 16 or columns * operand.element_size() % 32:
        return operand
    cast: Tensor = ops.npu_format_cast(operand, ops.ACL_FORMAT_FRACTAL_NZ)
    return cast


def stack_experts(operands: Sequence[Tensor]) -> Tensor:
    """Return one operand [E, ..] of `npu_grouped_matmul` for the operands of E weights of one shape.

    Those are `weight_operand`'s here, or those of `quant_layout`. If they have forms of their own, the result is a
    stand-in that carries all of them: only the grouped operators can read it, a view or a copy means nothing.
    Transposed views stay transposed.
    """
    first = operands[0]
    forms = tuple(form for form in map(packed.private, operands) if form is not None)
    if len(forms) == len(operands):
        stand_in = torch.zeros(1).to(first.dtype).expand(len(operands), *first.shape)
        return packed.carry_experts(stand_in, forms)
    if first.is_contiguous():
        return torch.stack(list(operands))
    return torch.stack([operand.t() for operand in operands]).transpose(1, 2)


def held_bytes(operand: Tensor) -> int:
    """Return the bytes of memory behind an operand, in whatever form it is."""
    forms = packed.private_experts(operand) or [packed.private(operand)]
    return sum(operand.nbytes if form is None else form.nbytes for form in forms)
