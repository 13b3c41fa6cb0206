"""What a scheme is: a weight prepared once, then applied to activations; alone, or one of many experts'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from framework import ops
from framework.ops import layout
from framework.quantization.tensor import QuantTensor

# torch's own numbers: as an output_dtype torch_npu takes these alone (its Meta kernels refuse 283 for bf16)
DTYPE_NUMBERS = {torch.int32: 3, torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}


@dataclass(frozen=True, slots=True)
class Operands:
    """A weight as its scheme's operator takes it, or those of all experts with a first dimension E.

    `weight` and, where the operator wants them, `scale`, `offset` and `bias` (a correction in its own units).
    `inputs`: what the activations pass first (`order`, `mul_scale`, `scale`, `offset`), each [K].
    `nbytes` counts the bytes really held.
    """

    weight: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    bias: Tensor | None = None
    group_size: int = 0
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    nbytes: int = 0


class Prepare(Protocol):
    """Turn a logical weight [N, K] into operands on `device` for activations of `dtype`."""

    def __call__(self, weight: QuantTensor, *, dtype: torch.dtype, device: torch.device) -> Operands: ...


class Experts(Protocol):
    """The weights [N, K] of some experts: how many there are, and each of them once."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[QuantTensor]: ...


class PrepareExperts(Protocol):
    """Turn the weights of all experts into operands of a grouped operator."""

    def __call__(self, weights: Experts, *, dtype: torch.dtype, device: torch.device) -> Operands: ...


@dataclass(frozen=True, slots=True)
class Scheme:
    """A name and its functions.

    `linear`: x [T, K], operands -> [T, N] in x's dtype; no bias, no reduction over ranks.
    `grouped`: x [T, K] sorted by expert, counts int64 [E], operands -> [T, N]. None where no table has experts of it.
    """

    name: str
    prepare: Prepare
    linear: Callable[[Tensor, Operands], Tensor]
    prepare_experts: PrepareExperts | None = None
    grouped: Callable[[Tensor, Tensor, Operands], Tensor] | None = None


def held_bytes(*tensors: Tensor | None) -> int:
    """Bytes of tensors that are there, in whatever form their device holds them."""
    return sum(layout.held_bytes(tensor) for tensor in tensors if tensor is not None)


def inputs_of(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return what activations pass before any scheme: the order of GPTQ, the smoothing of ModelSlim."""
    found = {} if weight.order is None else {"order": weight.order.to(device)}
    if "mul_scale" in weight.columns:
        found["mul_scale"] = weight.columns["mul_scale"].to(device=device, dtype=dtype)
    return found


def entering(x: Tensor, weight: Operands) -> Tensor:
    """Pass activations [T, K] through what `inputs_of` found."""
    if not weight.inputs:
        return x
    if (order := weight.inputs.get("order")) is not None:
        x = x.index_select(-1, order)
    if (factor := weight.inputs.get("mul_scale")) is not None:
        x = x * factor
    return x


def experts_of_rows(counts: Tensor, rows: int) -> Tensor:
    """Return int64 [T]: the expert of each row, sorted by expert; the last one for rows that belong to none here."""
    row = torch.arange(rows, device=counts.device)
    return torch.searchsorted(counts.cumsum(0), row, right=True).clamp(max=counts.shape[0] - 1)


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, **operands: object) -> Tensor:
    """Call npu_grouped_matmul for rows sorted by expert: one input, one weight [E, ...], one output."""
    given = {name: [value] if isinstance(value, Tensor) else value for name, value in operands.items()}
    # of a single expert the count is the row's end, too, and only ends are taken there
    kind = 0 if counts.shape[0] == 1 else 1
    return ops.npu_grouped_matmul(  # type: ignore[no-any-return]
        [x], [weight], group_list=counts, split_item=2, group_type=0, group_list_type=kind, **given
    )[0]
