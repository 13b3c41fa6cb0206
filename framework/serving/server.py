"""The life of a server: load, answer, drain, end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from framework.serving.replicas import Pool

END_S = 5.0  # for engines to end their step, and for connections to close
LOOK_S = 0.05  # between looks at the replicas
KEEP_S = 75.0  # an idle connection, a little longer than proxies keep theirs
# beyond this aiohttp itself says 400, in plain text; below it the application says what is too long
PARSED_BYTES = 64 << 10
_CLIENTS_FAULT = (HttpProcessingError, web.RequestPayloadError, ConnectionError)


def serve(
    make_app: Callable[[], web.Application],
    pool: Pool,
    listener: socket.socket,
    on_ready: Callable[[], None],
    drain_s: float,
) -> None:
    """Serve until SIGINT or SIGTERM, then let running answers end.

    Args:
        make_app: called within the event loop.
        pool: its replicas are started and closed here.
        listener: bound, not yet listening.
        on_ready: called when the first request can come.
        drain_s: how long answers may go on once the server was told to end.

    Raises:
        KeyboardInterrupt: told to end while loading, or told again, or answers were cut off.
        Exception: of a replica that cannot load, or that was lost last.
    """
    if not asyncio.run(_serve(make_app, pool, listener, on_ready, drain_s)):
        raise KeyboardInterrupt


async def _serve(
    make_app: Callable[[], web.Application],
    pool: Pool,
    listener: socket.socket,
    on_ready: Callable[[], None],
    drain_s: float,
) -> bool:
    """Return whether every answer came to its end."""
    with _told_to_end() as told:
        for replica in pool.replicas:
            replica.start()
        runner = web.AppRunner(
            make_app(),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=END_S,
            keepalive_timeout=KEEP_S,
            max_line_size=PARSED_BYTES,
            max_field_size=PARSED_BYTES,
            logger=_quiet_logger(),
        )
        try:
            await _until(pool, told, lambda: all(replica.ready for replica in pool.replicas), spare=0)
            if told.is_set():
                return False
            await runner.setup()
            await web.SockSite(runner, listener).start()
            on_ready()
            await _until(pool, told, lambda: False, spare=len(pool.replicas) - 1)
            told.clear()
            pool.draining = True
            with suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await _until(pool, told, lambda: not pool.busy, spare=len(pool.replicas))
            complete = not pool.busy
            for replica in pool.replicas:
                replica.abandon("the server was told to end")
            return complete
        finally:
            await runner.cleanup()
            await asyncio.gather(*(asyncio.to_thread(replica.close, END_S) for replica in pool.replicas))


async def _until(pool: Pool, told: asyncio.Event, done: Callable[[], bool], *, spare: int) -> None:
    """Return when `done` or told to end; raise a replica's error where more than `spare` are gone for good."""
    while not told.is_set() and not done():
        gone = [replica.gone for replica in pool.replicas if replica.gone is not None]
        if len(gone) > spare:
            raise gone[-1]
        await asyncio.sleep(LOOK_S)


def _quiet_logger() -> logging.Logger:
    """Return a logger for aiohttp's server without tracebacks of what clients send."""
    logger = logging.getLogger("aiohttp.server")
    logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], _CLIENTS_FAULT)))
    return logger


@contextmanager
def _told_to_end() -> Iterator[asyncio.Event]:
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in kept:
        loop.add_signal_handler(number, told.set)
    try:
        yield told
    finally:
        for number, handler in kept.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
