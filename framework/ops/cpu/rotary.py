"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """Return x * cos + rot(x) * sin in fp32, rounded once.

    Args:
        input: [.., D] with D even.
        r1: cosines, broadcastable to `input`.
        r2: sines, broadcastable to `input`.
        rotary_mode: `half`: rot(x) = (-x2, x1) of the two halves; `interleave`: pairs (-x_odd, x_even).
        rotate: reserved on hardware; must be None.
    """
    if rotate is not None:
        raise NotImplementedError("npu_rotary_mul: a rotation matrix (`rotate`) has no CPU kernel")
    x = input.float()
    if rotary_mode == "half":
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
    elif rotary_mode == "interleave":
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        raise ValueError(f"npu_rotary_mul: rotary_mode {rotary_mode!r} is neither 'half' nor 'interleave'")
    return torch.addcmul(x * r1, rotated, r2.float()).to(input.dtype)
