"""The routes of the endpoint, over aiohttp."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from aiohttp import web

from framework.engine.request import Request
from framework.serving.answers import Answers
from framework.serving.exchange import next_events, read_body, taken_up
from framework.serving.metrics import CONTENT_TYPE, Metrics
from framework.serving.pictures import Drawn, Picture, PictureModel, pictures_of
from framework.serving.prompts import Model, requests_of
from framework.serving.protocol import ApiError, Asked, read_json, read_pictures, read_request
from framework.serving.replicas import Pool

WRITE_S = 60.0  # for a client to take what was written
TARGET_BYTES = 8 << 10  # path and query of a request
HEADER_BYTES = 8 << 10  # names and values of a request's headers
OPEN = ("/health", "/ready")  # asked by load balancers, which have no key
_LOG = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(
    model: Model | PictureModel, pool: Pool, metrics: Metrics, *, keys: Sequence[str], max_body_bytes: int
) -> web.Application:
    """Return the application; `keys`: any of them opens it, none leaves it open."""
    endpoint = _Endpoint(model.id, pool, metrics)
    app = web.Application(
        client_max_size=max_body_bytes, middlewares=[_errors(metrics), _authorized([k.encode() for k in keys])]
    )
    app.add_routes(
        [
            web.get("/health", endpoint.health),
            web.get("/ready", endpoint.ready),
            web.get("/metrics", endpoint.metrics),
            web.get("/v1/models", endpoint.models),
            web.get("/v1/models/{id:.+}", endpoint.model),
        ]
    )
    if isinstance(model, PictureModel):
        app.add_routes([web.post("/v1/images/generations", _Pictures(model, pool).generations)])
    else:
        texts = _Texts(model, pool)
        app.add_routes([web.post("/v1/completions", texts.completions)])
        app.add_routes([web.post("/v1/chat/completions", texts.chat_completions)])
    return app


def _errors(metrics: Metrics) -> Callable[..., Awaitable[web.StreamResponse]]:
    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Say every refusal in OpenAI's form, and count responses."""
        try:
            _bounded(request)
            response = await handler(request)
        except ApiError as error:
            response = _refused(error)
        except web.RequestPayloadError as error:
            why = getattr(error.__cause__, "message", str(error))
            response = _refused(ApiError(400, f"the body cannot be read: {why}", "invalid_body"))
        except web.HTTPException as error:
            message = f"{error.reason}: {request.method} {request.path[:80]}"
            response = _refused(ApiError(error.status, message, "http_error"))
            response.headers.extend({k: v for k, v in error.headers.items() if k == "Allow"})
        except Exception:  # noqa: BLE001 -- the one place where a bug ends; it is logged and counted
            _LOG.exception("%s %s", request.method, request.path)
            response = _refused(ApiError(500, "this is a bug of the server; its log says more", "internal_error"))
        route = request.match_info.route.resource
        metrics.requests.labels(route.canonical if route else "other", response.status).inc()
        return response

    return handle


def _bounded(request: web.Request) -> None:
    target, headers = len(request.raw_path), sum(len(name) + len(value) for name, value in request.raw_headers)
    if target > TARGET_BYTES:
        raise ApiError(414, f"the address has {target} bytes, {TARGET_BYTES} are taken", "address_too_long")
    if headers > HEADER_BYTES:
        raise ApiError(431, f"the headers have {headers} bytes, {HEADER_BYTES} are taken", "headers_too_large")


