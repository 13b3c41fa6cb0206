"""GGUF headers: metadata, tensor table, block geometry. Every count and offset is bounded by the file's size.

Layout: ggml's gguf.cpp, versions 2 and 3, little endian. String arrays are kept as raw spans and decoded on
first use, so that a 50 000 token vocabulary costs nothing when only tensors are wanted.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from framework.checkpoint.faults import check_ranges, malformed, readable, truncated
from framework.checkpoint.index import Index, TensorInfo
from framework.errors import InputError, Problem

MAGIC = b"GGUF"

# name: (id, values a block, bytes a block). ggml.h, gguf 0.19 constants.
GGML_TYPES: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q8_1": (9, 32, 40), "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8), "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56), "BF16": (30, 1, 2), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18),
}  # fmt: skip
_BY_ID = {number: (name, block, nbytes) for name, (number, block, nbytes) in GGML_TYPES.items()}

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_READ_AHEAD_BYTES = (2 << 20, 32 << 20, 128 << 20)  # how much of the file is read, until the header is whole
_MAX_TENSORS, _MAX_KEYS = 1 << 18, 1 << 16
_MAX_ELEMENTS = 8 << 20  # of all arrays: ten times the largest vocabulary; as Python objects some 300 MB
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf$")


class Strings(Sequence[str]):
    """A string array of the metadata, decoded when first looked at."""

    def __init__(self, raw: bytes, count: int) -> None:
        self._raw, self._count = raw, count
        self._decoded: list[str] | None = None

    def __len__(self) -> int:
        """Number of strings, known without decoding."""
        return self._count

    def __iter__(self) -> Iterator[str]:
        """Iterate over the decoded strings."""
        return iter(self._all())

    def __getitem__(self, i: Any) -> Any:  # noqa: ANN401 - int gives str, slice gives list
        """Return one string or a slice."""
        return self._all()[i]

    def _all(self) -> list[str]:
        if self._decoded is None:
            raw, position, unpack = self._raw, 0, struct.Struct("<Q").unpack_from
            decoded = []
            for _ in range(self._count):
                end = position + 8 + unpack(raw, position)[0]
                decoded.append(raw[position + 8 : end].decode("utf-8", errors="replace"))
                position = end
            self._decoded = decoded
        return self._decoded


class _NeedMore(Exception):
    """The header goes on beyond the bytes that were read ahead."""


@dataclass
class _Cursor:
    """A position in the header bytes; every step is checked against the end."""

    data: bytes
    path: Path
    size: int
    position: int = 0
    elements: int = 0  # of the arrays so far

    def fail(self, what: str, why: str = "") -> InputError:
        return malformed(self.path, what, why or f"at byte {self.position} of {self.size}")

    def need(self, nbytes: int) -> int:
        """Advance by nbytes and return where they start."""
        start = self.position
        if nbytes < 0 or start + nbytes > len(self.data):
            if start + nbytes <= self.size:
                raise _NeedMore
            raise truncated(self.path, f"the header needs {nbytes} bytes at {start}, the file has {self.size}")
        self.position = start + nbytes
        return start

    def scalar(self, form: str) -> Any:  # noqa: ANN401
        return struct.unpack_from(form, self.data, self.need(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.scalar("<Q")
        start = self.need(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")


def read_header(path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Read one file's metadata and tensor table.

    Raises:
        InputError: `wrong-magic`, `gguf-version`, `file-truncated`, `file-malformed`.
    """
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        for limit in _READ_AHEAD_BYTES:
            file.seek(0)
            try:
                return _parse(_Cursor(file.read(min(size, limit)), path, size))
            except _NeedMore:
                continue
    raise _too_large(path)


def header_bytes(path: Path, data: bytes, size: int) -> int:
    """Return how many bytes the header of a file of `size` bytes takes, or how many to look at if it goes beyond.

    Raises:
        InputError: as `read_header`.
    """
    cursor = _Cursor(data, path, size)
    try:
        _parse(cursor)
    except _NeedMore:
        if len(data) >= _READ_AHEAD_BYTES[-1]:
            raise _too_large(path) from None
        step = 4 if len(data) < 1 << 20 else 2
        return min(size, step * len(data), _READ_AHEAD_BYTES[-1])
    return cursor.position


def _too_large(path: Path) -> InputError:
    return malformed(path, f"the header is larger than {_READ_AHEAD_BYTES[-1] >> 20} MiB")


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], list[TensorInfo]]:
    path = cursor.path
    if cursor.data[:4] != MAGIC:
        raise InputError(
            Problem(
                "wrong-magic",
                "this is not a GGUF file",
                str(path),
                f"it begins with {cursor.data[:4]!r}, not b'GGUF'",
                "is the download complete, and of the right file?",
            )
        )
    cursor.need(4)
    version = cursor.scalar("<I")
    if version not in (2, 3):
        big = version and not version & 0xFFFF
        raise InputError(
            Problem(
                "gguf-version",
                f"GGUF version {version} cannot be read",
                str(path),
                "it is of the other byte order" if big else "versions 2 and 3 can be read",
                "re-convert the model",
            )
        )
    tensor_count, pair_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    # the smallest pair takes 13 bytes, the smallest tensor entry 33
    if pair_count * 13 + tensor_count * 33 > cursor.size:
        raise truncated(path, f"{tensor_count} tensors and {pair_count} keys do not fit a file of {cursor.size} bytes")
    if tensor_count > _MAX_TENSORS or pair_count > _MAX_KEYS:
        limits = f"the limits are {_MAX_TENSORS} and {_MAX_KEYS}"
        raise malformed(path, f"{tensor_count} tensors and {pair_count} keys are not read", limits)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        if key in metadata:
            raise malformed(path, f"the key {key} stands there twice")
        metadata[key] = _value(cursor, cursor.scalar("<I"))
    return metadata, _tensors(cursor, metadata, tensor_count)


