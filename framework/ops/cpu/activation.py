"""Gated activations: two halves in, one out; fp32 inside, one rounding at the end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """Return silu(a) * b of the halves (a, b) along `dim`. [.., 2H] -> [.., H]."""
    gate, up = input.chunk(2, dim)
    if input.dtype is torch.float32:
        return functional.silu(gate).mul_(up)
    return functional.silu(gate.float()).mul_(up).to(input.dtype)


def geglu(
    input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (linear half * gelu(other half), gelu(other half)).

    Args:
        input: [.., 2H] along `dim`.
        dim: the dimension that is halved.
        approximate: 1 tanh, 0 erf.
        activate_left: gelu acts on the first half (Gemma: gate first); else on the second.
    """
    first, second = input.chunk(2, dim)
    active, linear = (first, second) if activate_left else (second, first)
    gelu = functional.gelu(active.float(), approximate="tanh" if approximate else "none")
    if input.dtype is torch.float32:
        return gelu * linear, gelu
    return (gelu * linear).to(input.dtype), gelu.to(input.dtype)


def gelu_mul(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Return gelu(a) * b of the halves (a, b) of the last dimension.

    Hardware refuses a last dimension above 1024, so MLPs use `npu_geglu(activate_left=True)`.
    """
    gate, up = input.chunk(2, -1)
    return functional.gelu(gate.float(), approximate=approximate).mul_(up).to(input.dtype)
