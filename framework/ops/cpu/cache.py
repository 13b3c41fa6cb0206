"""Writing keys and values into the paged cache."""

from __future__ import annotations

from torch import Tensor


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor) -> None:
    """Write row t to slot_indices[t]; negative slots are skipped. Rows are cast to the cache's dtype.

    Args:
        key: [T, KV, D].
        value: [T, KV, Dv].
        key_cache: [blocks, block_size, KV, D], contiguous.
        value_cache: [blocks, block_size, KV, Dv], contiguous.
        slot_indices: int32 [T]; slot s is row s % block_size of block s // block_size.
    """
    if slot_indices.numel() == 1:
        slot = slot_indices.item()
        if slot >= 0:
            _write_row(key_cache, slot, key)
            _write_row(value_cache, slot, value)
        return
    slots = slot_indices.long()
    kept = slots >= 0
    if not kept.all():
        slots, key, value = slots[kept], key[kept], value[kept]
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *rows.shape[1:]).index_copy_(0, slots, rows.to(cache.dtype))


def _write_row(cache: Tensor, slot: int, row: Tensor) -> None:
    """Write [1, KV, D] to row `slot` of all blocks: one view, where narrowing a view takes two."""
    _, _, heads, size = cache.shape
    width = heads * size
    offset = cache.storage_offset() + slot * width
    cache.as_strided((1, heads, size), (width, size, 1), offset).copy_(row)
