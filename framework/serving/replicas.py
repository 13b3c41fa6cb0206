"""Replicas of one model behind one endpoint: each runs what it is given, is replaced when it dies, and says so.

A replica's thread loads its session and forwards the engine's events to the event loop, where all else here runs.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from framework.engine.request import Event, Failed, Finished, Load, Orders, Request, TokenEvent
from framework.errors import UserError
from framework.serving.metrics import Metrics, Stopwatch
from framework.serving.pictures import Drawn, Picture
from framework.serving.protocol import ApiError

ATTEMPTS = 3  # a replica that is lost so often in a row without a token in between counts as gone
MOST_PAUSE_S = 15  # between attempts: a node that was lost may come back
PING_S = 1.0  # for all ranks to answer
RETRY_AFTER_S = 1
_LOG = logging.getLogger(__name__)


class Session(Protocol):
    """What a replica needs of the cluster's session."""

    def stream(self, method: str, *args: object) -> Iterable[Sequence[Event | Drawn]]:
        """Run a generator on all ranks; rank 0's items."""
        ...

    def tell(self, method: str, *args: object) -> None:
        """Run rank 0's method beside that."""
        ...

    def alive(self, timeout_s: float) -> bool:
        """Whether every rank answers."""
        ...


@dataclass(frozen=True, slots=True)
class Lost:
    """The end of a request on a replica that died, or whose server ends."""

    why: str


@dataclass(frozen=True, slots=True)
class Limits:
    """Of each replica: answers that run at once, that may wait besides, and pages of its cache."""

    max_batch: int
    max_queue: int
    pages: int

    @property
    def most(self) -> int:
        """Answers that a replica takes on."""
        return self.max_batch + self.max_queue


class Call:
    """One HTTP request on a replica; `events` carry the number of their choice as index."""

    def __init__(self, replica: Replica, indexes: range, watches: Sequence[Stopwatch]) -> None:
        self.events: asyncio.Queue[TokenEvent | Finished | Failed | Drawn | Lost] = asyncio.Queue()
        self._replica, self._indexes, self._watches = replica, indexes, watches

    def take(self, event: TokenEvent | Finished | Failed | Drawn) -> None:
        """Pass on an event of one of the indexes."""
        number = event.index - self._indexes.start
        if isinstance(event, TokenEvent):
            self._watches[number].token()
        elif isinstance(event, Finished):
            self._watches[number].end(event.prompt_tokens)
        elif isinstance(event, Drawn):
            self._watches[number].picture()
        self.events.put_nowait(replace(event, index=number))

    def leave(self) -> None:
        """Give up what has not ended."""
        self._replica.cancel(self._indexes)


