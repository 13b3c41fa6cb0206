"""Continuous batching: who computes how many tokens in the next step.

Pure Python, no clocks: all ranks run it on the same requests and tokens and so make the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from framework.engine.cache import PAGE_TOKENS, pages_for
from framework.engine.pages import PageAllocator
from framework.engine.request import Request
from framework.errors import InputError, Problem, Refused


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way. `ids`: prompt and generated tokens; the first `cached` of them are in the cache."""

    request: Request
    ids: list[int]
    pages: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def most_cached(self) -> int:
        """Tokens in the cache if the request runs to its end (the last token is never fed back)."""
        return len(self.request.prompt_ids) + self.request.sampling.max_new_tokens - 1


class Chunk(NamedTuple):
    """The next `tokens` uncached tokens of a sequence; `ends` if they are all, so that a token is sampled."""

    sequence: Sequence
    tokens: int
    ends: bool


class Scheduler:
    """First come, first served, with chunked prefill.

    A step is one token of every sequence that decodes, then prompt tokens up to `chunk_tokens` in all. At most
    `max_batch` sequences run at once. A sequence gets pages for its longest possible run if they are free, else for
    its present tokens; it grows page by page. If no page is left, the youngest sequence gives up its pages and is
    computed again later.

    Raises:
        InputError: `bad-request`: an empty prompt, or no tokens asked for.
        Refused: `cache-too-small`: a request that the whole cache cannot hold.
    """

    def __init__(self, requests: Iterable[Request], pages: int, *, max_batch: int, chunk_tokens: int) -> None:
        self._allocator = PageAllocator(pages)
        self._max_batch, self._chunk_tokens = max_batch, chunk_tokens
        self.running: list[Sequence] = []
        self.waiting = deque(Sequence(request, list(request.prompt_ids)) for request in requests)
        for sequence in self.waiting:
            _check(sequence, pages)

    @property
    def unfinished(self) -> bool:
        """Whether there is anything left to compute."""
        return bool(self.running or self.waiting)

    def next(self) -> list[Chunk]:
        """Return the chunks of the next step, decoding sequences first; never empty while unfinished."""
        self._grow()
        if self.waiting:
            self._admit()
        chunks, prefill = [], []
        for sequence in self.running:
            if len(sequence.ids) - sequence.cached == 1:
                chunks.append(Chunk(sequence, 1, True))
            else:
                prefill.append(sequence)
        budget = self._chunk_tokens - len(chunks)
        for sequence in prefill:
            if budget <= 0:
                break
            left = len(sequence.ids) - sequence.cached
            tokens = min(left, budget)
            chunks.append(Chunk(sequence, tokens, tokens == left))
            budget -= tokens
        return chunks

    def advance(self, chunks: list[Chunk], token_ids: list[int], finished: list[bool]) -> None:
        """Take the step's result: one token and flag for each chunk that `ends`, in order."""
        row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.cached += chunk.tokens
            if not chunk.ends:
                continue
            sequence.ids.append(token_ids[row])
            if finished[row]:
                self.running.remove(sequence)
                self._allocator.give_back(sequence.pages)
            row += 1

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_batch:
            sequence = self.waiting[0]
            most = pages_for(sequence.most_cached)
            pages = self._allocator.take(most)
            if pages is None:
                pages = self._allocator.take(min(most, pages_for(len(sequence.ids) + 1)))
            if pages is None:
                return
            sequence.pages = pages
            self.running.append(self.waiting.popleft())

    def _grow(self) -> None:
        """Give every sequence a page for its next token; take pages from the youngest if there are none."""
        for sequence in list(self.running):
            while sequence.pages and pages_for(len(sequence.ids)) > len(sequence.pages):
                if not self._allocator.extend(sequence.pages):
                    self._preempt_youngest()

    def _preempt_youngest(self) -> None:
        youngest = self.running.pop()
        self._allocator.give_back(youngest.pages)
        youngest.cached = 0
        self.waiting.appendleft(youngest)


def _check(sequence: Sequence, pages: int) -> None:
    request = sequence.request
    where = f"request {request.index}"
    if not request.prompt_ids:
        raise InputError(
            Problem("bad-request", "the prompt has no tokens", where, fix="give at least one token")
        )
    new = request.sampling.max_new_tokens
    if new < 1:
        raise InputError(
            Problem("bad-request", f"{new} new tokens were asked for", where, fix="max_new_tokens=1")
        )
    if pages_for(sequence.most_cached) > pages:
        room = pages * PAGE_TOKENS
        prompt = len(request.prompt_ids)
        raise Refused(
            Problem(
                "cache-too-small",
                f"a prompt of {prompt} tokens and {new} new ones can never fit the cache of {room} tokens",
                where,
                f"{prompt} + {new} - 1 = {sequence.most_cached} tokens to hold; "
                f"{pages} pages x {PAGE_TOKENS} tokens = {room}",
                f"job.max_new_tokens={room - prompt + 1}"
                if prompt <= room
                else f"runtime.context={prompt + new}",
            )
        )
