"""Process groups between ranks. The only module that uses names of torch.distributed."""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from framework.cluster.failures import PeerLost
from framework.cluster.processes import Process
from framework.cluster.shared_memory import (
    SLOT_BYTES,
    Segment,
    SharedMemoryGroup,
    host_identity,
    sum_in_rank_order,
    supported,
)
from framework.layers.group import Alone, Group

BACKENDS = ("auto", "shared_memory", "gloo", "hccl")


@dataclass(frozen=True, slots=True)
class Store:
    """Where ranks meet: rank 0 holds it, the others connect to host and port."""

    host: str
    port: int
    handle: Any = None


def open_store(host: str, timeout_s: float) -> Store:
    """Open the key-value store at a free port of this one address.

    The socket is bound before anything else is told its number: no race, and no other interface listens.
    """
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port: int = listener.getsockname()[1]
    handle = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return Store(host, port, handle)


def join(
    rank: int,
    size: int,
    store_host: str,
    store_port: int,
    backend: str,
    timeout_s: float,
    *,
    address: str = "",
    join_timeout_s: float = 120.0,
    session: str = "0",
    slot_bytes: int = SLOT_BYTES,
) -> Group:
    """Join the group of `size` ranks that meets at a store; returns when all have joined.

    Args:
        rank: this rank, 0 .. size - 1.
        size: ranks of the group.
        store_host: address of rank 0's store.
        store_port: port of rank 0's store.
        backend: `auto` (shared memory if all ranks are on one host that can, else gloo), or one of BACKENDS.
        timeout_s: how long a collective waits for a rank.
        address: this node's address, by which gloo's peers reach it; empty: by the host's name.
        join_timeout_s: how long to wait for all to come.
        session: name of this meeting, where one store serves several.
        slot_bytes: what a rank may put into shared memory at a time; larger tensors go in chunks.

    Raises:
        PeerLost: not all ranks came in time.
    """
    if size == 1:
        return Alone()
    wait = datetime.timedelta(seconds=join_timeout_s)
    try:
        client = dist.TCPStore(store_host, store_port, is_master=False, timeout=wait)
        store = dist.PrefixStore(session, client)
        if backend in ("auto", "shared_memory"):
            group = _join_shared_memory(rank, size, store, timeout_s, slot_bytes)
            if group is not None:
                return group
        name = "hccl" if backend == "hccl" else "gloo"
        return _join_distributed(rank, size, store, name, address, timeout_s)
    except dist.DistError as error:
        raise PeerLost(0, f"the ranks did not all join within {join_timeout_s:g} s ({error})") from error


def leave(group: Group) -> None:
    """Give up what the group holds."""
    if isinstance(group, SharedMemoryGroup):
        group.close()
    elif isinstance(group, DistributedGroup):
        dist.destroy_process_group()


def name_of(group: Group) -> str:
    """Return what carries the group's collectives: alone, shared_memory, gloo or hccl."""
    if isinstance(group, DistributedGroup):
        return group.backend
    return "shared_memory" if isinstance(group, SharedMemoryGroup) else "alone"


def _join_shared_memory(
    rank: int,
    size: int,
    store: Any,  # noqa: ANN401
    timeout_s: float,
    slot_bytes: int,
) -> SharedMemoryGroup | None:
    """Return the group, or None, on every rank alike, where not all can map one segment."""
    me = Process.of(os.getpid())
    host = host_identity() if supported() else f"unsupported {rank}"
    store.set(f"host/{rank}", host)
    store.set(f"member/{rank}", f"{me.pid} {me.started}")
    hosts = [_get(store, f"host/{r}") for r in range(size)]
    if len(set(hosts)) > 1:
        return None
    if rank == 0:
        segment: Segment | None = Segment.create(size, slot_bytes)
        assert segment is not None
        store.set("segment", segment.address)
    else:
        segment = Segment.attach(_get(store, "segment"), size, slot_bytes)
    store.set(f"attached/{rank}", "yes" if segment is not None else "no")
    attached = [_get(store, f"attached/{r}") == "yes" for r in range(size)]
    if segment is not None:
        segment.close_file()
    if segment is None or not all(attached):
        return None
    members = [Process(*map(int, _get(store, f"member/{r}").split())) for r in range(size)]
    return SharedMemoryGroup(segment, rank, members, timeout_s)


