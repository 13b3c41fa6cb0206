"""What several ranks' failures say together: one cause, in one message."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

from framework.cluster.rank import RankInfo
from framework.errors import Problem, Refused, UserError

LINES_SHOWN = 8
LINE_COLUMNS = 100
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LOW_MEMORY_BYTES = 1 << 30
_COLLECTIVE_TYPES = ("PeerLost", "DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
_COLLECTIVE = (
    "Connection closed by peer",
    "Timed out waiting",
    "Connection reset by peer",
    "gloo",
    "HCCL",
    "hccl",
)


class PeerLost(RuntimeError):
    """A rank that others waited for ended, or did not answer in time.

    Lives here and not beside the collectives, so that a driver without torch can receive it.
    """

    def __init__(self, rank: int, why: str = "its process ended") -> None:
        super().__init__(rank, why)
        self.rank = rank
        self.why = why

    def __str__(self) -> str:
        return f"rank {self.rank} was lost: {self.why}"


class Kind(IntEnum):
    """Whose fault an exception is, best explanation first."""

    APPLICATION = 0
    DEATH = 1
    COLLECTIVE = 2


@dataclass(frozen=True, slots=True)
class Remains:
    """What could be found out about a rank that ended."""

    lines: list[str]
    memory_available_bytes: int | None
    oom_killed: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """Where the ranks were when something failed, what each was doing, and how to look closer."""

    infos: Mapping[int, RankInfo]
    stages: Mapping[int, str]
    logs: Mapping[int, str]
    examine: Callable[[RankInfo], Remains]


def cause_of(error: BaseException) -> BaseException:
    """Return the rank's own exception behind Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def kind_of(error: BaseException) -> Kind:
    """Sort an exception that a rank's reference raised."""
    from ray import exceptions as ray_errors

    died = (
        ray_errors.RayActorError,
        ray_errors.WorkerCrashedError,
        ray_errors.NodeDiedError,
        ray_errors.OutOfMemoryError,
    )
    if isinstance(error, died):
        return Kind.DEATH
    cause = cause_of(error)
    if isinstance(cause, UserError):
        return Kind.APPLICATION
    # by name: their classes come with torch, which the driver does not import
    if type(cause).__name__ in _COLLECTIVE_TYPES:
        return Kind.COLLECTIVE
    if isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in _COLLECTIVE):
        return Kind.COLLECTIVE
    return Kind.APPLICATION


def digest(errors: Mapping[int, BaseException], scene: Scene) -> BaseException:
    """Return the one exception to raise for what the ranks raised: {rank: exception}, not empty.

    A UserError comes back as the rank raised it; a bug of ours too, with the rank and its traceback as notes;
    the death of a rank as Refused `rank-lost`, a collective that gave up as Refused `collective-timeout`.
    """
    rank = min(errors, key=lambda r: (kind_of(errors[r]), r))
    match kind_of(errors[rank]):
        case Kind.APPLICATION:
            cause = cause_of(errors[rank])
            if not isinstance(cause, UserError):
                trace = _COLOURS.sub("", str(errors[rank]))
                cause.add_note(f"raised on rank {rank} while {scene.stages.get(rank, 'running')}:\n{trace}")
            return cause
        case Kind.DEATH:
            return Refused(_lost(rank, errors[rank], scene))
        case _:
            return Refused(_stuck(rank, cause_of(errors[rank]), scene))


def _lost(rank: int, error: BaseException, scene: Scene) -> Problem:
    info = scene.infos.get(rank)
    stage = scene.stages.get(rank, "starting")
    if info is None:
        return Problem(
            "rank-lost",
            f"rank {rank} ended while {stage}",
            "before it said where it runs",
            _first_line(error),
        )
    remains = scene.examine(info)
    free = remains.memory_available_bytes
    short = remains.oom_killed or (free is not None and free < LOW_MEMORY_BYTES)
    memory = "" if free is None else f"; its host has {free / 2**30:.1f} GiB memory left"
    lines = [line[:LINE_COLUMNS] for line in remains.lines if _worth_showing(line)][-LINES_SHOWN:]
    why = "\n".join([f"{_how(error, remains)}{memory}", *(f"  | {line}" for line in lines)])
    fix = (
        "fewer ranks per node, a smaller runtime.context or runtime.max_batch"
        if short
        else "run it again; if it ends so again, job=doctor, or report it with these lines"
    )
    return Problem("rank-lost", f"rank {rank} ended while {stage}", _where(info, scene), why, fix)


def _worth_showing(line: str) -> bool:
    # Ray's own marks, and a list of everything imported
    return bool(line.strip()) and not line.startswith((":job_id:", ":actor_name:", "Extension modules:"))


def _how(error: BaseException, remains: Remains) -> str:
    """Say how a process ended. Its parent alone is told the signal, so that is inferred from what it left."""
    text = str(error)
    fatal = [line for line in remains.lines if line.startswith("Fatal Python error: ")]
    if remains.oom_killed or "OutOfMemory" in type(error).__name__:
        return "killed by signal 9: the host ran out of memory"
    if fatal:
        return f"crashed ({fatal[-1].removeprefix('Fatal Python error: ')})"
    if "node" in text and "died" in text and "NODE_DIED" in text:
        return "its node left the cluster"
    if "INTENDED" in text or "exit()" in text:
        return "its process exited by itself"
    if "SIGTERM" in text or "signal 15" in text:
        return "killed by signal 15 (SIGTERM)"
    return "it left no word, so probably killed by signal 9 (kill -9, or a memory limit)"


def _stuck(rank: int, cause: BaseException, scene: Scene) -> Problem:
    late = getattr(cause, "rank", None)
    info = scene.infos.get(rank if late is None else late)
    who = f"waiting for rank {late}" if late is not None else "waiting for the others"
    stages = ", ".join(f"rank {r} {stage}" for r, stage in sorted(scene.stages.items()))
    return Problem(
        "hccl-timeout" if info and info.device.startswith("npu") else "collective-timeout",
        f"rank {rank} gave up {who}",
        _where(info, scene) if info else "",
        f"{_first_line(cause)}; then: {stages}",
        "is a rank slow (host busy, slow disk)?   cluster.join_timeout_s=… or cluster.collective_timeout_s=…",
    )


def _where(info: RankInfo, scene: Scene) -> str:
    device = f"device {info.devices}" if info.devices else info.device
    log = f", log {scene.logs[info.rank]}" if info.rank in scene.logs else ""
    return f"node {info.address} ({info.host}), {device}, pid {info.pid}{log}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
