"""What a checkpoint holds, read from its headers alone: names, dtypes, shapes, byte ranges. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class TensorInfo(NamedTuple):
    """One tensor of a file: a tuple, which is made twice as fast as a frozen dataclass; there can be 136,000.

    `dtype` is the container's own name: safetensors `BF16`, `I8`, ... or a ggml type `Q4_1`, `F32`, ...
    `shape` is in torch order (a linear is [N, K]). `offset` is absolute in `file`, in bytes.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Index:
    """All tensors of a checkpoint, whatever its container.

    `metadata` is the GGUF key-value table (empty for safetensors); `config` the parsed config.json (for a
    GGUF: None, families/gguf.py derives one from the metadata).
    `documents` holds the parsed JSON files beside the weights that say how they are quantized, by file name.
    `options` are what a recipe says of the file that the file does not say itself.
    `root` is the folder (or the first GGUF file).
    """

    root: Path
    container: str  # "safetensors" | "gguf"
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    documents: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())
