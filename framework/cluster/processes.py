"""Processes of this host, known by pid and start time so that a reused pid is never mistaken."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """One process; `started` is in clock ticks since boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """Return the process that has this pid now.

        Raises:
            OSError: there is none.
        """
        return cls(pid, _stat(pid)[2])

    def alive(self) -> bool:
        """Return whether this very process still runs (a zombie does not)."""
        try:
            state, _, started = _stat(self.pid)
        except OSError:
            return False
        return state not in "ZX" and started == self.started


def descendants(pid: int) -> list[Process]:
    """Return all live processes below `pid`."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, parent, started = _stat(int(entry.name))
                if state not in "ZX":
                    children.setdefault(parent, []).append(Process(int(entry.name), started))
    found: list[Process] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += [process.pid for process in below]
    return found


def end(processes: Iterable[Process], grace_s: float) -> None:
    """Wait until the processes have ended; after `grace_s` kill those that have not."""
    remaining = [process for process in processes if process.alive()]
    deadline = time.monotonic() + grace_s
    while remaining and time.monotonic() < deadline:
        time.sleep(0.02)
        remaining = [process for process in remaining if process.alive()]
    for process in remaining:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 1.0
    while any(process.alive() for process in remaining) and time.monotonic() < deadline:
        time.sleep(0.02)


def memory_available_bytes() -> int:
    """Return the host memory that a new process could still have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory since boot."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def last_lines(path: str, count: int = 200, limit_bytes: int = 1 << 16) -> list[str]:
    """Return the end of a text file, [] if it cannot be read."""
    with suppress(OSError), Path(path).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - limit_bytes))
        return file.read().decode("utf-8", "replace").splitlines()[-count:]
    return []


def _stat(pid: int) -> tuple[str, int, int]:
    # the second field, the command, may hold spaces and brackets
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])
