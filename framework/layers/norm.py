"""RMS norm, alone or with the residual addition before it."""

from __future__ import annotations

from torch import Tensor

from framework import ops
from framework.layers.submodules import LeanModule


class RMSNorm(LeanModule):
    """x / rms(x) * w, or * (1 + w) where the model stores weights minus one (Gemma); + b where a file shifts it."""

    def __init__(self, weight: Tensor, eps: float, *, plus_one: bool = False, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.plus_one = plus_one
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., H]."""
        norm = ops.npu_gemma_rms_norm if self.plus_one else ops.npu_rms_norm
        y = norm(x, self.weight, self.eps)[0]
        return y if self.bias is None else y + self.bias

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return (norm(x + residual), x + residual)."""
        if self.plus_one:
            total = x + residual
            return self(total), total
        y, _, total = ops.npu_add_rms_norm(x, residual, self.weight, self.eps)
        return y if self.bias is None else y + self.bias, total
