"""The generation loop, the same on every rank: rank 0 chooses tokens, the others follow its choices."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from framework.engine.batch import Batch, BatchBuilder, Piece
from framework.engine.cache import PAGE_TOKENS, KVCache, pages_for
from framework.engine.inbox import Inbox
from framework.engine.output import Output
from framework.engine.request import Event, Failed, Load, Orders, Request, TokenEvent
from framework.engine.sampler import choose, logprobs
from framework.engine.scheduler import Chunk, Scheduler, Sequence
from framework.errors import InputError, Problem, Refused
from framework.layers.group import Group
from framework.text.tokenizer import Tokenizer

Model = Callable[[Batch, list[tuple[Tensor, Tensor]]], Tensor]
Events = list[Event]
HEARTBEAT_S = 5.0  # a rank that waits for work hears from rank 0 this often, far within a collective's time-out
_PAYLOAD_BYTES = 1024  # orders travel in multiples of this, so that few shapes are ever broadcast


class Engine:
    """Runs requests on a model over a paged cache. Its methods are called on all ranks alike.

    Once a step rank 0 spreads an int64 tensor [1 + max_batch]: 2 * bytes of orders + (1 if this is the end), then for
    each token chosen 2 * token + (1 if that ends its request). Orders, where there are any, follow in a second
    broadcast; so requests join and leave between two steps on all ranks at once.

    Args:
        model: (batch, cache layers) to logits [S, vocab] fp32 of the batch's logit rows, equal on all ranks.
        cache: this rank's.
        tokenizer: for text and stop strings, on rank 0; None: events without text.
        group: the ranks.
        max_batch: sequences that run at once.
        chunk_tokens: tokens of a step, so that a long prompt does not hold up the others.
        eos_ids: ids that end a request, beside the tokenizer's own.
        context: tokens of prompt and answer together; what the cache holds if not given.
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
    ) -> None:
        self._model, self._cache, self._tokenizer, self._group = model, cache, tokenizer, group
        self._max_batch, self._chunk_tokens, self._context = max_batch, chunk_tokens, context
        self._message = torch.zeros(1 + max_batch, dtype=torch.int64, device=cache.device)
        self._eos_ids = frozenset(eos_ids) | frozenset(tokenizer.stop_ids if tokenizer else ())

    def generate(self, requests: Iterable[Request]) -> Iterator[Events]:
        """Yield what each step brought, on rank 0; empty lists on the others. Ends with the last request.

        Raises:
            InputError: `bad-request`, `prompt-too-long`. Refused: `not-finite`.
        """
        for events in self._run(requests, None):
            for event in events:
                if isinstance(event, Failed):
                    raise Refused(event.problem)
            yield events

    def serve(self, inbox: Inbox) -> Iterator[Events]:
        """Run the requests that come to rank 0's inbox until that is closed; yield as `generate`.

        A request that fails ends alone, with an event. Where there was a change, a step's events end with the Load.
        An empty list says that nothing will come for a while.
        """
        yield from self._run((), inbox)

    def _run(self, requests: Iterable[Request], inbox: Inbox | None) -> Iterator[Events]:
        scheduler = Scheduler(
            requests,
            self._cache.pages,
            max_batch=self._max_batch,
            chunk_tokens=self._chunk_tokens,
            context=self._context,
        )
        builder = BatchBuilder(self._cache.device)
        outputs: dict[int, Output] = {}
        self._expect(scheduler.waiting, outputs)
        before: list[Sequence] = []
        load = Load(0, 0, 0)
        end = False
        while not end and (inbox is not None or scheduler.unfinished):
            chunks = scheduler.next()
            sequences = [chunk.sequence for chunk in chunks]
            if sequences != before:
                builder.forget()
            before = sequences
            events, orders, end = self._step(builder, scheduler, chunks, outputs, inbox)
            for arrived in orders:
                known = len(scheduler.waiting)
                scheduler.add(arrived.requests)
                self._expect(list(scheduler.waiting)[known:], outputs)
                scheduler.cancel(arrived.cancelled)
                for index in arrived.cancelled:
                    outputs.pop(index, None)
            if inbox is not None and self._group.rank == 0:
                now = Load(len(scheduler.running), len(scheduler.waiting), scheduler.pages_used)
                if now != load:
                    events.append(load := now)
            yield events
            if events and inbox is not None and not scheduler.unfinished:
                yield []

    def _expect(self, sequences: Iterable[Sequence], outputs: dict[int, Output]) -> None:
        """Keep on rank 0 what the answers of these will be made of."""
        if self._group.rank == 0:
            now_s = time.perf_counter()
            for sequence in sequences:
                outputs[sequence.request.index] = Output(sequence, self._tokenizer, self._eos_ids, now_s)

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
        inbox: Inbox | None,
    ) -> tuple[Events, list[Orders], bool]:
        """Run one batch, or wait for orders where there is none; return its events, orders, and whether to end."""
        sequences = [chunk.sequence for chunk in chunks if chunk.ends]
        logits = self._model(builder.build(_pieces(chunks)), self._cache.layers) if chunks else None
        events: Events = []
        if self._group.rank == 0:
            token_ids: list[int] = []
            finished: list[bool] = []
            if logits is not None and sequences:
                token_ids = choose(logits, sequences)
                finished = _report(sequences, token_ids, logits, outputs, events)
            orders, end = inbox.take(0.0 if chunks else HEARTBEAT_S) if inbox else ([], False)
            if self._group.size > 1:
                self._tell(token_ids, finished, orders, end=end)
        else:
            token_ids, finished, orders, end = self._hear(len(sequences))
        scheduler.advance(chunks, token_ids, finished)
        return events, orders, end

    def _tell(self, token_ids: list[int], finished: list[bool], orders: list[Orders], *, end: bool) -> None:
        payload = pickle.dumps(orders) if orders else b""
        size = -(-len(payload) // _PAYLOAD_BYTES) * _PAYLOAD_BYTES
        words = [2 * size + end, *(2 * token + done for token, done in zip(token_ids, finished, strict=True))]
        self._message[: len(words)] = torch.tensor(words)
        self._group.broadcast(self._message)
        if size:
            padded = torch.frombuffer(bytearray(payload.ljust(size, b"\0")), dtype=torch.uint8)
            self._group.broadcast(padded.to(self._cache.device))

    def _hear(self, count: int) -> tuple[list[int], list[bool], list[Orders], bool]:
        first, *words = self._group.broadcast(self._message)[: 1 + count].tolist()
        orders: list[Orders] = []
        if size := first >> 1:
            payload = self._group.broadcast(torch.empty(size, dtype=torch.uint8, device=self._cache.device))
            orders = pickle.loads(payload.cpu().numpy().tobytes())
        return [word >> 1 for word in words], [bool(word & 1) for word in words], orders, bool(first & 1)


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
        request = sequence.request
        output = outputs[request.index]
        if output.is_empty and not bool(torch.isfinite(logits[i]).all()):
            events.append(Failed(request.index, _not_finite(request.index)))
        else:
            count = request.sampling.logprobs
            likeliest = logprobs(logits[i].cpu(), token_id, count) if count else None
            events.append(TokenEvent(request.index, token_id, output.take(token_id, now_s), likeliest))
            if output.finish_reason is not None:
                events.append(output.finished())
        ended = not isinstance(events[-1], TokenEvent)
        if ended:
            del outputs[request.index]
        finished.append(ended)
    return finished


def _not_finite(index: int) -> Problem:
    return Problem(
        "not-finite",
        "the model's first logits are not finite numbers",
        f"prompt {index}",
        "weights or activations overflow: the text would be garbage",
        "job=verify job.per_module=true names the first module; runtime.dtype=bfloat16",
    )
