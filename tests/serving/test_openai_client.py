"""The official client against a server on one rank in its own process."""

import time

import openai
import pytest

from tests.serving.running import serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    with serving("runtime.dtype=float32", "runtime.context=256", "runtime.max_batch=4", "job.max_queue=8") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as made:
        yield made


GREEDY = {"model": "local", "prompt": "The quick brown", "temperature": 0, "max_tokens": 12}
ASKED = {"model": "local", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 12}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["local"]
    assert client.models.retrieve("local").object == "model"


def test_a_completion_and_its_stream_say_the_same(client):
    whole = client.completions.create(**GREEDY)
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (12, whole.usage.prompt_tokens + 12)
    chunks = list(client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 3
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_stop_string_ends_the_text_before_it(client):
    whole = client.completions.create(**GREEDY).choices[0].text
    stop = whole[4:6]
    stopped = client.completions.create(**GREEDY, stop=[stop, "never"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_the_same_seed_draws_the_same_and_choices_differ(client):
    given = {**GREEDY, "temperature": 1.5, "n": 3}
    one, same, other = (client.completions.create(**given, seed=seed) for seed in (7, 7, 8))
    texts = [[choice.text for choice in found.choices] for found in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3
    assert [choice.index for choice in one.choices] == [0, 1, 2]


def test_logprobs_of_a_completion(client):
    found = client.completions.create(**GREEDY, logprobs=3).choices[0]
    given = found.logprobs
    assert len(given.tokens) == len(given.token_logprobs) == len(given.top_logprobs) == 12
    assert "".join(given.tokens) == found.text
    assert given.text_offset == [sum(map(len, given.tokens[:i])) for i in range(12)]
    for token, value, top in zip(given.tokens, given.token_logprobs, given.top_logprobs, strict=True):
        assert top[token] == value == max(top.values())  # greedy
        assert len(top) == 3
    streamed = list(client.completions.create(**GREEDY, logprobs=3, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == given.tokens
    assert [offset for part in parts for offset in part.text_offset] == given.text_offset
    assert client.completions.create(**GREEDY, logprobs=0).choices[0].logprobs.token_logprobs == given.token_logprobs


def test_token_ids_and_several_prompts(client):
    found = client.completions.create(**{**GREEDY, "prompt": [[1, 2, 3], [4, 5]], "n": 2, "temperature": 1.0})
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == 5


def test_a_chat_and_its_stream_say_the_same(client):
    whole = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 12
    assert all(bytes(entry.bytes).decode() == entry.token for entry in choice.logprobs.content)
    chunks = list(client.chat.completions.create(**ASKED, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    same = client.chat.completions.create(**{**ASKED, "messages": [{"role": "user", "content": parts}]})
    assert same.choices[0].message.content == choice.message.content


def test_a_chat_without_a_bound_goes_on_to_the_end_of_the_context(client):
    given = {key: value for key, value in ASKED.items() if key != "max_tokens"}
    usage = client.chat.completions.create(**given, extra_body={"ignore_eos": True}).usage
    assert usage.total_tokens == 256


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "gpt"}, 404, "model_not_found", "model"),
        ({"prompt": "word " * 400}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": 255}, 400, "context_length_exceeded", "max_tokens"),
        ({"temperature": -1}, 400, "invalid_value", "temperature"),
        ({"temperature": "hot"}, 400, "invalid_value", "temperature"),
        ({"n": 13}, 400, "invalid_value", "n"),
        ({"n": True}, 400, "invalid_value", "n"),
        ({"prompt": {"a": 1}}, 400, "invalid_value", "prompt"),
        ({"prompt": ""}, 400, "invalid_value", "prompt"),
        ({"prompt": [100000]}, 400, "invalid_value", "prompt"),
        ({"stop": [""]}, 400, "invalid_value", "stop"),
        ({"echo": True}, 400, "invalid_value", "echo"),
        ({"logit_bias": {"1": 5}}, 400, "invalid_value", "logit_bias"),
        ({"extra_body": {"max_token": 5}}, 400, "invalid_value", "max_token"),
    ],
)
def test_mistakes_are_refused_in_openais_form(client, change, status, code, param):
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{**GREEDY, **change})
    assert caught.value.status_code == status
    assert (caught.value.code, caught.value.param, caught.value.type) == (code, param, "invalid_request_error")


def test_a_client_that_goes_away_frees_its_pages(server, client):
    before = server.figures()["answers_cancelled_total"]
    stream = client.completions.create(**{**GREEDY, "max_tokens": 240, "extra_body": {"ignore_eos": True}}, stream=True)
    next(iter(stream))
    assert server.pages_used() > 0
    stream.close()
    end = time.monotonic() + 5
    while server.pages_used() and time.monotonic() < end:
        time.sleep(0.02)
    assert server.pages_used() == 0
    assert server.figures()["answers_cancelled_total"] == before + 1
