"""The paged KV cache and who holds which page."""

from __future__ import annotations

import torch
from torch import Tensor

PAGE_TOKENS = 128


def pages_for(tokens: int) -> int:
    """Return how many pages hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


class KVCache:
    """This rank's keys and values of all layers.

    `layers`: (keys, values) per layer, each [pages, 128, kv_heads, head_dim]. Memory is not initialised (the
    operating system commits it when a page is first written); no row is read before it is written.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.pages = pages
        self.device = torch.device(device)
        shape = (pages, PAGE_TOKENS, kv_heads, head_dim)
        self.layers: list[tuple[Tensor, Tensor]] = [
            (
                torch.empty(shape, dtype=dtype, device=self.device),
                torch.empty(shape, dtype=dtype, device=self.device),
            )
            for _ in range(layers)
        ]
