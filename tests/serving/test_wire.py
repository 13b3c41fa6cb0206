"""What no client library would send: each gets its status, in OpenAI's form where it is HTTP, and nothing breaks."""

import json
import re
import socket

import pytest

from tests.serving.running import serving

pytestmark = pytest.mark.slow
MIB = 1 << 20


@pytest.fixture(scope="module")
def server():
    with serving("runtime.context=256", "runtime.max_batch=2", "job.max_body_mib=1") as running:
        yield running
        assert "Traceback" not in running.err


def post(body, headers=b"", kind=b"application/json", length=None):
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: %s\r\n%sContent-Length: %d"
        b"\r\n\r\n%s" % (kind, headers, len(body) if length is None else length, body)
    )


def exchange(server, data):
    """Send bytes; return status and body of the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(data)
        answer = b""
        while not (head := re.match(rb"HTTP/1.\d (\d+) .*?\r\nContent-Length: (\d+)\r\n.*?\r\n\r\n", answer, re.S)):
            more = connection.recv(MIB)
            assert more, answer
            answer += more
        while len(answer) < head.end() + int(head[2]):
            answer += connection.recv(MIB)
        return int(head[1]), answer[head.end() :]


GOOD = b'{"model": "local", "prompt": "a", "max_tokens": 2, "temperature": 0}'
CASES = {
    "broken JSON": (post(b'{"model": '), 400, "invalid_json"),
    "a list": (post(b"[]"), 400, "invalid_json"),
    "no UTF-8": (post(b'"\xff"'), 400, "invalid_json"),
    "half a surrogate pair": (post(b'{"model": "local", "prompt": "\\ud800"}'), 400, "invalid_json"),
    "NaN": (post(b'{"model": "local", "prompt": "a", "temperature": NaN}'), 400, "invalid_json"),
    "very deep": (post(b"[" * 100_000), 400, "invalid_json"),
    "5000 digits": (post(b'{"model": "local", "prompt": "a", "n": %s}' % (b"9" * 5000)), 400, "invalid_json"),
    "an empty body": (post(b""), 400, "invalid_json"),
    "no prompt": (post(b'{"model": "local"}'), 400, "invalid_value"),
    "no model": (post(b'{"prompt": "a"}'), 400, "invalid_value"),
    "a form": (post(GOOD, kind=b"application/x-www-form-urlencoded"), 415, "invalid_content_type"),
    "no gzip": (post(GOOD, b"Content-Encoding: gzip\r\n"), 400, "invalid_body"),
    "a large body": (post(b" " * (MIB + 1)), 413, "body_too_large"),
    "a large body, announced": (post(b" ", length=1 << 40), 413, "body_too_large"),
    "10,000 bytes of headers": (post(GOOD, b"X-Long: %s\r\n" % (b"a" * 10_000)), 431, "headers_too_large"),
    "10,000 bytes of address": (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 10_000), 414, "address_too_long"),
    "another path": (b"GET /v2/models HTTP/1.1\r\nHost: x\r\n\r\n", 404, "http_error"),
    "another method": (b"GET /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405, "http_error"),
}  # fmt: skip
NO_HTTP = {
    "noise": b"\x00\x01\x02\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\r\n\r\n",
    "a negative length": post(b"", length=-2),
    "headers without end": post(GOOD, b"X-Long: %s\r\n" % (b"a" * 100_000)),
    "a thousand headers": post(GOOD, b"".join(b"X-%d: 1\r\n" % i for i in range(1000))),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_answered_is_refused_in_openais_form(server, name):
    data, status, code = CASES[name]
    found, body = exchange(server, data)
    error = json.loads(body)["error"]
    assert (found, error["type"], error["code"]) == (status, "invalid_request_error", code)
    assert error["message"]


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_is_refused(server, name):
    assert exchange(server, NO_HTTP[name])[0] == 400


def test_it_answers_as_before(server):
    for case in (*(data for data, *_ in CASES.values()), *NO_HTTP.values()):
        exchange(server, case)
    status, body = exchange(server, post(GOOD))
    assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 2)
    assert server.get("/health")[0] == 200
    assert server.pages_used() == 0
