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
    if slots.numel() and slots.min().item() < 0:
        kept = slots >= 0
        slots, key, value = slots[kept], key[kept], value[kept]
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *rows.shape[1:]).index_copy_(0, slots, rows.to(cache.dtype))


def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Write rows as `reshape_and_cache` does, slots int32 or int64 [T]. `cache_mode` Norm: the caches are not tiled."""
    if cache_mode != "Norm" or any(given is not None for given in (compress_lens, compress_seq_offsets, seq_lens)):
        raise NotImplementedError("npu_scatter_pa_kv_cache: cache_mode Norm, without compression")
    reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)


def _write_row(cache: Tensor, slot: int, row: Tensor) -> None:
    """Write [1, KV, D] to row `slot` of all blocks: one view, where narrowing a view takes two."""
    _, _, heads, size = cache.shape
    width = heads * size
    offset = cache.storage_offset() + slot * width
    cache.as_strided((1, heads, size), (width, size, 1), offset).copy_(row)
