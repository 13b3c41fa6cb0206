"""Rotary position embedding."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from framework.ops.cpu.cast import narrow


def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """Return x * cos + rot(x) * sin in fp32, rounded once.

    Args:
        input: [.., D] with D even.
        r1: cosines, broadcastable to `input`; fp32 tables cost the least here.
        r2: sines, broadcastable to `input`.
        rotary_mode: `half`: rot(x) = (-x2, x1) of the two halves; `interleave`: pairs (-x_odd, x_even).
        rotate: reserved on hardware; must be None.
    """
    if rotate is not None:
        raise NotImplementedError("npu_rotary_mul: a rotation matrix (`rotate`) has no CPU kernel")
    x = input.float()
    size = x.shape[-1]
    if rotary_mode == "half":
        # The sign sits in the sines: then the two halves only change places.
        rotated = x.roll(size // 2, -1)
    elif rotary_mode == "interleave":
        rotated = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        raise ValueError(f"npu_rotary_mul: rotary_mode {rotary_mode!r} is neither 'half' nor 'interleave'")
    y = torch.mul(x, r1.float()).addcmul_(rotated, torch.mul(r2.float(), _signs(rotary_mode, size)))
    return narrow(y, input.dtype)


@lru_cache(maxsize=16)
def _signs(rotary_mode: str, size: int) -> Tensor:
    signs = torch.ones(size)
    if rotary_mode == "half":
        signs[: size // 2] = -1.0
    else:
        signs[::2] = -1.0
    return signs
