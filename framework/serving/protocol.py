"""What OpenAI's API takes, as requests of ours; what it says when it refuses."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from framework.engine.request import SamplingParams
from framework.errors import nearest

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_PICTURES = 10
MAX_LOGPROBS = 20
COMPLETION_TOKENS = 16  # OpenAI's default of `max_tokens` where a text is continued; a chat may go on to the end


class ApiError(Exception):
    """A refusal in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the response."""
        names = {401: "authentication_error", 429: "rate_limit_error"}
        kind = names.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Asked:
    """One HTTP request, understood.

    Attributes:
        chat: messages, not texts, and the answer in the chat form.
        prompts: texts or token ids; for a chat, none.
        messages: of a chat.
        variables: further names for the chat template.
        choices: answers to each prompt.
        sampling: of every answer.
        to_the_end: no `max_tokens` was given where that means as many as the context has.
        logprobs: how many of the likeliest tokens to show with each; None: no log probabilities.
        stream: answer in server-sent events.
        include_usage: end the events with one that counts tokens.
    """

    chat: bool
    model: str
    prompts: tuple[str | list[int], ...]
    messages: tuple[Mapping[str, Any], ...]
    variables: Mapping[str, Any]
    choices: int
    sampling: SamplingParams
    to_the_end: bool
    logprobs: int | None
    stream: bool
    include_usage: bool


def read_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a request's body.

    Raises:
        ApiError: it is none.
    """
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", "invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, "the body is not a JSON object", "invalid_json")
    return data


def read_request(data: Mapping[str, Any], *, chat: bool) -> Asked:
    """Read the JSON object of a completion or chat completion.

    Raises:
        ApiError: 400, naming the parameter.
    """
    given = _values(data, _COMMON | (_CHAT if chat else _COMPLETION))
    logprobs = given["logprobs"]
    if chat:
        if given["top_logprobs"] and not logprobs:
            raise _bad("top_logprobs", "needs `logprobs` to be true")
        logprobs = given["top_logprobs"] if logprobs else None
    if given.get("best_of") not in (None, given["n"]):
        raise _bad("best_of", "other than `n` is not supported")
    if (given["stream_options"] is not None) and not given["stream"]:
        raise _bad("stream_options", "needs `stream` to be true")
    limit = given["max_completion_tokens"] if chat and given["max_completion_tokens"] else given["max_tokens"]
    sampling = SamplingParams(
        max_new_tokens=limit or COMPLETION_TOKENS,
        temperature=given["temperature"],
        top_k=given["top_k"],
        top_p=given["top_p"],
        min_p=given["min_p"],
        repetition_penalty=given["repetition_penalty"],
        stop=given["stop"],
        stop_ids=given["stop_token_ids"],
        seed=secrets.randbits(63) if given["seed"] is None else given["seed"],
        # the engine reports the chosen token's own only together with the likeliest
        logprobs=0 if logprobs is None else max(1, logprobs),
        ignore_eos=given["ignore_eos"],
    )
    return Asked(
        chat,
        given["model"],
        () if chat else given["prompt"],
        given["messages"] if chat else (),
        given["chat_template_kwargs"] if chat else {},
        given["n"],
        sampling,
        chat and limit is None,
        logprobs,
        given["stream"],
        bool((given["stream_options"] or {}).get("include_usage")),
    )


@dataclass(frozen=True, slots=True)
class AskedPictures:
    """One HTTP request for pictures, understood; `settings` in a recipe's words, where given."""

    model: str | None
    prompt: str
    count: int
    seed: int
    settings: Mapping[str, Any]


def read_pictures(data: Mapping[str, Any]) -> AskedPictures:
    """Read the JSON object of an image generation.

    Raises:
        ApiError: 400, naming the parameter.
    """
    given = _values(data, _PICTURES)
    settings = {name: given[name] for name in ("steps", "guidance", "negative_prompt") if given[name] is not None}
    if given["size"]:
        settings |= dict(zip(("width", "height"), given["size"], strict=True))
    seed = secrets.randbits(31) if given["seed"] is None else given["seed"]
    return AskedPictures(given["model"], given["prompt"], given["n"], seed, settings)


def _values(data: Mapping[str, Any], fields: Mapping[str, _Field]) -> dict[str, Any]:
    for name in data:
        if name not in fields and name not in _WITHOUT_EFFECT:
            near = nearest(name, fields)
            raise _bad(name, "is not known here" + (f"; did you mean `{near[0]}`?" if near else ""))
    return {name: _value(name, data.get(name), field) for name, field in fields.items()}


@dataclass(frozen=True, slots=True)
class _Field:
    """A parameter: `read` returns its value or raises ValueError with what it has to be."""

    read: Callable[[Any], Any]
    default: Any = None
    required: bool = False


def _value(name: str, value: Any, field: _Field) -> Any:  # noqa: ANN401
    if value is None:
        if field.required:
            raise _bad(name, "is missing")
        return field.default
    try:
        return field.read(value)
    except ValueError as error:
        raise _bad(name, str(error)) from error


def _bad(name: str, why: str) -> ApiError:
    return ApiError(400, f"`{name}` {why}", "invalid_value", param=name)


def _boolean(value: Any) -> bool:  # noqa: ANN401
    if not isinstance(value, bool):
        raise ValueError("has to be true or false")
    return value


def _text(value: Any) -> str:  # noqa: ANN401
    if not isinstance(value, str):
        raise ValueError("has to be a text")
    return value


