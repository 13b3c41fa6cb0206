"""Collectives of ranks on one x86-64 host over shared memory: microseconds where a socket costs a hundred.

Protocol: every rank owns one sequence line and two slots (step parity). Step k: copy the payload into the
own slot k mod 2, publish k, wait until every peer has published k, read the peers' slots. Every step is a
barrier, so nobody writes step k + 2 before all have read step k: two slots suffice for any number of ranks.
Plain stores become visible in program order on x86 (total store order); elsewhere this needs fences that
Python does not offer, so `supported` says no.

The segment is a memfd that peers open through /proc/<pid>/fd: it has no name, so the kernel frees it with
the last process, however that ends.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import platform
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from framework.cluster.failures import PeerLost
from framework.cluster.processes import Process
from framework.layers.group import Alone, Group

LINE_BYTES = 128  # one sequence number in each: two cache lines, since the prefetcher takes pairs
ADDRESS_BYTES = 128  # of a segment's address, padded
TOKEN_BYTES = 64  # what proves that the file behind /proc/<pid>/fd/<n> is the segment meant
PAGE_BYTES = 4096
SLOT_BYTES = 4 << 20
SPINS = 50  # reads before the core is offered to others: a peer on the same core needs it
YIELD_S = 0.02  # after this long, sleep between looks instead of yielding
NAP_S = 0.0002
LONGEST_NAP_S = 0.005  # naps grow to this in a rank that has waited for half a second: nothing runs
LOOK_S = 0.05  # between looks whether the peers still live
MAX_VIEWS = 1024

_ALREADY_SUMMED_IN_OWN_DTYPE = (torch.float32, torch.float64, torch.int64, torch.int32)


def supported() -> bool:
    """Return whether this machine orders stores and offers what the segment needs."""
    return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()


def host_identity() -> str:
    """Return what two processes must share to try one segment: boot and host name."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {platform.node()}"


