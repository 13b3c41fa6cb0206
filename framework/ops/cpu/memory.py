"""Memory for weights that stay: maps whose pages the kernel makes at once, cheaper than a fault for each."""

from __future__ import annotations

import mmap
import threading
from math import prod

import torch
from torch import Tensor

# As much is mapped at a time; what is larger than a part of that gets a map of its own, so that less is left unused.
_CHUNK_BYTES = 16 << 20
_LARGEST_PART = _CHUNK_BYTES // 8
_ALIGNMENT = 64
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)  # Linux has it


class _Pool:
    """Hands out parts of one map after the other; a map ends with the last tensor in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        self._used = 0

    def take(self, size: int) -> Tensor:
        """Return uint8 [size], zeros."""
        if size > _LARGEST_PART:
            return torch.frombuffer(mmap.mmap(-1, size, _FLAGS), dtype=torch.uint8)
        with self._lock:
            if self._map is None or self._used + size > _CHUNK_BYTES:
                self._map, self._used = mmap.mmap(-1, _CHUNK_BYTES, _FLAGS), 0
            taken = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=self._used)
            self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return taken


_POOL = _Pool()


def new_bytes(*shape: int) -> Tensor:
    """Return uint8 [shape] of at least one byte, zeros, aligned to 64 bytes."""
    return _POOL.take(prod(shape)).view(shape)
