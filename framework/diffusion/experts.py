"""Transformers that are in memory one at a time: a pipeline whose experts take turns holds the one that works."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import nn


class Expert(nn.Module):
    """Stands in a pipeline for a transformer, which is fetched when it is called."""

    def __init__(self, like: nn.Module, fetch: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.config, self.device, self.dtype, self.fetch = like.config, like.device, like.dtype, fetch

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Call the transformer."""
        return self.fetch()(*args, **kwargs)

    def cache_context(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:  # noqa: ANN401
        """Return the transformer's own."""
        return cast("AbstractContextManager[None]", self.fetch().cache_context(*args, **kwargs))


def one_at_a_time(build: Mapping[str, Callable[[], nn.Module]]) -> dict[str, Expert]:
    """Return stand-ins for the transformers that `build` makes; each was made once, so weights that break are known.

    Fetching one drops the other: it is read again when its turn comes.
    """
    held: dict[str, nn.Module] = {}

    def fetch(name: str) -> nn.Module:
        if name not in held:
            held.clear()
            gc.collect()  # wrapped calls refer to their own models
            held[name] = build[name]()
        return held[name]

    return {name: Expert(fetch(name), lambda name=name: fetch(name)) for name in build}
