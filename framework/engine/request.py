"""What goes into the engine and what comes out of it. Imports no torch: the driver uses these too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from framework.errors import Problem

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch a filter off. They apply in the order
    repetition penalty, temperature, top-k, top-p, min-p. `stop` are strings and `stop_ids` tokens that end
    the text, beside the model's own end tokens (unless `ignore_eos`). `logprobs`: how many of the likeliest
    tokens to report with each chosen one; 0 reports none.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    logprobs: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. `index` names it in the events.

    `draw` fixes, with the seed, its random numbers; None: the index does.
    """

    index: int
    prompt_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    draw: int | None = None


@dataclass(frozen=True, slots=True)
class Orders:
    """What arrives while others run: requests that join, and indexes of those that nobody waits for any more."""

    requests: tuple[Request, ...] = ()
    cancelled: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities (before penalty, temperature and filters).

    `top` are (token id, logprob), likeliest first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token and the text that became certain with it ("" within a character or a stop string)."""

    index: int
    token_id: int
    text: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request. `token_ids` include the ending stop token, `text` is without it.

    `ttft_s`: from the start of the stream to the first token. `tok_s`: tokens a second after the first one; 0
    if there was only one.
    """

    index: int
    finish_reason: FinishReason
    prompt_tokens: int
    ttft_s: float
    tok_s: float
    text: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request that the model cannot answer."""

    index: int
    problem: Problem


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a serving engine is after a step."""

    running: int
    waiting: int
    pages_used: int


Event = TokenEvent | Finished | Failed | Load


def refusal(request: Request, context: int) -> Problem | None:
    """Say why a request cannot run where prompt and answer together have `context` tokens; None if it can."""
    where, prompt, new = f"request {request.index}", len(request.prompt_ids), request.sampling.max_new_tokens
    if not prompt:
        return Problem("bad-request", "the prompt has no tokens", where, fix="give at least one token")
    if new < 1:
        return Problem("bad-request", f"{new} new tokens were asked for", where, fix="job.max_new_tokens=64")
    if prompt >= context:
        return Problem(
            "prompt-too-long",
            f"the prompt has {prompt} tokens, the context holds {context}",
            where,
            "at least one token must be left to generate",
            f"shorten it to {context - 1} tokens   or   runtime.context={prompt + new}",
        )
    return None
