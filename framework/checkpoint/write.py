"""Write checkpoints: safetensors files with an index where there are several, and the JSON documents beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from framework.checkpoint.safetensors import DTYPE_BYTES

SHARD_BYTES = 5 << 30
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def write_headers(
    folder: Path, tensors: Iterable[Entry], documents: Mapping[str, Any], *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write a checkpoint that has headers and no weights: its data are holes, which take no room on most disks.

    Args:
        folder: an existing folder.
        tensors: name, dtype and shape of each.
        documents: parsed JSON by file name (config.json, a description, ...).
        shard_bytes: size from which a new file is begun.

    Returns:
        The safetensors files.
    """
    shards = list(_shards(tensors, shard_bytes))
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    for name, shard in zip(names, shards, strict=True):
        header, end = header_of(shard)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + end)
    if len(shards) > 1:
        weight_map = {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    for name, document in documents.items():
        _write_json(folder / name, document)
    return [folder / name for name in names]


def header_of(tensors: Iterable[Entry]) -> tuple[bytes, int]:
    """Return a file's header, its length included, for tensors that follow in this order, and the bytes of those."""
    entries: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _shards(tensors: Iterable[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in tensors:
        nbytes = prod(entry[2]) * DTYPE_BYTES[entry[1]]
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += nbytes
    yield shard


def _write_json(path: Path, document: Any) -> None:  # noqa: ANN401
    path.write_text(json.dumps(document), encoding="utf-8")