def _get(store: Any, key: str) -> str:  # noqa: ANN401
    return str(store.get(key).decode())


def _join_distributed(
    rank: int,
    size: int,
    store: Any,  # noqa: ANN401
    backend: str,
    address: str,
    timeout_s: float,
) -> DistributedGroup:
    timeout = datetime.timedelta(seconds=timeout_s)
    options = None
    if backend == "gloo" and address:
        # by name gloo may pick 127.0.1.1, which other hosts cannot reach
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timeout
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, pg_options=options)
    group = DistributedGroup(rank, list(range(size)), backend, options)
    group.broadcast(torch.zeros(1, device=group.device))  # connect now, not within the first token
    return group


class DistributedGroup:
    """layers.Group over torch.distributed (gloo on CPUs, hccl on NPUs).

    Raises from every collective:
        RuntimeError: a peer closed the connection or did not answer in time.
    """

    def __init__(self, rank: int, numbers: list[int], backend: str, options: Any, process_group: Any = None) -> None:  # noqa: ANN401
        """`numbers`: of the ranks among all; `process_group`: torch's, None for that of all ranks."""
        self.rank, self.size, self.backend = rank, len(numbers), backend
        self.device = "npu" if backend == "hccl" else "cpu"
        self._numbers, self._options, self._group = numbers, options, process_group
        self._splits: dict[str, Group] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over ranks: on CPUs in rank order, 16-bit floats in fp32; on NPUs as HCCL sums."""
        if self.backend == "hccl":
            dist.all_reduce(x, group=self._group)
            return x
        mine = x.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self._group)
        return sum_in_rank_order(parts, x.dtype)

    def all_gather(self, x: Tensor, sizes: list[int], dim: int = -1) -> Tensor:
        """Return the ranks' parts along `dim`, concatenated; rank r's part has sizes[r] there."""
        # padded to equal parts: gloo and HCCL gather uneven ones differently or not at all
        mine = x.transpose(0, dim)
        padded = mine.new_zeros((max(sizes), *mine.shape[1:]))
        padded[: mine.shape[0]] = mine
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._group)
        whole = torch.cat([part[:count] for part, count in zip(parts, sizes, strict=True)])
        return whole.transpose(0, dim).contiguous()

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite `x` with the source rank's values and return it."""
        whole = x.contiguous()
        dist.broadcast(whole, self._numbers[source], group=self._group)
        if whole is not x:
            x.copy_(whole)
        return x

    def all_to_all(self, parts: list[Tensor], counts: list[list[int]]) -> list[Tensor]:
        """Give parts[r] to rank r; return what each rank had for this one, flat, in rank order."""
        given = torch.cat([part.reshape(-1) for part in parts])
        takes = [row[self.rank] for row in counts]
        got = given.new_empty(sum(takes))
        dist.all_to_all_single(got, given, takes, counts[self.rank], group=self._group)
        return list(got.split(takes))

    def split(self, groups: list[list[int]]) -> Group:
        """Return the group of those that has this rank. torch keeps groups to its end: equal splits are made once."""
        key = repr(groups)
        if key not in self._splits:
            for group in groups:
                numbers = [self._numbers[r] for r in group]
                made = dist.new_group(numbers, backend=self.backend, pg_options=self._options)
                if self.rank in group:
                    parts = DistributedGroup(group.index(self.rank), numbers, self.backend, self._options, made)
                    self._splits[key] = parts if len(group) > 1 else Alone()
        return self._splits[key]