def _value(cursor: _Cursor, kind: int) -> Any:  # noqa: ANN401
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text()
    if kind == _ARRAY:
        return _array(cursor)
    raise cursor.fail(f"value type {kind} is unknown")


def _array(cursor: _Cursor) -> Sequence[Any]:
    element, count = cursor.scalar("<I"), cursor.scalar("<Q")
    cursor.elements += count
    if element in _SCALARS:
        form = _SCALARS[element][1]
        start = cursor.need(count * struct.calcsize("<" + form))
        _bound(cursor, count)
        return list(struct.unpack_from(f"<{count}{form}", cursor.data, start))
    if element == _STRING:
        if count * 8 > cursor.size - cursor.position:
            raise truncated(cursor.path, f"an array of {count} strings does not fit the file")
        _bound(cursor, count)
        return _strings(cursor, count)
    # llama.cpp reads no arrays of arrays either
    raise cursor.fail(f"an array of type {element} is not read")


def _bound(cursor: _Cursor, count: int) -> None:
    if cursor.elements > _MAX_ELEMENTS:
        raise cursor.fail(f"an array of {count} elements is not read", f"the limit is {_MAX_ELEMENTS} in all")


def _strings(cursor: _Cursor, count: int) -> Strings:
    data, position, end = cursor.data, cursor.position, len(cursor.data)
    start, unpack = position, struct.Struct("<Q").unpack_from
    try:
        for _ in range(count):
            position += 8 + unpack(data, position)[0]
    except (struct.error, OverflowError):
        position = end + 1
    if position > end:
        if end < cursor.size:
            raise _NeedMore
        raise truncated(cursor.path, "the file ends inside an array of strings")
    cursor.position = position
    return Strings(data[start:position], count)


def _tensors(cursor: _Cursor, metadata: dict[str, Any], count: int) -> list[TensorInfo]:
    entries = []
    for _ in range(count):
        name = cursor.text()
        dims = cursor.scalar("<I")
        if not 1 <= dims <= 4:
            raise cursor.fail(f"tensor {name} has {dims} dimensions")
        extents = [cursor.scalar("<Q") for _ in range(dims)]
        entries.append((name, tuple(reversed(extents)), cursor.scalar("<I"), cursor.scalar("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise malformed(cursor.path, f"general.alignment is {alignment!r}, not a power of two")
    start = -(-cursor.position // alignment) * alignment
    infos = [_info(cursor, entry, start) for entry in entries]
    check_ranges(cursor.path, infos, start, cursor.size)
    return infos


def _info(cursor: _Cursor, entry: tuple[str, tuple[int, ...], int, int], start: int) -> TensorInfo:
    name, shape, number, offset = entry
    known = _BY_ID.get(number)
    elements = prod(shape)
    if known is None:
        return TensorInfo(name, cursor.path, start + offset, 0, f"type {number}", shape)
    kind, block, nbytes = known
    if shape[-1] % block:
        raise malformed(cursor.path, f"{name}: rows of {shape[-1]} values are no multiple of a {kind} block of {block}")
    return TensorInfo(name, cursor.path, start + offset, elements // block * nbytes, kind, shape)


def read_index(path: Path) -> Index:
    """Index a GGUF file, or all parts of a split one, given any part.

    Raises:
        InputError: a part is missing or does not belong; and all of `read_header`.
    """
    match = SPLIT.match(path.name)
    count = int(match.group(3)) if match else 1
    if not match or count == 1:
        metadata, infos = read_header(path)
        parts_said = metadata.get("split.count", 1)
        if parts_said not in (0, 1):
            why = f"split.count is {parts_said!r}, the name is not NAME-00001-of-0000N.gguf"
            raise malformed(path, "it is one part of several, and its name does not say which", why)
        return Index(path, "gguf", {info.name: info for info in infos}, metadata, None, (path,))
    if not 1 <= int(match.group(2)) <= count:
        raise malformed(path, f"its name says part {int(match.group(2))} of {count}")
    parts = [
        path.with_name(f"{match.group(1)}-{number:05d}-of-{match.group(3)}.gguf") for number in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise InputError(
            Problem(
                "file-missing",
                f"{len(missing)} of {count} parts of the split GGUF are not there",
                str(path.parent),
                f"missing: {', '.join(missing[:4])}",
                "put all parts into one folder",
            )
        )
    tensors, metadata = _join(parts)
    return Index(parts[0], "gguf", tensors, metadata, None, tuple(parts))


def _join(parts: list[Path]) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Return the tensors of all parts and the metadata of the first."""
    tensors: dict[str, TensorInfo] = {}
    first: dict[str, Any] = {}
    for number, part in enumerate(parts):
        metadata, infos = read_header(part)
        said, count = metadata.get("split.no"), metadata.get("split.count")
        if said != number or count != len(parts):
            why = f"split.no {said!r}, split.count {count!r}; by its name: {number} (from 0), {len(parts)}"
            raise malformed(part, "it is not the part that its name says", why)
        first = first or metadata
        for info in infos:
            if info.name in tensors:
                raise malformed(part, f"tensor {info.name} stands in another part, too")
            tensors[info.name] = info
    total = first.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise malformed(parts[0], f"the parts hold {len(tensors)} tensors, the first one says {total}")
    return tensors, first