def _authorized(keys: Sequence[bytes]) -> Callable[..., Awaitable[web.StreamResponse]]:
    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Ask for a key."""
        if keys and request.path not in OPEN:
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            given = key.strip().encode("utf-8", "surrogateescape")
            # all of them, each in constant time: how long this takes says nothing of a key
            fitting = sum(hmac.compare_digest(given, known) for known in keys)
            if not fitting or scheme.lower() != "bearer":
                raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")
        return await handler(request)

    return handle


class _Endpoint:
    """What is asked of any server."""

    def __init__(self, model_id: str, pool: Pool, metrics: Metrics) -> None:
        self._id, self._pool, self._metrics = model_id, pool, metrics
        self._card = {"id": model_id, "object": "model", "created": int(time.time()), "owned_by": "npu-launch"}

    async def health(self, request: web.Request) -> web.Response:
        """200 where every rank of every replica answers."""
        states = await self._pool.health()
        ok = set(states.values()) == {"ok"}
        return web.json_response({"status": "ok" if ok else "failing", "replicas": states}, status=200 if ok else 503)

    async def ready(self, request: web.Request) -> web.Response:
        """200 where a request would be taken."""
        ready = not self._pool.draining and any(replica.ready for replica in self._pool.replicas)
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card]})

    async def model(self, request: web.Request) -> web.Response:
        if (asked := request.match_info["id"]) != self._id:
            raise ApiError(404, f"the model `{asked}` is not here, `{self._id}` is", "model_not_found")
        return web.json_response(self._card)


class _Texts:
    """Completions and chats."""

    def __init__(self, model: Model, pool: Pool) -> None:
        self._model, self._pool = model, pool

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=False)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=True)

    async def _answer(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        begun_s = time.perf_counter()
        body = await read_body(request)
        # templates and long texts take milliseconds, in which others' tokens must go out
        asked, requests = await asyncio.to_thread(self._understood, body, chat)
        reply = self._streamed if asked.stream else self._whole
        return await taken_up(self._pool, lambda: reply(request, asked, requests, begun_s))

    def _understood(self, body: bytes, chat: bool) -> tuple[Asked, list[Request]]:
        asked = read_request(read_json(body), chat=chat)
        return asked, requests_of(asked, self._model)

    async def _whole(
        self, request: web.Request, asked: Asked, requests: list[Request], begun_s: float
    ) -> web.StreamResponse:
        answers = Answers(asked, self._model.tokenizer, len(requests))
        with self._pool.call(requests, begun_s) as call:
            while not answers.complete:
                for event in await next_events(call):
                    answers.take(event)
        return web.json_response(answers.whole())

    async def _streamed(
        self, request: web.Request, asked: Asked, requests: list[Request], begun_s: float
    ) -> web.StreamResponse:
        answers = Answers(asked, self._model.tokenizer, len(requests))
        with self._pool.call(requests, begun_s) as call:
            events = await next_events(call)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
            await response.prepare(request)
            try:
                await _send(response, answers.first_chunks())
                while True:
                    await _send(response, filter(None, map(answers.chunk, events)))
                    if answers.complete:
                        break
                    events = await next_events(call)
                await _send(response, answers.last_chunks())
                await _write(response, b"data: [DONE]\n\n")
            except ApiError as error:
                await _send(response, [error.body()])  # the status is sent: this and no [DONE] say that it failed
            except (ConnectionError, TimeoutError):
                if request.transport is not None:
                    request.transport.abort()
        return response


class _Pictures:
    """Images."""

    def __init__(self, model: PictureModel, pool: Pool) -> None:
        self._model, self._pool = model, pool

    async def generations(self, request: web.Request) -> web.StreamResponse:
        begun_s = time.perf_counter()
        asked = read_pictures(read_json(await read_body(request)))
        pictures = await asyncio.to_thread(pictures_of, asked, self._model)
        return await taken_up(self._pool, lambda: self._drawn(pictures, begun_s))

    async def _drawn(self, pictures: list[Picture], begun_s: float) -> web.StreamResponse:
        found: dict[int, bytes] = {}
        with self._pool.call(pictures, begun_s) as call:
            while len(found) < len(pictures):
                found |= {event.index: event.png for event in await next_events(call) if isinstance(event, Drawn)}
        data = [{"b64_json": base64.b64encode(found[i]).decode()} for i in range(len(pictures))]
        return web.json_response({"created": int(time.time()), "output_format": "png", "data": data})


async def _send(response: web.StreamResponse, chunks: Iterable[dict[str, Any]]) -> None:
    if data := b"".join(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks):
        await _write(response, data)


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(WRITE_S):
        await response.write(data)


def _refused(error: ApiError) -> web.Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(error.body(), status=error.status, headers=headers)
