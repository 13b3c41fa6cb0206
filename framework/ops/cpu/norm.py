"""RMS norms. fp32 inside, one rounding at the end (vendor goldens of rms_norm and, for the add, of A5)."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT32 = torch.float32


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) * gamma over the trailing dimensions of `gamma`, and 1 / rms.

    Args:
        input: [.., *gamma.shape] fp16, bf16 or fp32.
        gamma: trailing dimensions, any float dtype.
        epsilon: added to the mean square.

    Returns:
        y like `input`; rstd fp32 with ones for gamma's dimensions.
    """
    return _normalize(input if input.dtype is _FLOAT32 else input.float(), gamma, epsilon, input.dtype)


def gemma_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """As `rms_norm`, with the weight 1 + gamma (added in fp32)."""
    x = input if input.dtype is _FLOAT32 else input.float()
    return _normalize(x, gamma.float() + 1.0, epsilon, input.dtype)


def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm of x1 + x2, its rstd, and the sum in x1's dtype.

    The norm is taken of the unrounded fp32 sum, as on A5. A2 and A3 normalize the rounded sum and round once
    more before gamma.
    """
    if x1.dtype is _FLOAT32:
        total = rounded = torch.add(x1, x2)
    else:
        total = torch.add(x1.float(), x2)
        rounded = total.to(x1.dtype)
    y, rstd = _normalize(total, gamma, epsilon, x1.dtype)
    return y, rstd, rounded


def _normalize(x: Tensor, gamma: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dims = list(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(x.square().mean(dims, keepdim=True).add_(epsilon))
    y = (x * rstd).mul_(gamma)
    return y if dtype is _FLOAT32 else y.to(dtype), rstd
