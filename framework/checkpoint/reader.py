"""Byte ranges of tensors, by pread: only what a shard needs is read, nothing is mapped."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from framework.checkpoint.faults import readable, truncated
from framework.checkpoint.index import TensorInfo

CHUNK_BYTES = 16 << 20
# one pread a row pays only where it leaves much out; below, whole rows are read and cut in memory
SPARSE = 4


class Reader:
    """Keeps descriptors open; counts `bytes_read`. A context manager."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self.bytes_read = 0

    def __enter__(self) -> Reader:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all files."""
        self.close()

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(
        self, info: TensorInfo, row0: int, row1: int, byte0: int = 0, byte1: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return bytes byte0..byte1 of rows row0..row1 as uint8 [rows, bytes].

        The tensor is seen as rows of its last dimension, leading dimensions flattened; a vector is one row.

        Raises:
            InputError: `file-truncated`, `file-missing`, `file-unreadable`.
        """
        rows = prod(info.shape[:-1])
        row_bytes = info.nbytes // rows if rows else 0
        last = row_bytes if byte1 is None else byte1
        out = np.empty((row1 - row0, last - byte0), np.uint8)
        if not out.size:
            return out
        start = info.offset + row0 * row_bytes
        if last - byte0 == row_bytes:
            self._fill(info, start, out.reshape(-1).data)
        elif (last - byte0) * SPARSE < row_bytes and row_bytes > 4096:
            for i in range(row1 - row0):
                self._fill(info, start + i * row_bytes + byte0, out[i].data)
        else:
            step = max(1, CHUNK_BYTES // row_bytes)
            for first in range(0, row1 - row0, step):
                count = min(step, row1 - row0 - first)
                chunk = np.empty((count, row_bytes), np.uint8)
                self._fill(info, start + first * row_bytes, chunk.reshape(-1).data)
                out[first : first + count] = chunk[:, byte0:last]
        return out

    def _fill(self, info: TensorInfo, offset: int, target: memoryview) -> None:
        done, wanted = 0, len(target)
        with readable(info.file):
            descriptor = self._files.get(info.file)
            if descriptor is None:
                descriptor = self._files[info.file] = os.open(info.file, os.O_RDONLY)
            while done < wanted:
                got = os.preadv(descriptor, [target[done : done + (1 << 30)]], offset + done)
                if not got:
                    raise truncated(info.file, f"{info.name} needs {wanted} bytes at {offset}, {done} were there")
                done += got
        self.bytes_read += wanted
