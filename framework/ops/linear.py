"""Plain float matmul: torch's own on an NPU, the fastest exact form on the CPU."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight^T with fp32 accumulation. x [.., K], weight [N, K] -> [.., N], all of one dtype."""
    return functional.linear(x, weight)
