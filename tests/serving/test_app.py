"""Queues, keys, slow clients and lost replicas, on replicas without a model."""

import asyncio
import json
import socket

import pytest
from aiohttp import web

from framework.engine.request import Failed
from framework.errors import Problem, Refused
from framework.serving import app as app_module
from framework.serving import exchange, replicas
from framework.serving.metrics import Metrics
from framework.serving.server import _serve
from tests.serving.stub import ASKED, StubSession, answer, application, token, until

DEATH = Refused(Problem("rank-lost", "rank 1 ended while running serve", "node a"))


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def ask(client, **changes):
    """Status, headers and JSON of a completion."""
    async with client.post("/v1/completions", json=ASKED | changes) as response:
        return response.status, response.headers, await response.json()


async def chunks(response):
    """All server-sent events."""
    lines = (await response.text()).split("\n\n")
    assert all(line.startswith("data: ") for line in lines if line)
    return [line.removeprefix("data: ") for line in lines if line]


def test_a_full_queue_is_refused_with_the_time_to_come_again():
    async def work():
        session = StubSession(answers=False)
        async with application(session) as (client, pool):
            held = [asyncio.create_task(ask(client)) for _ in range(3)]  # two that run, one that waits
            await until(lambda: len(session.requests) == 3)
            status, headers, body = await ask(client)
            assert (status, headers["Retry-After"]) == (429, "1")
            assert (body["error"]["type"], body["error"]["code"]) == ("rate_limit_error", "queue_full")
            assert (await ask(client, n=4))[0] == 400  # never fits: to come again would not help
            for request in list(session.requests):
                session.put(*answer(request))
            assert [(await task)[0] for task in held] == [200] * 3
            session.answers = True
            assert (await ask(client))[0] == 200
            assert pool.busy == 0

    run(work())


def test_a_server_that_drains_takes_nothing_new():
    async def work():
        async with application(StubSession()) as (client, pool):
            pool.draining = True
            status, headers, body = await ask(client)
            assert (status, headers["Retry-After"], body["error"]["type"]) == (503, "5", "server_error")
            assert (await client.get("/ready")).status == 503
            assert (await client.get("/health")).status == 200

    run(work())


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer two"},
                                   {"Authorization": "Basic one"}, {"Authorization": "Bearer öne"}])  # fmt: skip
def test_a_wrong_key_is_refused_everywhere_but_where_load_balancers_look(given):
    async def work():
        async with application(StubSession(), keys=("one", "other")) as (client, _):
            for path in ("/v1/models", "/metrics", "/nothing"):
                async with client.get(path, headers=given) as response:
                    assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
                    error = (await response.json())["error"]
                    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert [(await client.get(path, headers=given)).status for path in ("/health", "/ready")] == [200, 200]
            right = {"Authorization": "Bearer other"}
            assert (await client.post("/v1/completions", json=ASKED, headers=right)).status == 200

    run(work())


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch):
    monkeypatch.setattr(exchange, "BODY_S", 0.2)

    async def slow():
        yield b"{"
        await asyncio.sleep(20)

    async def work():
        async with application(StubSession()) as (client, _):
            async with client.post(
                "/v1/completions", data=slow(), headers={"Content-Type": "application/json"}
            ) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (408, "timeout")
            assert (await ask(client))[0] == 200

    run(work())


