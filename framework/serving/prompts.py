"""From what was asked to the engine's requests: the chat template, token ids, and what the context has room for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from framework.engine.request import Request, refusal
from framework.errors import UserError
from framework.serving.protocol import ApiError, Asked
from framework.text.chat import render_chat
from framework.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """What the endpoint serves: `context` tokens of prompt and answer together, token ids below `vocab`."""

    id: str
    tokenizer: Tokenizer
    context: int
    vocab: int


def requests_of(asked: Asked, model: Model) -> list[Request]:
    """Return a request per choice, numbered from 0: all choices of the first prompt, then of the next.

    A choice's random numbers depend on the seed and its number alone.

    Raises:
        ApiError: 404 another model; 400 a prompt that cannot be read or is too long.
    """
    if asked.model != model.id:
        raise ApiError(404, f"the model `{asked.model}` is not here, `{model.id}` is", "model_not_found", param="model")
    found = [ids for prompt in _encoded(asked, model) for ids in [prompt] * asked.choices]
    return [_request(i, ids, asked, model) for i, ids in enumerate(found)]


def _encoded(asked: Asked, model: Model) -> list[list[int]]:
    tokenizer = model.tokenizer
    if not asked.chat:
        return [tokenizer.encode(p, add_special=True) if isinstance(p, str) else p for p in asked.prompts]
    if tokenizer.chat_template is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", "chat_template", param="messages")
    try:
        text = render_chat(
            tokenizer.chat_template,
            asked.messages,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            variables=asked.variables,
        )
    except UserError as error:
        problem = error.problems[0]
        raise ApiError(400, f"{problem.what}: {problem.why}", "chat_template", param="messages") from error
    return [tokenizer.encode(text, add_special=False)]


def _request(number: int, ids: list[int], asked: Asked, model: Model) -> Request:
    param = "messages" if asked.chat else "prompt"
    if any(i >= model.vocab for i in ids):
        raise ApiError(400, f"a token id is not below {model.vocab}", "invalid_value", param=param)
    room = model.context - len(ids)
    sampling = replace(asked.sampling, max_new_tokens=max(1, room)) if asked.to_the_end else asked.sampling
    if problem := refusal(request := Request(number, ids, sampling, draw=number), model.context):
        code = "context_length_exceeded" if problem.code == "prompt-too-long" else "invalid_value"
        raise ApiError(400, f"{problem.what}: {problem.why or problem.fix}", code, param=param)
    if sampling.max_new_tokens > room:
        raise ApiError(
            400,
            f"the context holds {model.context} tokens; the prompt has {len(ids)}, so that {room} are left of the "
            f"{sampling.max_new_tokens} that are asked for",
            "context_length_exceeded",
            param="max_completion_tokens" if asked.chat else "max_tokens",
        )
    return request
