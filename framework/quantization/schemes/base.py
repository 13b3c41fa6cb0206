"""What a scheme is: a weight prepared once, then applied to activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from framework.quantization.tensor import QuantTensor


@dataclass(frozen=True, slots=True)
class Operands:
    """A weight as its scheme's operator takes it.

    `weight` and, where the operator wants them, `scale` and `offset`. `nbytes` counts the bytes really held.
    """

    weight: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    group_size: int = 0
    nbytes: int = 0


class Prepare(Protocol):
    """Turn a logical weight [N, K] into operands on `device` for activations of `dtype`."""

    def __call__(self, weight: QuantTensor, *, dtype: torch.dtype, device: torch.device) -> Operands: ...


@dataclass(frozen=True, slots=True)
class Scheme:
    """A name and two functions.

    `linear`: x [T, K], operands -> [T, N] in x's dtype; no bias, no reduction over ranks.
    """

    name: str
    prepare: Prepare
    linear: Callable[[Tensor, Operands], Tensor]
