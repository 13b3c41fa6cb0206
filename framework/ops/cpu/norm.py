"""RMS norms: fp32 inside, one rounding at the end (the vendor's golden of rms_norm)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from framework.ops.cpu.cast import narrow

_norm2, _fused_rms_norm = torch.linalg.vector_norm, torch._fused_rms_norm


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) * gamma over the trailing dimensions of `gamma`, and 1 / rms.

    Args:
        input: [.., *gamma.shape] fp16, bf16 or fp32.
        gamma: trailing dimensions, any float dtype.
        epsilon: added to the mean square.

    Returns:
        y like `input`; rstd fp32 with ones for gamma's dimensions.
    """
    size = gamma.numel()
    if input.numel() == size and gamma.dtype is input.dtype and gamma.dim() == 1:
        return _one_row(input, gamma, epsilon, size)
    return _rows(input, gamma, epsilon)


def gemma_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """As `rms_norm`, with the weight 1 + gamma (added in fp32)."""
    size = gamma.numel()
    if input.numel() != size or gamma.dim() != 1:
        return _rows(input, gamma.float() + 1.0, epsilon)
    x = input.float()
    norm = _norm2(x, 2, -1, True)
    rstd = (norm.item() ** 2 / size + epsilon) ** -0.5
    y = torch.addcmul(x, x, gamma.float()).mul_(rstd)
    return narrow(y, input.dtype), norm.fill_(rstd)


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm of x1 + x2, its rstd, and the sum in x1's dtype: `rms_norm` of the rounded sum.

    Hardware differs by one rounding, either way: A2 and A3 normalize the rounded sum, as here, and round once
    more before gamma; A5 normalizes the unrounded sum.
    """
    total = torch.add(x1, x2)
    y, rstd = rms_norm(total, gamma, epsilon)
    return y, rstd, total


def _rows(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return _fused_rms_norm(input, gamma.shape, gamma, epsilon)


def _one_row(input: Tensor, gamma: Tensor, epsilon: float, size: int) -> tuple[Tensor, Tensor]:
    """One token: few calls. addcmul works in fp32 inside and rounds once, also for bf16 and fp16."""
    norm = _norm2(input.float(), 2, -1, True)
    rstd = (norm.item() ** 2 / size + epsilon) ** -0.5
    y = torch.addcmul(_zeros(size, input.dtype), input, gamma, value=rstd)
    return y, norm.fill_(rstd)


@lru_cache(maxsize=16)
def _zeros(size: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(size, dtype=dtype)
