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

    `layers`: two tensors per layer, [pages, 128, kv_heads, width] for each of `widths`: keys and values, or the latent
    and the rotated key of latent attention. Memory is not initialised (the
    operating system commits it when a page is first written); no row is read before it is written.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        kv_heads: int,
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.pages = pages
        self.device = torch.device(device)
        first, second = ((pages, PAGE_TOKENS, kv_heads, width) for width in widths)
        self.layers: list[tuple[Tensor, Tensor]] = [
            (
                torch.empty(first, dtype=dtype, device=self.device),
                torch.empty(second, dtype=dtype, device=self.device),
            )
            for _ in range(layers)
        ]
