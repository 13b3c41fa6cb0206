"""The generation loop, the same on every rank: rank 0 chooses tokens, the others follow its choices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from framework.engine.batch import Batch, BatchBuilder, Piece
from framework.engine.cache import PAGE_TOKENS, KVCache, pages_for
from framework.engine.output import Output
from framework.engine.request import Finished, Request, TokenEvent
from framework.engine.sampler import choose, logprobs
from framework.engine.scheduler import Chunk, Scheduler, Sequence
from framework.errors import InputError, Problem, Refused
from framework.layers.group import Group
from framework.text.tokenizer import Tokenizer

Model = Callable[[Batch, list[tuple[Tensor, Tensor]]], Tensor]
Events = list[TokenEvent | Finished]


class Engine:
    """Runs requests on a model over a paged cache. `generate` and `score` are called on all ranks alike.

    Once a step rank 0 spreads an int64 tensor [1 + max_batch]: whether to stop, then for each token chosen
    2 * token + (1 if that ends its request). Requests that arrive while others run can enter by the same
    message.

    Args:
        model: (batch, cache layers) to logits [S, vocab] fp32 of the batch's logit rows, equal on all ranks.
        cache: this rank's.
        tokenizer: for text and stop strings, on rank 0; None: events without text.
        group: the ranks.
        max_batch: sequences that run at once.
        chunk_tokens: tokens of a step, so that a long prompt does not hold up the others.
        eos_ids: ids that end a request, beside the tokenizer's own.
        context: tokens of prompt and answer together; what the cache holds if not given.
        should_stop: asked once a step on rank 0; True ends `generate` on all ranks.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        tokenizer: Tokenizer | None,
        group: Group,
        *,
        max_batch: int,
        chunk_tokens: int,
        eos_ids: Iterable[int] = (),
        context: int | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self._model, self._cache, self._tokenizer, self._group = model, cache, tokenizer, group
        self._max_batch, self._chunk_tokens = max_batch, chunk_tokens
        self._context, self.should_stop = context, should_stop
        self._message = torch.zeros(1 + max_batch, dtype=torch.int64, device=cache.device)
        self._eos_ids = frozenset(eos_ids) | frozenset(tokenizer.stop_ids if tokenizer else ())

    def generate(self, requests: Iterable[Request]) -> Iterator[Events]:
        """Yield what each step brought, on rank 0; empty lists on the others.

        Raises:
            InputError: `bad-request`, `prompt-too-long`. Refused: `not-finite`.
        """
        start_s = time.perf_counter()
        scheduler = Scheduler(
            requests,
            self._cache.pages,
            max_batch=self._max_batch,
            chunk_tokens=self._chunk_tokens,
            context=self._context,
        )
        builder = BatchBuilder(self._cache.device)
        outputs = {
            id(sequence): Output(sequence, self._tokenizer, self._eos_ids, start_s)
            for sequence in scheduler.waiting
            if self._group.rank == 0
        }
        before: list[Sequence] = []
        while scheduler.unfinished:
            chunks = scheduler.next()
            sequences = [chunk.sequence for chunk in chunks]
            if sequences != before:
                builder.forget()
            before = sequences
            events, stop = self._step(builder, scheduler, chunks, outputs)
            if stop:
                return
            yield events

    @torch.inference_mode()
    def score(self, token_ids: list[int]) -> Tensor:
        """Return fp32 logits [T, vocab] of every position on the CPU, computed in chunks.

        Raises:
            InputError: `prompt-too-long`, `bad-request`.
        """
        return self._score(token_ids, self._chunk_tokens)

    @torch.inference_mode()
    def score_stepwise(self, token_ids: list[int]) -> Tensor:
        """Return the same by decoding one token after the other."""
        return self._score(token_ids, 1)

    def _score(self, token_ids: list[int], step: int) -> Tensor:
        count, room = len(token_ids), self._cache.pages * PAGE_TOKENS
        if not count:
            raise InputError(Problem("bad-request", "there are no tokens to score", "the prompt"))
        if count > min(room, self._context or room):
            raise InputError(
                Problem(
                    "prompt-too-long",
                    f"{count} tokens cannot be scored, the context holds {min(room, self._context or room)}",
                    "runtime.context",
                    fix=f"runtime.context={count}",
                )
            )
        builder = BatchBuilder(self._cache.device)
        pages = list(range(pages_for(count)))
        parts = [
            self._model(
                builder.build([Piece(token_ids, pages, start, min(start + step, count), "all")]),
                self._cache.layers,
            ).cpu()
            for start in range(0, count, step)
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def _step(
        self,
        builder: BatchBuilder,
        scheduler: Scheduler,
        chunks: list[Chunk],
        outputs: dict[int, Output],
    ) -> tuple[Events, bool]:
        """Run one batch; return its events and whether to stop."""
        logits = self._model(builder.build(_pieces(chunks)), self._cache.layers)
        sequences = [chunk.sequence for chunk in chunks if chunk.ends]
        events: Events = []
        if self._group.rank == 0:
            token_ids = choose(logits, sequences) if sequences else []
            finished = _report(sequences, token_ids, logits, outputs, events)
            stop = self.should_stop is not None and self.should_stop()
            if self._group.size > 1:
                self._tell(token_ids, finished, stop=stop)
        else:
            token_ids, finished, stop = self._hear(len(sequences))
        scheduler.advance(chunks, token_ids, finished)
        return events, stop

    def _tell(self, token_ids: list[int], finished: list[bool], *, stop: bool) -> None:
        words = [int(stop), *(2 * token + done for token, done in zip(token_ids, finished, strict=True))]
        self._message[: len(words)] = torch.tensor(words)
        self._group.broadcast(self._message)

    def _hear(self, count: int) -> tuple[list[int], list[bool], bool]:
        stop, *words = self._group.broadcast(self._message)[: 1 + count].tolist()
        return [word >> 1 for word in words], [bool(word & 1) for word in words], bool(stop)


def _pieces(chunks: list[Chunk]) -> list[Piece]:
    # kernels want at least one row of logits: where no token is due, one is computed and dropped
    idle = not any(chunk.ends for chunk in chunks)
    return [
        Piece(s.ids, s.pages, s.cached, s.cached + tokens, "last" if ends or (idle and i == 0) else "none")
        for i, (s, tokens, ends) in enumerate(chunks)
    ]


def _report(
    sequences: list[Sequence], token_ids: list[int], logits: Tensor, outputs: dict[int, Output], events: Events
) -> list[bool]:
    """Append the events of a step's tokens, logits [S, vocab]; return which requests are finished."""
    now_s = time.perf_counter()
    finished = []
    for i, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True)):
        output, request = outputs[id(sequence)], sequence.request
        if output.is_empty:
            _check_finite(logits[i], request.index)
        count = request.sampling.logprobs
        likeliest = logprobs(logits[i].cpu(), token_id, count) if count else None
        events.append(TokenEvent(request.index, token_id, output.take(token_id, now_s), likeliest))
        if output.finish_reason is not None:
            events.append(output.finished())
        finished.append(output.finish_reason is not None)
    return finished


def _check_finite(logits: Tensor, index: int) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise Refused(
            Problem(
                "not-finite",
                "the model's first logits are not finite numbers",
                f"prompt {index}",
                "weights or activations overflow: the text would be garbage",
                "job=verify job.per_module=true names the first module; runtime.dtype=bfloat16",
            )
        )
