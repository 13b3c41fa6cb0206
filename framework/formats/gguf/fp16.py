"""The half-precision scales of blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def half(raw: Tensor) -> Tensor:
    """uint8 [.., 2] -> fp32 [.., 1] of the fp16 they hold. Copies: a slice may lie unaligned."""
    return raw.clone(memory_format=torch.contiguous_format).view(torch.float16).float()
