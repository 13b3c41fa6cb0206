"""Tensor-parallel ranks as threads of the test process: the same models and loaders, without Ray."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


class Meeting:
    """A place where all ranks put a value and take everybody's."""

    def __init__(self, size):
        self.size = size
        self.values = [None] * size
        self.barrier = threading.Barrier(size, timeout=120)

    def exchange(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        everybody = list(self.values)
        self.barrier.wait()
        return everybody


class ThreadGroup:
    """framework.layers.group.Group over threads; sums in rank order."""

    def __init__(self, rank, meeting):
        self.rank, self.size, self.meeting = rank, meeting.size, meeting

    def all_reduce(self, x):
        parts = self.meeting.exchange(self.rank, x.clone())
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def all_gather(self, x, sizes, dim=-1):
        parts = self.meeting.exchange(self.rank, x.clone())
        assert [part.shape[dim] for part in parts] == list(sizes)
        return torch.cat(parts, dim=dim)

    def broadcast(self, x, source=0):
        return x.copy_(self.meeting.exchange(self.rank, x.clone())[source])

    def all_to_all(self, parts, counts):
        everybody = self.meeting.exchange(self.rank, [part.flatten().clone() for part in parts])
        assert [[len(part) for part in parts] for parts in everybody] == counts
        return [parts[self.rank] for parts in everybody]

    def split(self, groups):
        from framework.layers.group import Alone

        own = next(group for group in groups if self.rank in group)
        meetings = self.meeting.exchange(self.rank, Meeting(len(own)))
        return ThreadGroup(own.index(self.rank), meetings[own[0]]) if len(own) > 1 else Alone()


def on_ranks(size, work):
    """Run work(group) on every rank at once; return the results in rank order."""
    from framework.layers.group import Alone

    if size == 1:
        return [work(Alone())]
    meeting = Meeting(size)

    def rank(r):
        try:
            return work(ThreadGroup(r, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank, r) for r in range(size)]
        errors = [f.exception() for f in futures]
        real = [e for e in errors if e and not isinstance(e, threading.BrokenBarrierError)]
        if real or any(errors):
            raise (real or [e for e in errors if e])[0]
        return [f.result() for f in futures]
