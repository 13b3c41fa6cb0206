"""What w4a16 and w8a16 share: the operands of `npu_weight_quant_batchmatmul`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from framework import ops
from framework.ops.layout import held_bytes, stack_experts, weight_operand
from framework.ops.nibbles import Nibbles
from framework.quantization.schemes.base import Experts, Operands, entering, experts_of_rows, grouped_matmul, inputs_of
from framework.quantization.tensor import QuantTensor

# From here on an offset minimum / scale overflows fp16, and codes change the minimum by less than bf16 can tell.
_DWARFED = 32768


def signed(weight: QuantTensor) -> tuple[Tensor | Nibbles, Tensor, Tensor | None]:
    """Return signed codes [N, K] (int8 or packed), fp32 scale and offset [G, N]; value = (code + offset) * scale.

    Codes 0 .. 2^bits - 1 are shifted down by half the range, which the offset takes back. A group whose minimum
    dwarfs its scale (which may be 0) holds one value everywhere: its scale becomes the minimum, its codes 0, its
    offset 1.
    """
    if weight.scale is None:
        raise ValueError("a weight-only scheme takes integer codes, this weight is float")
    scale = weight.scale.float()
    if isinstance(weight.stored, Nibbles) and weight.minimum is None:
        offset = None if weight.zero is None else weight.zero.float().neg().t().contiguous()
        return weight.stored, scale.t().contiguous(), offset
    codes = weight.codes
    half = 1 << (weight.bits - 1)
    # torch looks through a transposed view ten times as slowly
    in_memory = codes.t() if codes.t().is_contiguous() else codes
    low, high = (int(end) for end in in_memory.aminmax())
    shift = half if high >= half else 0
    if low - shift < -half or high - shift >= half:
        raise ValueError(f"codes do not fit {weight.bits} bits")
    # modulo 256
    codes = (codes.view(torch.uint8) - shift).view(torch.int8) if shift else codes.view(torch.int8)
    offset = None
    if weight.zero is not None:
        offset = shift - weight.zero.float()
    elif weight.minimum is not None:
        minimum = weight.minimum.float()
        flat = scale.abs() * _DWARFED <= minimum.abs()
        if flat.any():
            codes = codes.masked_fill(flat.repeat_interleave(weight.group_size, dim=1), 0)
            scale = torch.where(flat, minimum, scale)
        offset = torch.where(flat, 1.0, minimum / torch.where(flat, 1.0, scale) + shift)
    elif shift:
        offset = torch.full_like(scale, shift)
    return codes, scale.t().contiguous(), None if offset is None else offset.t().contiguous()


def operands(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Operands:
    """Prepare codes of 4 or 8 bits: int32 [K, N/8] or int8 [K, N], scale and offset [G, N] of `dtype`."""
    codes, scale, offset = signed(weight)
    operand = weight_operand(
        codes,
        bits=weight.bits,
        scale=scale,
        offset=offset,
        dtype=dtype,
        device=device,
        values=lambda: replace(weight, order=None).dequantize(),  # columns as the codes have them
    )
    scale = scale.to(device=device, dtype=dtype)
    offset = None if offset is None else offset.to(device=device, dtype=dtype)
    nbytes = held_bytes(operand) + sum(t.nbytes for t in (scale, offset) if t is not None)
    # One group is the operator's per-channel form, which it names 0.
    group_size = 0 if scale.shape[0] == 1 else weight.group_size
    inputs = inputs_of(weight, dtype, device)
    return Operands(operand, scale, offset, group_size=group_size, inputs=inputs, nbytes=nbytes)


def linear(x: Tensor, weight: Operands) -> Tensor:
    """[T, K] -> [T, N]."""
    x = entering(x, weight) if weight.inputs else x
    return ops.npu_weight_quant_batchmatmul(  # type: ignore[no-any-return]
        x, weight.weight, weight.scale, weight.offset, antiquant_group_size=weight.group_size
    )


def prepare_experts(weights: Experts, *, dtype: torch.dtype, device: torch.device) -> Operands:
    """Prepare codes of all experts: int32 [E, K, N/8] or int8 [E, K, N], scale and offset [E, G, N] (one: [E, N]).

    One expert after another, so that no more than one is held as codes. `inputs` has `order` [E, K] if one has any.
    """
    made: list[Tensor] = []
    orders: list[Tensor | None] = []
    scale = offset = None
    for e, weight in enumerate(weights):
        operand, own_scale, own_offset = _expert(weight, dtype, device)
        made.append(operand)
        orders.append(weight.order)
        # in one piece from the first: kept apart until the last, they would leave holes where codes were
        if scale is None:
            scale = torch.empty((len(weights), *own_scale.shape), dtype=dtype, device=device)
        scale[e] = own_scale
        if own_offset is not None:
            offset = torch.zeros_like(scale) if offset is None else offset
            offset[e] = own_offset
    if scale is None:
        raise ValueError("there are no experts")
    inputs = {}
    if any(order is not None for order in orders):
        in_order = torch.arange(made[0].shape[0])
        inputs["order"] = torch.stack([in_order if order is None else order for order in orders]).to(device)
    operand = stack_experts(made)
    if scale.shape[1] == 1:
        scale, offset = scale.squeeze(1), None if offset is None else offset.squeeze(1)
    nbytes = held_bytes(operand) + sum(t.nbytes for t in (scale, offset) if t is not None)
    return Operands(operand, scale, offset, inputs=inputs, nbytes=nbytes)


def _expert(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return operand, scale and offset of one expert."""
    codes, scale, offset = signed(weight)
    operand = weight_operand(
        codes,
        bits=weight.bits,
        scale=scale,
        offset=offset,
        dtype=dtype,
        device=device,
        values=lambda: replace(weight, order=None).dequantize(),
    )
    return operand, scale, offset


def grouped(x: Tensor, counts: Tensor, weight: Operands) -> Tensor:
    """[T, K] sorted by expert -> [T, N]."""
    if (order := weight.inputs.get("order")) is not None:
        x = x.gather(1, order[experts_of_rows(counts, x.shape[0])])
    offset = {} if weight.offset is None else {"antiquant_offset": weight.offset}
    return grouped_matmul(x, weight.weight, counts, antiquant_scale=weight.scale, **offset)