def test_a_client_that_does_not_read_is_given_up_and_its_answer_too(monkeypatch):
    monkeypatch.setattr(app_module, "WRITE_S", 0.3)

    async def work():
        session = StubSession(answers=False)
        async with application(session) as (client, pool):
            _, writer = await asyncio.open_connection(client.host, client.port, limit=1024)
            body = json.dumps(ASKED | {"stream": True, "max_tokens": 200}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await until(lambda: session.requests)
            for _ in range(300):  # more than the system's buffers take
                session.put(*[token(session.requests[0])] * 300)
            await until(lambda: session.cancelled == [session.requests[0].index], 20)
            assert pool.busy == 0
            session.answers = True
            assert (await ask(client))[0] == 200
            writer.close()

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_forgotten_wherever_its_request_is(stream):
    async def work():
        session = StubSession(answers=False)
        async with application(session) as (client, pool):
            task = asyncio.create_task(ask(client, stream=stream, n=2))
            await until(lambda: len(session.requests) == 2)
            task.cancel()
            await until(lambda: session.cancelled == [request.index for request in session.requests])
            assert pool.busy == 0

    run(work())


def test_requests_go_where_least_is_to_do():
    async def work():
        sessions = [StubSession(answers=False) for _ in range(3)]
        async with application(*sessions) as (client, _):
            tasks = [asyncio.create_task(ask(client)) for _ in range(6)]
            await until(lambda: [len(session.requests) for session in sessions] == [2, 2, 2])
            for request in sessions[1].requests:
                sessions[1].put(*answer(request))
            await until(lambda: sum(task.done() for task in tasks) == 2)
            tasks += [asyncio.create_task(ask(client)) for _ in range(2)]
            await until(lambda: [len(session.requests) for session in sessions] == [2, 4, 2])
            for session in sessions:
                for request in session.requests[-2:]:
                    session.put(*answer(request))
            assert {(await task)[0] for task in tasks} == {200}

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_on_a_lost_replica_is_taken_up_by_another_if_nothing_was_sent(stream):
    async def work():
        first, second = StubSession(answers=False), StubSession()
        async with application(first, second) as (client, pool):
            task = asyncio.create_task(client.post("/v1/completions", json=ASKED | {"stream": stream}))
            await until(lambda: first.requests)
            if not stream:
                first.put(token(first.requests[0]))
            first.die(DEATH)
            response = await task
            assert response.status == 200
            if stream:
                found = await chunks(response)
                assert found[-1] == "[DONE]"
                assert len(found) == 3 + 2
            assert len(second.requests) == 1
            await until(lambda: pool.replicas[0].ready)  # back by itself
            assert first.loads == 2

    run(work())


def test_a_stream_on_a_lost_replica_ends_with_an_error_and_the_replica_comes_back():
    async def work():
        first, second = StubSession(answers=False), StubSession()
        async with application(first, second) as (client, pool):
            task = asyncio.create_task(client.post("/v1/completions", json=ASKED | {"stream": True}))
            await until(lambda: first.requests)
            first.put(token(first.requests[0]))
            async with await task as response:
                first.die(DEATH)
                found = await chunks(response)
            error = json.loads(found[-1])["error"]
            assert (error["type"], error["code"]) == ("server_error", "replica_lost")
            assert "rank 1 ended" in error["message"]
            assert second.requests == []
            await until(lambda: pool.replicas[0].ready)
            text = await (await client.get("/metrics")).text()
            assert 'replica_restarts_total{replica="0"} 1.0' in text

    run(work())


def test_without_another_replica_the_request_fails_at_once_and_health_says_so():
    async def work():
        session = StubSession(answers=False)
        async with application(session) as (client, pool):
            task = asyncio.create_task(ask(client))
            await until(lambda: session.requests)
            session.broken = RuntimeError("no room")
            session.die(DEATH)
            status, headers, body = await task
            assert (status, headers["Retry-After"], body["error"]["code"]) == (503, "5", "replica_lost")
            async with client.get("/health") as response:
                assert (response.status, await response.json()) == (
                    503, {"status": "failing", "replicas": {"0": "starting"}},
                )  # fmt: skip
            assert (await ask(client))[0] == 503
            session.broken, session.answers = None, True
            await until(lambda: pool.replicas[0].ready)
            assert (await ask(client))[0] == 200
            assert (await client.get("/health")).status == 200

    run(work())


def test_a_replica_that_does_not_come_back_counts_as_gone_until_it_does(monkeypatch):
    monkeypatch.setattr(replicas, "MOST_PAUSE_S", 0.05)

    async def work():
        session = StubSession()
        async with application(session) as (client, pool):
            session.broken = DEATH
            session.die(DEATH)
            await until(lambda: pool.replicas[0].gone is DEATH)
            assert session.loads >= replicas.ATTEMPTS
            assert (await (await client.get("/health")).json())["replicas"] == {"0": "gone"}
            session.broken = None
            await until(lambda: pool.replicas[0].ready)
            assert (await ask(client))[0] == 200
            assert (await client.get("/health")).status == 200

    run(work())


def test_a_model_that_cannot_be_loaded_at_first_is_not_tried_again():
    async def work():
        session = StubSession()
        session.broken = DEATH
        with pytest.raises(Refused):
            await serve_until_gone(session)
        assert session.loads == 1

    async def serve_until_gone(session):
        metrics, limits = Metrics(), replicas.Limits(1, 1, 1)
        pool = replicas.Pool([replicas.Replica(0, session, session.load, limits, metrics)], limits, metrics)
        with socket.socket() as listener:
            await _serve(lambda: web.Application(), pool, listener, lambda: None, 1)

    run(work())


def test_an_answer_that_the_model_cannot_give_fails_alone():
    async def work():
        session = StubSession(answers=False)
        async with application(session) as (client, _):
            bad, good = (asyncio.create_task(ask(client)) for _ in range(2))
            await until(lambda: len(session.requests) == 2)
            session.put(Failed(session.requests[0].index, Problem("not-finite", "the logits are not finite", "x")))
            session.put(*answer(session.requests[1]))
            assert sorted([(await bad)[0], (await good)[0]]) == [200, 500]

    run(work())
