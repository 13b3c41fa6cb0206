"""Gated activations: two halves in, one out; fp32 inside, one rounding at the end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from framework.ops.cpu.cast import narrow

_FLOAT32 = torch.float32
_silu, _silu_ = functional.silu, torch._C._nn.silu_


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """Return silu(a) * b of the halves (a, b) along `dim`. [.., 2H] -> [.., H]."""
    if input.dtype is _FLOAT32:
        gate, up = input.chunk(2, dim)
        return _silu(gate).mul_(up)
    gate, up = input.float().chunk(2, dim)
    return narrow(_silu_(gate).mul_(up), input.dtype)


def geglu(input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False) -> tuple[Tensor, Tensor]:
    """Return (linear half * gelu(other half), gelu(other half)).

    Args:
        input: [.., 2H] along `dim`.
        dim: the dimension that is halved.
        approximate: 1 tanh, 0 erf.
        activate_left: gelu acts on the first half (Gemma: gate first); else on the second.
    """
    first, second = input.float().chunk(2, dim)
    active, linear = (first, second) if activate_left else (second, first)
    gelu = functional.gelu(active, approximate="tanh" if approximate else "none")
    return narrow(torch.mul(gelu, linear), input.dtype), narrow(gelu, input.dtype)


def gelu_mul(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Return gelu(a) * b of the halves (a, b) of the last dimension.

    Hardware refuses a last dimension above 1024, so MLPs use `npu_geglu(activate_left=True)`.
    """
    gate, up = input.float().chunk(2, -1)
    return narrow(functional.gelu(gate, approximate=approximate).mul_(up), input.dtype)
