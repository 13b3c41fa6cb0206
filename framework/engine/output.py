"""What one request has brought so far: text, end, times. Only rank 0 keeps these."""

from __future__ import annotations

from collections.abc import Set

from framework.engine.request import Finished, FinishReason
from framework.engine.scheduler import Sequence
from framework.text.stream import StopMatcher, TextStream
from framework.text.tokenizer import Tokenizer

_CONTEXT_TOKENS = 4  # of the prompt's end: what stands before a token decides on its leading space


class Output:
    """The answer to one request as it grows.

    Args:
        sequence: the request on its way; its `ids` do not yet hold the token that `take` gets.
        tokenizer: None gives no text.
        eos_ids: the model's own ends.
        start_s: when the request came, on the clock of `take`.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None, eos_ids: Set[int], start_s: float) -> None:
        sampling, prompt_ids = sequence.request.sampling, sequence.request.prompt_ids
        self._sequence = sequence
        self._end_ids = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else eos_ids)
        self._stream = TextStream(tokenizer, prompt_ids[-_CONTEXT_TOKENS:]) if tokenizer else None
        self._matcher = StopMatcher(sampling.stop)
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._start_s = self._first_s = self._last_s = start_s
        self.finish_reason: FinishReason | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no token has come yet."""
        return not self._token_ids

    def take(self, token_id: int, now_s: float) -> str:
        """Take the next token; return the text that it makes certain. Sets `finish_reason` with the last one."""
        if not self._token_ids:
            self._first_s = now_s
        self._last_s = now_s
        self._token_ids.append(token_id)
        text = self._text_of(token_id)
        self._texts.append(text)
        return text

    def finished(self) -> Finished:
        """Return the end of the request, once `finish_reason` is set."""
        assert self.finish_reason is not None
        request, more, seconds = self._sequence.request, len(self._token_ids) - 1, self._last_s - self._first_s
        return Finished(
            request.index,
            self.finish_reason,
            len(request.prompt_ids),
            self._first_s - self._start_s,
            more / seconds if more and seconds else 0.0,
            "".join(self._texts),
            self._token_ids,
        )

    def _text_of(self, token_id: int) -> str:
        if token_id in self._end_ids:
            self.finish_reason = "stop"
            return self._rest()
        text, hit = "", False
        if self._stream is not None:
            text, hit = self._matcher.push(self._stream.push(token_id))
        if hit:
            self.finish_reason = "stop"
        elif len(self._sequence.ids) + 1 >= self._sequence.most:
            self.finish_reason = "length"
            text += self._rest()
        return text

    def _rest(self) -> str:
        """Return what was held back for a character or a stop string that did not come."""
        if self._stream is None:
            return ""
        text, hit = self._matcher.push(self._stream.flush())
        if hit:
            self.finish_reason = "stop"
            return text
        return text + self._matcher.flush()