def _integer(least: int, most: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:  # noqa: ANN401
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"has to be a whole number from {least} to {most}")
        return value

    return read


def _number(least: float, most: float, *, above: bool = False) -> Callable[[Any], float]:
    def read(value: Any) -> float:  # noqa: ANN401
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        if not fits or (above and value == least):
            raise ValueError(f"has to be a number from {least:g}{' (not itself)' if above else ''} to {most:g}")
        return float(value)

    return read


def _only(*values: Any) -> Callable[[Any], Any]:  # noqa: ANN401
    def read(value: Any) -> Any:  # noqa: ANN401
        if value not in values or isinstance(value, bool) != isinstance(values[0], bool):
            raise ValueError(f"is not supported, but for {json.dumps(values[0])}")
        return value

    return read


def _stops(value: Any) -> tuple[str, ...]:  # noqa: ANN401
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops) or len(stops) > MAX_STOPS:
        raise ValueError(f"has to be a text or up to {MAX_STOPS} of them, none empty")
    return tuple(stops)


def _ids(value: Any) -> tuple[int, ...]:  # noqa: ANN401
    if not _is_ids(value):
        raise ValueError("has to be a list of token ids")
    return tuple(value)


def _is_ids(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)


def _prompts(value: Any) -> tuple[str | list[int], ...]:  # noqa: ANN401
    if isinstance(value, str) or (value and _is_ids(value)):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(v, str) or _is_ids(v) for v in value):
        return tuple(value)
    raise ValueError("has to be a text, a list of texts, a list of token ids, or a list of such lists")


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:  # noqa: ANN401
    if not isinstance(value, list) or not value:
        raise ValueError("has to be a list of at least one message")
    return tuple(_message(i, message) for i, message in enumerate(value))


def _message(i: int, message: Any) -> Mapping[str, Any]:  # noqa: ANN401
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"holds at place {i} no object with a `role`")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise ValueError(f"holds at place {i} a content part that is no text; this model reads text only")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"holds at place {i} no `content` that is a text")
    return {**message, "content": content}


def _object(value: Any) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(value, dict):
        raise ValueError("has to be an object")
    return value


def _size(value: Any) -> tuple[int, int] | None:  # noqa: ANN401
    if value == "auto":
        return None
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError('has to be "auto" or of the form "WIDTHxHEIGHT"')
    return int(found[1]), int(found[2])


def _stream_options(value: Any) -> dict[str, bool]:  # noqa: ANN401
    if not isinstance(value, dict) or not set(value) <= {"include_usage"}:
        raise ValueError("has to be an object with nothing but `include_usage`")
    return {name: _boolean(entry) for name, entry in value.items()}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_INT64 = 2**63 - 1
_COMMON = {
    "model": _Field(_text, required=True),
    "n": _Field(_integer(1, MAX_CHOICES), 1),
    "max_tokens": _Field(_integer(1, _INT64)),
    "temperature": _Field(_number(0, 2), 1.0),
    "top_p": _Field(_number(0, 1, above=True), 1.0),
    "stop": _Field(_stops, ()),
    "seed": _Field(_integer(-_INT64 - 1, _INT64)),
    "stream": _Field(_boolean, False),
    "stream_options": _Field(_stream_options),
    "presence_penalty": _Field(_only(0)),
    "frequency_penalty": _Field(_only(0)),
    "logit_bias": _Field(_only({})),
    # beyond OpenAI's, by the names that other servers gave them
    "top_k": _Field(_integer(0, _INT64), 0),
    "min_p": _Field(_number(0, 1), 0.0),
    "repetition_penalty": _Field(_number(0, 10, above=True), 1.0),
    "stop_token_ids": _Field(_ids, ()),
    "ignore_eos": _Field(_boolean, False),
}
_COMPLETION = {
    "prompt": _Field(_prompts, required=True),
    "logprobs": _Field(_integer(0, MAX_LOGPROBS)),
    "best_of": _Field(_integer(1, MAX_CHOICES)),
    "echo": _Field(_only(False)),
    "suffix": _Field(_only("")),
}
_CHAT = {
    "messages": _Field(_messages, required=True),
    "max_completion_tokens": _Field(_integer(1, _INT64)),
    "logprobs": _Field(_boolean, False),
    "top_logprobs": _Field(_integer(0, MAX_LOGPROBS), 0),
    "chat_template_kwargs": _Field(_object, {}),
    "response_format": _Field(_only({"type": "text"})),
    "tools": _Field(_only([])),
    "tool_choice": _Field(_only("none", "auto")),
    "modalities": _Field(_only(["text"])),
}
_PICTURES = {
    "prompt": _Field(_text, required=True),
    "model": _Field(_text),
    "n": _Field(_integer(1, MAX_PICTURES), 1),
    "size": _Field(_size),
    "response_format": _Field(_only("b64_json")),
    "output_format": _Field(_only("png")),
    "quality": _Field(_only("auto", "standard")),
    "background": _Field(_only("auto", "opaque")),
    "stream": _Field(_only(False)),
    # beyond OpenAI's
    "seed": _Field(_integer(0, _INT64 - MAX_PICTURES)),
    "steps": _Field(_integer(1, 1000)),
    "guidance": _Field(_number(0, 100)),
    "negative_prompt": _Field(_text),
}
# who asks and how it is billed, stored or cached: nothing that changes an answer here
_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
