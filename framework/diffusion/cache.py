"""Steps that reuse the last one's blocks: diffusers' own first block cache, for one drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def first_block_cache(pipeline: Any, threshold: float | None) -> Iterator[Callable[[], int]]:  # noqa: ANN401
    """Put the cache on a pipeline's transformers and take it off again, with all that it remembers.

    Yields what counts the predictions so far that were reused, of all transformers.
    """
    reused = 0

    def count(decide: Callable[..., bool]) -> Callable[..., bool]:
        def counted(*args: Any) -> bool:  # noqa: ANN401
            nonlocal reused
            computes = decide(*args)
            reused += not computes
            return computes

        return counted

    if threshold is None:
        yield lambda: 0
        return
    from diffusers.hooks import FirstBlockCacheConfig

    cached = [part for name, part in pipeline.components.items() if name.startswith("transformer") and part is not None]
    for transformer in cached:
        transformer.enable_cache(FirstBlockCacheConfig(threshold))
        for module in transformer.modules():
            hook = getattr(module, "_diffusers_hook", None)
            leader = hook.get_hook("fbc_leader_block_hook") if hook is not None else None
            if leader is not None:
                leader._should_compute_remaining_blocks = count(leader._should_compute_remaining_blocks)
    try:
        yield lambda: reused
    finally:
        for transformer in cached:
            transformer.disable_cache()