class Segment:
    """The mapped memory. `address` is what a peer needs to attach; close the creator's `fd` once all have."""

    def __init__(self, fd: int, size: int, slot_bytes: int, address: str) -> None:
        self.size, self.slot_bytes, self.address, self._fd = size, slot_bytes, address, fd
        self.map = mmap.mmap(fd, _length(size, slot_bytes))

    @classmethod
    def create(cls, size: int, slot_bytes: int = SLOT_BYTES) -> Segment:
        """Make the segment of `size` ranks; memory is taken as slots are used."""
        token = secrets.token_hex(TOKEN_BYTES // 2)
        fd = os.memfd_create("npu-launch", os.MFD_CLOEXEC)
        os.ftruncate(fd, _length(size, slot_bytes))
        segment = cls(fd, size, slot_bytes, f"{os.getpid()} {fd} {token}")
        segment.map[:TOKEN_BYTES] = token.encode()
        return segment

    @classmethod
    def attach(cls, address: str, size: int, slot_bytes: int = SLOT_BYTES) -> Segment | None:
        """Open a peer's segment, or return None where that cannot be reached (another container or user)."""
        pid, number, token = address.split()
        try:
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        # in another process namespace the same numbers may name an unrelated file: look before mapping
        try:
            same = os.pread(fd, TOKEN_BYTES, 0) == token.encode()
        except OSError:
            same = False
        if not same:
            os.close(fd)
            return None
        segment = cls(fd, size, slot_bytes, address)
        segment.close_file()
        return segment

    def close_file(self) -> None:
        """Close the descriptor; the mapping stays."""
        with contextlib.suppress(OSError):
            os.close(self._fd)
        self._fd = -1


def _length(size: int, slot_bytes: int) -> int:
    return _payload_start(size) + 2 * size * slot_bytes


def _payload_start(size: int) -> int:
    return math.ceil((size + 1) * LINE_BYTES / PAGE_BYTES) * PAGE_BYTES


class SharedMemoryGroup:
    """layers.Group over a segment. Sums are in rank order (bf16 and fp16 in fp32), bit-equal on all ranks.

    Raises from every collective:
        PeerLost: a peer's process ended, or did not reach this collective within `timeout_s`.
    """

    def __init__(
        self,
        segment: Segment,
        rank: int,
        members: Sequence[Process],
        timeout_s: float = 600.0,
        numbers: Sequence[int] = (),
    ) -> None:
        """`numbers`: what the ranks are called in messages, where the group is a part of a larger one."""
        self.rank, self.size = rank, segment.size
        self.numbers = tuple(numbers or range(self.size))
        self._segment, self._members, self._timeout_s = segment, tuple(members), timeout_s
        self._lines = memoryview(segment.map).cast("q")
        self._mine = _line(rank)
        self._peers = tuple(_line(r) for r in range(self.size) if r != rank)
        self._step = 0
        self._views: dict[tuple[int, int, tuple[int, ...], torch.dtype], Tensor] = {}
        self._prepared: dict[tuple[torch.Size, torch.dtype], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over ranks, in new memory (or in `x` where that is larger than a slot)."""
        slots = self._prepared.get((x.shape, x.dtype)) or self._prepare(x)
        if slots is None:
            return self._reduce_chunks(x)
        step = self._step + 1
        parts = slots[step & 1]
        parts[self.rank].copy_(x)
        self._exchange(step)
        if len(parts) == 2:
            return torch.add(parts[0], parts[1])  # 16-bit floats too: added in fp32, rounded once
        return sum_in_rank_order(parts, x.dtype)

    def all_gather(self, x: Tensor, sizes: list[int], dim: int = -1) -> Tensor:
        """Return the ranks' parts along `dim`, concatenated; rank r's part has sizes[r] there."""
        shapes = [_with(x.shape, dim, part) for part in sizes]
        whole_bytes = [math.prod(shape) * x.element_size() for shape in shapes]
        if max(whole_bytes) > self._segment.slot_bytes:
            return self._gather_chunks(x, shapes, dim)
        step = self._step + 1
        self._view(self.rank, step, x.shape, x.dtype).copy_(x)
        self._exchange(step)
        return torch.cat([self._view(r, step, shape, x.dtype) for r, shape in enumerate(shapes)], dim)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite `x` with the source rank's values and return it."""
        if x.nbytes > self._segment.slot_bytes:
            return self._broadcast_chunks(x, source)
        step = self._step + 1
        slot = self._view(source, step, x.shape, x.dtype)
        if self.rank == source:
            slot.copy_(x)
        self._exchange(step)
        if self.rank != source:
            x.copy_(slot)
        return x

    def all_to_all(self, parts: list[Tensor], counts: list[list[int]]) -> list[Tensor]:
        """Give parts[r] to rank r; return what each rank had for this one, flat, in rank order."""
        mine, dtype = [part.reshape(-1) for part in parts], parts[0].dtype
        most = max(map(max, counts))
        room = min(most, self._segment.slot_bytes // parts[0].element_size() // self.size)
        got = [torch.empty(counts[r][self.rank], dtype=dtype) for r in range(self.size)]
        for start in range(0, most, max(room, 1)):
            step, end = self._step + 1, start + room
            slot = self._view(self.rank, step, (self.size, room), dtype)
            for r, part in enumerate(mine):
                piece = part[start:end]
                slot[r, : len(piece)].copy_(piece)
            self._exchange(step)
            for r, part in enumerate(got):
                piece = part[start:end]
                piece.copy_(self._view(r, step, (self.size, room), dtype)[self.rank, : len(piece)])
        return got

    def split(self, groups: list[list[int]]) -> Group:
        """Return the group of those that has this rank: over a segment of its own."""
        own = next(group for group in groups if self.rank in group)
        if len(own) == self.size:
            return self
        leads = self.rank == own[0] and len(own) > 1
        segment = Segment.create(len(own), self._segment.slot_bytes) if leads else None
        line = (segment.address if segment else "").encode().ljust(ADDRESS_BYTES)
        # every rank takes part, also those that stay alone
        said = self.all_gather(torch.frombuffer(bytearray(line), dtype=torch.uint8), [ADDRESS_BYTES] * self.size)
        if len(own) == 1:
            attached: Segment | None = None
        elif segment is None:
            address = bytes(said.view(self.size, -1)[own[0]].tolist()).decode().rstrip()
            attached = Segment.attach(address, len(own), self._segment.slot_bytes)
        else:
            attached = segment
        failed = self.all_reduce(torch.tensor([int(len(own) > 1 and attached is None)]))
        if segment is not None:
            segment.close_file()
        if int(failed):
            raise RuntimeError("a rank could not map the memory of its group, although it maps that of all ranks")
        if attached is None:
            return Alone()
        members, numbers = [self._members[r] for r in own], [self.numbers[r] for r in own]
        return SharedMemoryGroup(attached, own.index(self.rank), members, self._timeout_s, numbers)

    def close(self) -> None:
        """Forget the segment (views of it stay valid while they live)."""
        self._prepared.clear()
        self._views.clear()
        self._segment.close_file()

    def _exchange(self, step: int) -> None:
        self._step = step
        lines = self._lines
        lines[self._mine] = step
        for line in self._peers:
            spins = SPINS
            while lines[line] < step:
                spins -= 1
                if not spins:
                    self._wait(line, step)

    def _wait(self, line: int, step: int) -> None:
        lines, start = self._lines, time.monotonic()
        look = start + LOOK_S
        while lines[line] < step:
            os.sched_yield()
            now = time.monotonic()
            if now - start > YIELD_S:
                time.sleep(min(LONGEST_NAP_S, max(NAP_S, (now - start) / 100)))
            if now > look:
                look = now + LOOK_S
                self._look(line, step, now - start)

    def _look(self, line: int, step: int, waited_s: float) -> None:
        # any dead peer ends the wait: the one waited for may itself be waiting for the dead one
        for rank, member in enumerate(self._members):
            if rank != self.rank and not member.alive() and self._lines[_line(rank)] < step:
                raise PeerLost(self.numbers[rank])
        if waited_s > self._timeout_s:
            late = next(r for r in range(self.size) if _line(r) == line)
            raise PeerLost(self.numbers[late], f"no answer for {self._timeout_s:g} s")

    def _view(self, rank: int, step: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return rank's slot of this step's parity as a tensor."""
        key = rank, step & 1, tuple(shape), dtype
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            view = self._views[key] = self._make_view(*key)
        return view

    def _make_view(self, rank: int, parity: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        offset = _payload_start(self.size) + (2 * rank + parity) * self._segment.slot_bytes
        return torch.frombuffer(self._segment.map, dtype=dtype, count=count, offset=offset).view(shape)

    def _prepare(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        if x.nbytes > self._segment.slot_bytes:
            return None
        if len(self._prepared) >= MAX_VIEWS:
            self._prepared.clear()
        even, odd = (tuple(self._view(r, p, x.shape, x.dtype) for r in range(self.size)) for p in (0, 1))
        self._prepared[x.shape, x.dtype] = even, odd
        return even, odd

    def _reduce_chunks(self, x: Tensor) -> Tensor:
        whole = x.contiguous()
        for chunk in whole.view(-1).split(self._segment.slot_bytes // x.element_size()):
            chunk.copy_(self.all_reduce(chunk))
        return whole

    def _broadcast_chunks(self, x: Tensor, source: int) -> Tensor:
        whole = x.contiguous()
        for chunk in whole.view(-1).split(self._segment.slot_bytes // x.element_size()):
            self.broadcast(chunk, source)
        if whole is not x:
            x.copy_(whole)
        return x

    def _gather_chunks(self, x: Tensor, shapes: list[tuple[int, ...]], dim: int) -> Tensor:
        count = self._segment.slot_bytes // x.element_size()
        mine = x.contiguous().view(-1)
        parts = [torch.empty(shape, dtype=x.dtype) for shape in shapes]
        longest = max(part.numel() for part in parts)
        for start in range(0, longest, count):
            step = self._step + 1
            piece = mine[start : start + count]
            self._view(self.rank, step, piece.shape, x.dtype).copy_(piece)
            self._exchange(step)
            for r, part in enumerate(parts):
                piece = part.view(-1)[start : start + count]
                piece.copy_(self._view(r, step, piece.shape, x.dtype))
        return torch.cat(parts, dim)


def _line(rank: int) -> int:
    return (rank + 1) * LINE_BYTES // 8


def _with(shape: torch.Size, dim: int, part: int) -> tuple[int, ...]:
    sizes = list(shape)
    sizes[dim] = part
    return tuple(sizes)


def sum_in_rank_order(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Add in rank order, 16-bit floats in fp32 and rounded once at the end."""
    if dtype in _ALREADY_SUMMED_IN_OWN_DTYPE:
        total = torch.add(parts[0], parts[1])
        for part in parts[2:]:
            total.add_(part)
        return total
    total = parts[0].float()
    for part in parts[1:]:
        total.add_(part)
    return total.to(dtype)
