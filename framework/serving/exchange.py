"""What all routes do: read a body, wait for a replica's events, take up again what a lost replica left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from framework.engine.request import Failed
from framework.serving.protocol import ApiError
from framework.serving.replicas import Call, Lost, Pool

BODY_S = 30.0  # for a request's body to arrive


class ReplicaLost(ApiError):
    """The replica died that worked on the request, or was ended."""

    def __init__(self, why: str) -> None:
        super().__init__(503, why, "replica_lost", retry_after_s=5)


async def read_body(request: web.Request) -> bytes:
    """Return a request's body.

    Raises:
        ApiError: 408, 413, 415.
    """
    if request.content_type != "application/json":
        # also keeps out forms of foreign web pages, which may be sent to the loopback interface without asking
        raise ApiError(415, "the body has to be of Content-Type: application/json", "invalid_content_type")
    most = request.client_max_size
    too_large = ApiError(413, f"the body has more than {most} bytes, which job.max_body_mib allows", "body_too_large")
    if (request.content_length or 0) > most:
        raise too_large  # before anything of it is read
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise too_large from error
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_S:g} s", "timeout") from error


async def taken_up(pool: Pool, reply: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Return the reply; make it again, once, where a replica was lost before anything was sent."""
    try:
        return await reply()
    except ReplicaLost:
        if not any(replica.ready for replica in pool.replicas):
            raise
        return await reply()


async def next_events(call: Call) -> list[Any]:
    """Return all events that have come, at least one: TokenEvent and Finished of texts, Drawn of pictures.

    Raises:
        ApiError: the request cannot be answered.
    """
    came = [await call.events.get()]
    while not call.events.empty():
        came.append(call.events.get_nowait())
    found: list[Any] = []
    for event in came:
        if isinstance(event, Lost):
            raise ReplicaLost(event.why)
        if isinstance(event, Failed):
            raise ApiError(500, event.problem.what, event.problem.code)
        found.append(event)
    return found
