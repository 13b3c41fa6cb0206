"""RMS norm, alone or with the residual addition before it."""

from __future__ import annotations

from torch import Tensor, nn

from framework import ops


class RMSNorm(nn.Module):
    """x / rms(x) * w, or * (1 + w) where the model stores weights minus one (Gemma)."""

    def __init__(self, weight: Tensor, eps: float, *, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.plus_one = plus_one

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., H]."""
        if self.plus_one:
            return ops.npu_gemma_rms_norm(x, self.weight, self.eps)[0]
        return ops.npu_rms_norm(x, self.weight, self.eps)[0]

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return (norm(x + residual), x + residual)."""
        if self.plus_one:
            total = x + residual
            return ops.npu_gemma_rms_norm(total, self.weight, self.eps)[0], total
        y, _, total = ops.npu_add_rms_norm(x, residual, self.weight, self.eps)
        return y, total
