"""Continuous batching: who computes how many tokens in the next step.

Pure Python, no clocks: all ranks run it on the same requests and tokens and so make the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from framework.engine.cache import PAGE_TOKENS, pages_for
from framework.engine.pages import PageAllocator
from framework.engine.request import Request, refusal
from framework.errors import InputError


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way.

    `ids`: prompt and generated tokens, `most` at the end; the first `cached` of them are in the cache.
    """

    request: Request
    ids: list[int]
    most: int
    pages: list[int] = field(default_factory=list)
    cached: int = 0


class Chunk(NamedTuple):
    """The next `tokens` uncached tokens of a sequence; `ends` if they are all, so that a token is sampled."""

    sequence: Sequence
    tokens: int
    ends: bool


class Scheduler:
    """First come, first served, with chunked prefill.

    A step is one token of every sequence that decodes, then prompt tokens up to `chunk_tokens` in all. At
    most `max_batch` sequences run at once. A sequence gets pages for its longest possible run if they are
    free, else for its present tokens; it grows page by page. If no page is left, the youngest sequence gives
    up its pages and is computed again later. A sequence ends where `context` does: prompt and answer together
    are no longer.

    Raises:
        InputError: `bad-request`: an empty prompt, or no tokens asked for; `prompt-too-long`. All at once.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        pages: int,
        *,
        max_batch: int,
        chunk_tokens: int,
        context: int | None = None,
    ) -> None:
        room = pages * PAGE_TOKENS
        self._context = room if context is None else min(context, room)
        self._pages = pages
        self._allocator = PageAllocator(pages)
        self._max_batch, self._chunk_tokens = max_batch, chunk_tokens
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.add(requests)

    @property
    def pages_used(self) -> int:
        """How many pages sequences hold."""
        return self._pages - self._allocator.free

    def add(self, requests: Iterable[Request]) -> None:
        """Let requests wait behind those that wait already.

        Raises:
            InputError: as the constructor; then none of them waits.
        """
        requests = list(requests)
        if problems := [problem for r in requests if (problem := refusal(r, self._context))]:
            raise InputError(problems)
        self.waiting += (_sequence(request, self._context) for request in requests)

    def cancel(self, indexes: Collection[int]) -> None:
        """Drop the requests of these indexes and free their pages; those that have ended are not known any more."""
        for sequence in self.running:
            if sequence.request.index in indexes:
                self._allocator.give_back(sequence.pages)
        self.running = [s for s in self.running if s.request.index not in indexes]
        self.waiting = deque(s for s in self.waiting if s.request.index not in indexes)

    @property
    def unfinished(self) -> bool:
        """Whether there is anything left to compute."""
        return bool(self.running or self.waiting)

    def next(self) -> list[Chunk]:
        """Return the chunks of the next step, decoding sequences first; never empty while unfinished."""
        self._grow()
        if self.waiting:
            self._admit()
        chunks: list[Chunk] = []
        prefill: list[Sequence] = []
        for sequence in self.running:
            if len(sequence.ids) - sequence.cached == 1:
                chunks.append(Chunk(sequence, 1, True))
            else:
                prefill.append(sequence)
        # in the order of their pages: a CPU multiplies neighbours in one product
        chunks.sort(key=lambda chunk: chunk.sequence.pages[0])
        # prompts go on, slowly, even where decoding alone fills the step
        budget = max(self._chunk_tokens - len(chunks), self._chunk_tokens // 4, 1)
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
            most = pages_for(sequence.most - 1)  # the last token is never fed back
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


def _sequence(request: Request, context: int) -> Sequence:
    ids = list(request.prompt_ids)
    return Sequence(request, ids, min(len(ids) + request.sampling.max_new_tokens, context))