class Replica:
    """A session that serves, from `start` to `close`."""

    def __init__(
        self, number: int, session: Session, load: Callable[[], None], limits: Limits, metrics: Metrics
    ) -> None:
        self.number, self.session = number, session
        self.ready = False
        self.gone: BaseException | None = None  # why it does not come, or not come back; it goes on trying
        self._load, self._limits, self._metrics = load, limits, metrics
        self._numbers = itertools.count()
        self._open: dict[int, Call] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"replica {number}")

    @property
    def busy(self) -> int:
        """Answers that run or wait."""
        return len(self._open)

    def start(self) -> None:
        """Load, then serve."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, requests: Sequence[Request | Picture], watches: Sequence[Stopwatch]) -> Call:
        """Let requests join the running batch."""
        first = next(self._numbers)
        for _ in requests[1:]:
            next(self._numbers)
        call = Call(self, range(first, first + len(requests)), watches)
        self._open |= dict.fromkeys(range(first, first + len(requests)), call)
        numbered: tuple[Any, ...] = tuple(replace(r, index=first + i) for i, r in enumerate(requests))
        self.session.tell("post", Orders(numbered))
        return call

    def cancel(self, indexes: Iterable[int]) -> None:
        """Drop those of the requests that have not ended; their pages are free after the running step."""
        left = tuple(index for index in indexes if self._open.pop(index, None) is not None)
        if left:
            self._metrics.cancelled.inc(len(left))
            self.session.tell("post", Orders(cancelled=left))

    def abandon(self, why: str) -> None:
        """End all requests without an answer."""
        calls, self._open = set(self._open.values()), {}
        for call in calls:
            call.events.put_nowait(Lost(why))

    def close(self, wait_s: float) -> None:
        """End the engine's run, and wait for that."""
        self._closing.set()
        if self.ready:
            self.session.tell("end")
            self._thread.join(wait_s)

    def _work(self) -> None:
        failures, came = 0, False
        while not self._closing.is_set():
            try:
                self._load()
                came = True
                self._tell_loop(self._come)
                for events in self.session.stream("serve"):
                    failures = 0
                    self._tell_loop(self._take, events)
                return
            except Exception as caught:  # noqa: BLE001 -- told to whoever waits, and raised where none is left
                error = caught
            if self._closing.is_set():
                return
            failures += 1
            _LOG.error("replica %d was lost: %s", self.number, error, exc_info=not isinstance(error, UserError))
            self._tell_loop(self._lose, error, failures >= ATTEMPTS or not came)
            if not came:
                return
            self._closing.wait(min(failures, MOST_PAUSE_S))

    def _tell_loop(self, action: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(action, *args)

    def _come(self) -> None:
        self.ready, self.gone = True, None
        self._metrics.ready(self.number, self._limits.pages, ready=True)
        _LOG.info("replica %d serves", self.number)

    def _lose(self, error: BaseException, gone: bool) -> None:
        self.ready = False
        self._metrics.ready(self.number, self._limits.pages, ready=False)
        self._metrics.restarts.labels(self.number).inc()
        self.gone = error if gone else None
        self.abandon(f"the model's replica was lost: {_why(error)}")

    def _take(self, events: Sequence[Event | Drawn]) -> None:
        for event in events:
            if isinstance(event, Load):
                self._metrics.load(self.number, self._limits.pages, event)
            elif isinstance(event, TokenEvent):
                if call := self._open.get(event.index):
                    call.take(event)
            elif call := self._open.pop(event.index, None):
                call.take(event)


class Pool:
    """All replicas of an endpoint."""

    def __init__(self, replicas: Sequence[Replica], limits: Limits, metrics: Metrics) -> None:
        self.replicas, self._limits, self._metrics = replicas, limits, metrics
        self.draining = False

    @property
    def busy(self) -> int:
        """Answers that run or wait, on all replicas."""
        return sum(replica.busy for replica in self.replicas)

    @contextmanager
    def call(self, requests: Sequence[Request | Picture], begun_s: float) -> Iterator[Call]:
        """Hand requests, begun at this time, to the replica that has least to do; give up what is left at the end.

        Raises:
            ApiError: 400 they are more than fit at all, 429 all queues are full, 503 no replica takes any.
        """
        if len(requests) > self._limits.most:
            why = f"{len(requests)} answers at once are more than the {self._limits.most} that fit"
            raise ApiError(400, why, "invalid_value", param="n")
        ready = [replica for replica in self.replicas if replica.ready]
        if self.draining or not ready:
            why = "the server is about to end" if self.draining else "no replica of the model is up"
            raise ApiError(503, why, "unavailable", retry_after_s=5)
        least = min(ready, key=lambda replica: replica.busy)
        if least.busy + len(requests) > self._limits.most:
            raise ApiError(
                429, f"{least.busy} answers run or wait; try again", "queue_full", retry_after_s=RETRY_AFTER_S
            )
        call = least.submit(requests, [Stopwatch(self._metrics, begun_s) for _ in requests])
        try:
            yield call
        finally:
            call.leave()

    async def health(self) -> dict[int, str]:
        """Return the state of each replica: ok, starting, silent (a rank does not answer) or gone."""
        answers = await asyncio.gather(*(asyncio.to_thread(replica.session.alive, PING_S) for replica in self.replicas))
        return {replica.number: _state(replica, alive=ok) for replica, ok in zip(self.replicas, answers, strict=True)}


def _state(replica: Replica, *, alive: bool) -> str:
    if replica.gone:
        return "gone"
    if not replica.ready:
        return "starting"
    return "ok" if alive else "silent"


def _why(error: BaseException) -> str:
    return error.problems[0].what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
