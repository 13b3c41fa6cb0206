"""The engine's events in OpenAI's words: whole answers, and the chunks of streamed ones."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from framework.engine.request import Finished, TokenEvent
from framework.serving.protocol import Asked
from framework.text.tokenizer import Tokenizer


@dataclass(slots=True)
class _Choice:
    """One answer as it grows; `shown`: characters of all tokens so far."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenEvent] = field(default_factory=list)
    shown: int = 0
    end: Finished | None = None


class Answers:
    """All choices of one request. Events come in by choice number; JSON objects go out."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer, choices: int) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        self._choices = [_Choice() for _ in range(choices)]
        kind = "chat.completion" if asked.chat else "text_completion"
        streamed = ".chunk" if asked.chat and asked.stream else ""
        self._head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind + streamed,
            "created": int(time.time()),
            "model": asked.model,
        }

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.end is not None for choice in self._choices)

    def take(self, event: TokenEvent | Finished) -> None:
        """Add an event to its choice of a whole answer."""
        choice = self._choices[event.index]
        if isinstance(event, Finished):
            choice.end = event
        elif self._asked.logprobs is not None:
            choice.logprobs.append(event)

    def whole(self) -> dict[str, Any]:
        """Return the answer, once it is complete."""
        found = []
        for number, choice in enumerate(self._choices):
            assert choice.end is not None
            text: dict[str, Any] = {"text": choice.end.text}
            if self._asked.chat:
                text = {"message": {"role": "assistant", "content": choice.end.text, "refusal": None}}
            logprobs = self._logprobs(choice, choice.logprobs)
            found.append({"index": number, **text, "logprobs": logprobs, "finish_reason": choice.end.finish_reason})
        return {**self._head, "choices": found, "usage": self.usage()}

    def first_chunks(self) -> Iterable[dict[str, Any]]:
        """Yield what a stream begins with: in a chat, who speaks."""
        if self._asked.chat:
            for number in range(len(self._choices)):
                yield self._chunk(number, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def chunk(self, event: TokenEvent | Finished) -> dict[str, Any] | None:
        """Take an event; return the chunk that tells it, None where it has nothing to tell yet."""
        choice = self._choices[event.index]
        if isinstance(event, Finished):
            choice.end = event
            empty: dict[str, Any] = {"delta": {}} if self._asked.chat else {"text": ""}
            return self._chunk(event.index, empty, None, event.finish_reason)
        if not event.text and self._asked.logprobs is None:
            return None
        told = {"delta": {"content": event.text}} if self._asked.chat else {"text": event.text}
        return self._chunk(event.index, told, self._logprobs(choice, [event]), None)

    def last_chunks(self) -> Iterable[dict[str, Any]]:
        """Yield what comes after the last choice's end: the usage, if that was asked for."""
        if self._asked.include_usage:
            yield {**self._head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Count tokens; a prompt counts once, whatever its choices."""
        ends = [choice.end for choice in self._choices if choice.end is not None]
        prompt = sum(end.prompt_tokens for end in ends[:: self._asked.choices])
        completion = sum(len(end.token_ids) for end in ends)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _chunk(
        self, number: int, told: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": number, **told, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [choice], **({"usage": None} if self._asked.include_usage else {})}

    def _logprobs(self, choice: _Choice, events: list[TokenEvent]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        if self._asked.chat:
            return {"content": [self._chat_entry(event) for event in events], "refusal": None}
        texts = [self._text(event.token_id) for event in events]
        offsets = []
        for text in texts:
            offsets.append(choice.shown)
            choice.shown += len(text)
        found = [event.logprobs for event in events if event.logprobs is not None]
        tops = [{self._text(token): value for token, value in one.top[: self._asked.logprobs]} for one in found]
        return {
            "tokens": texts,
            "token_logprobs": [one.chosen for one in found],
            # as OpenAI does it, the chosen token is there even if it is none of the likeliest
            "top_logprobs": [top | {text: one.chosen} for top, text, one in zip(tops, texts, found, strict=True)],
            "text_offset": offsets,
        }

    def _chat_entry(self, event: TokenEvent) -> dict[str, Any]:
        found = event.logprobs
        assert found is not None
        top = [self._entry(token, value) for token, value in found.top[: self._asked.logprobs]]
        return {**self._entry(event.token_id, found.chosen), "top_logprobs": top}

    def _entry(self, token_id: int, value: float) -> dict[str, Any]:
        text = self._text(token_id)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    def _text(self, token_id: int) -> str:
        # the second of two: sentencepiece drops the space before the first
        first, both = (self._tokenizer.decode([token_id] * count, skip_special=False) for count in (1, 2))
        return both[len(first) :]
