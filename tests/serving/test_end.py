"""How a server ends: answers that run come to their end, what cannot is said, and nothing is left."""

import os
import signal
import time

import openai
import pytest

from tests.serving.running import serving

SETTINGS = ("parallel.tp_size=2", "runtime.threads=1", "runtime.context=2048", "runtime.max_batch=2")
ASKED = {"model": "local", "prompt": "The quick", "temperature": 0, "extra_body": {"ignore_eos": True}, "stream": True}
pytestmark = [pytest.mark.slow, pytest.mark.ray]


def begun(client, tokens):
    """A stream of so many tokens whose first one has come."""
    stream = iter(client.completions.create(**ASKED, max_tokens=tokens))
    next(stream)
    return stream


# a terminal tells all processes; of SIGTERM the driver alone must hear, Ray's processes end on it (docs/serving.md)
@pytest.mark.parametrize(("number", "tell"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_running_answers_end_and_new_ones_are_refused_then_the_status_is_0(number, tell):
    with serving(*SETTINGS) as server, server.client() as client:
        stream = begun(client, 400)
        tell(server.process.pid, number)
        with pytest.raises(openai.InternalServerError) as caught:
            while True:  # until the signal has come through
                client.completions.create(model="local", prompt="a", max_tokens=1)
        assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert server.process.wait(30) == 0
        assert server.left() == {}
        assert "Traceback" not in server.err


def test_a_second_interrupt_cuts_answers_off_and_the_status_is_130():
    with serving(*SETTINGS) as server, server.client() as client:
        stream = begun(client, 1900)
        os.killpg(server.process.pid, signal.SIGINT)
        time.sleep(0.3)
        begin = time.monotonic()
        assert server.interrupt(20) == 130
        assert time.monotonic() - begin < 10
        with pytest.raises(openai.APIError, match="the server was told to end"):
            list(stream)
        assert server.left() == {}
        assert "Traceback" not in server.err


def test_answers_that_take_too_long_are_cut_off_and_the_status_is_130():
    with serving(*SETTINGS, "job.drain_s=0.2") as server, server.client() as client:
        begun(client, 1900)
        assert server.interrupt(20) == 130
        assert server.left() == {}


def test_an_interrupt_while_it_starts_ends_it_with_130():
    with serving(*SETTINGS, ready=False) as server:
        while "serve " not in server.err:
            time.sleep(0.01)
        time.sleep(1)  # Ray starts
        assert server.interrupt(20) == 130
        assert server.left() == {}
        assert "Traceback" not in server.err
