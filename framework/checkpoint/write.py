"""Write checkpoints: safetensors files with an index where there are several, documents beside them; GGUF headers."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from framework.checkpoint.gguf import GGML_TYPES, MAGIC
from framework.checkpoint.safetensors import DTYPE_BYTES
from framework.errors import InputError, Problem, Refused

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
    files = _Files(folder, list(tensors), shard_bytes)
    files.open()
    files.close()
    _write_documents(folder, documents)
    return files.paths


def write_gguf_headers(path: Path, tensors: Iterable[Entry], metadata: Mapping[str, Any]) -> None:
    """Write a GGUF file (version 3, little endian) that has a header and no weights: its data are a hole.

    Args:
        path: the file.
        tensors: name, ggml type and shape (torch order) of each.
        metadata: values by key: a bool, an integer below 2^32, a float, a string, or a list of values of one kind.
    """
    metadata = dict(metadata)
    listed = list(tensors)
    head = bytearray(MAGIC + struct.pack("<IQQ", 3, len(listed), len(metadata)))
    for key, value in metadata.items():
        head += _gguf_text(key) + _gguf_value(value)
    alignment, end = metadata.get("general.alignment", 32), 0
    for name, kind, shape in listed:
        number, block, nbytes = GGML_TYPES[kind]
        head += _gguf_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", number, end)
        end += -(-prod(shape) // block * nbytes // alignment) * alignment
    with path.open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // alignment) * alignment + end)


def _gguf_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _gguf_value(value: Any) -> bytes:  # noqa: ANN401
    """Return a value of the metadata with the number of its type before it."""
    if isinstance(value, list):
        each = [_gguf_value(one) for one in value]
        return struct.pack("<I", 9) + each[0][:4] + struct.pack("<Q", len(each)) + b"".join(one[4:] for one in each)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _gguf_text(value)
    number, form = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack(f"<I{form}", number, value)


class CheckpointWriter:
    """A checkpoint that appears whole or not at all: written beside its place, renamed when complete.

    Tensors are put in any order, one by one, so that no more than one needs memory. A context manager.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Iterable[Entry],
        documents: Mapping[str, Any],
        *,
        stem: str = "model",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder, self.tensors, self.documents = folder, list(tensors), documents
        self.stem, self.shard_bytes = stem, shard_bytes
        self.part = folder.with_name(f".{folder.name}.part")

    def __enter__(self) -> CheckpointWriter:
        """Make the temporary folder.

        Raises:
            InputError: `output-exists`; `output-folder`, it cannot be made.
            Refused: `disk-full`.
        """
        if self.folder.exists():
            raise InputError(
                Problem(
                    "output-exists",
                    "the output exists already",
                    str(self.folder),
                    "a checkpoint is written whole, into a new folder",
                    f"job.output={self.folder.with_name(self.folder.name + '-2')}",
                )
            )
        shutil.rmtree(self.part, ignore_errors=True)
        try:
            self.part.mkdir()
        except OSError as error:
            raise InputError(
                Problem(
                    "output-folder",
                    f"the output cannot be made: {error.strerror}",
                    str(self.folder),
                    fix="job.output=/a/new/folder/in/one/you/can/write",
                )
            ) from error
        self.files = _Files(self.part, self.tensors, self.shard_bytes, self.stem)
        try:
            with self.writing("the headers"):
                self.files.open()
        except BaseException:
            self._drop()
            raise
        return self

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write the bytes of one tensor.

        Raises:
            Refused: `disk-full`.
        """
        with self.writing(name):
            self.files.put(name, data)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn a failure to write `what` into the problem that a user is told.

        Raises:
            Refused: `disk-full`.
        """
        try:
            yield
        except OSError as error:
            raise Refused(
                Problem(
                    "disk-full",
                    f"{what} cannot be written: {error.strerror}",
                    str(self.folder),
                    fix="job.output=/a/folder/on/a/larger/disk",
                )
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the folder in its place if every tensor came; else leave nothing.

        Raises:
            Refused: `disk-full`.
        """
        try:
            missing = self.files.missing()
            if kind is None and missing:
                raise RuntimeError(f"{len(missing)} tensors were never written, the first is {missing[0]}")
            if kind is None:
                with self.writing("the checkpoint"):
                    self.files.close()
                    _write_documents(self.part, self.documents)
                    self.part.rename(self.folder)
        finally:
            self._drop()

    def _drop(self) -> None:
        self.files.close()
        shutil.rmtree(self.part, ignore_errors=True)


class _Files:
    """Safetensors files: `open` writes their headers and makes room for their data."""

    def __init__(self, folder: Path, tensors: list[Entry], shard_bytes: int, stem: str = "model") -> None:
        self.folder, self.stem = folder, stem
        self.shards = list(_shards(tensors, shard_bytes))
        count = len(self.shards)
        names = [
            f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
            for i in range(count)
        ]
        self.paths = [folder / name for name in names]
        self.places: dict[str, tuple[int, int, int]] = {}
        self.descriptors: list[int] = []
        self.left = {entry[0] for entry in tensors}

    def open(self) -> None:
        for path, shard in zip(self.paths, self.shards, strict=True):
            header, end = header_of(shard)
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
            self.descriptors.append(descriptor)
            os.pwrite(descriptor, header, 0)
            os.ftruncate(descriptor, len(header) + end)
            at = len(header)
            for name, dtype, shape in shard:
                size = prod(shape) * DTYPE_BYTES[dtype]
                self.places[name] = (descriptor, at, size)
                at += size
        if len(self.shards) > 1:
            files = zip(self.paths, self.shards, strict=True)
            weight_map = {entry[0]: path.name for path, shard in files for entry in shard}
            total = sum(size for _, _, size in self.places.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_documents(self.folder, {f"{self.stem}.safetensors.index.json": index})

    def put(self, name: str, data: bytes | memoryview) -> None:
        descriptor, at, size = self.places[name]
        view = memoryview(data).cast("B")
        if len(view) != size:
            raise ValueError(f"{name} takes {size} bytes, {len(view)} were given")
        done = 0
        while done < size:
            done += os.pwrite(descriptor, view[done : done + (1 << 30)], at + done)
        self.left.discard(name)

    def missing(self) -> list[str]:
        return sorted(self.left)

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []


def header_of(tensors: Iterable[Entry]) -> tuple[bytes, int]:
    """Return a file's header, its length included, for tensors that follow in this order, and the bytes of those."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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


def _write_documents(folder: Path, documents: Mapping[str, Any]) -> None:
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
