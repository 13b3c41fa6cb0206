"""The generation loop, the same on every rank: rank 0 chooses tokens, the others follow its choices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from framework.engine.batch import Batch, BatchBuilder, Piece
from framework.engine.cache import KVCache, pages_for
from framework.engine.request import FinishReason, Finished, Request, TokenEvent
from framework.engine.sampler import logprobs, sample, uniform
from framework.engine.scheduler import Chunk, Scheduler, Sequence
from framework.errors import Problem, Refused
from framework.layers.group import Group
from framework.text.stream import StopMatcher, TextStream
from framework.text.tokenizer import Tokenizer

Model = Callable[[Batch, list[tuple[Tensor, Tensor]]], Tensor]
Events = list[TokenEvent | Finished]


@dataclass
class _Output:
    """What rank 0 knows of one request's text."""

    request: Request
    stream: TextStream | None
    matcher: StopMatcher
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    first_s: float = 0.0


class Engine:
    """Runs requests on a model over a paged cache. `generate` and `score` are called on all ranks alike."""

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
    ) -> None:
        self._model, self._cache, self._tokenizer, self._group = model, cache, tokenizer, group
        self._max_batch, self._chunk_tokens = max_batch, chunk_tokens
        self._eos_ids = frozenset(eos_ids) | frozenset(tokenizer.stop_ids if tokenizer else ())

    def generate(self, requests: Iterable[Request]) -> Iterator[Events]:
        """Yield what each step brought, on rank 0; empty lists on the others.

        Raises:
            InputError: `bad-request`. Refused: `cache-too-small`, `not-finite`.
        """
        start_s = time.perf_counter()
        requests = list(requests)
        scheduler = Scheduler(
            requests, self._cache.pages, max_batch=self._max_batch, chunk_tokens=self._chunk_tokens
        )
        builder = BatchBuilder(self._cache.device)
        outputs = {id(request): self._output(request) for request in requests}
        before: list[Sequence] = []
        while scheduler.unfinished:
            chunks = scheduler.next()
            sequences = [chunk.sequence for chunk in chunks]
            if sequences != before:
                builder.forget()
            before = sequences
            logits, ending = self._step(builder, chunks)
            events: Events = []
            token_ids, finished = [0] * len(ending), [False] * len(ending)
            if self._group.rank == 0:
                greedy = logits.argmax(1).tolist() if ending else []
                for i, chunk in enumerate(ending):
                    output = outputs[id(chunk.sequence.request)]
                    token_ids[i] = self._choose(output, chunk, logits[i], greedy[i])
                    finished[i] = self._extend(output, token_ids[i], logits[i], start_s, events)
            token_ids, finished = self._agree(token_ids, finished)
            scheduler.advance(chunks, token_ids, finished)
            yield events

    @torch.inference_mode()
    def score(self, token_ids: list[int]) -> Tensor:
        """Return fp32 logits [T, vocab] of every position, computed in chunks."""
        return self._score(token_ids, self._chunk_tokens)

    @torch.inference_mode()
    def score_stepwise(self, token_ids: list[int]) -> Tensor:
        """Return the same by decoding one token after the other."""
        return self._score(token_ids, 1)

    def _score(self, token_ids: list[int], step: int) -> Tensor:
        count = len(token_ids)
        if pages_for(count) > self._cache.pages:
            room = self._cache.pages * 128
            raise Refused(
                Problem(
                    "cache-too-small",
                    f"{count} tokens do not fit the cache of {room}",
                    "runtime.context, runtime.max_batch",
                    fix=f"runtime.context={count}",
                )
            )
        builder = BatchBuilder(self._cache.device)
        pages = list(range(pages_for(count)))
        parts = [
            self._model(
                builder.build([Piece(token_ids, pages, start, min(start + step, count), "all")]), self._cache.layers
            ).cpu()
            for start in range(0, count, step)
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def _step(self, builder: BatchBuilder, chunks: list[Chunk]) -> tuple[Tensor, list[Chunk]]:
        """Run one batch; return the logits of the chunks that end, and those chunks."""
        ending = [chunk for chunk in chunks if chunk.ends]
        pieces = [
            Piece(
                chunk.sequence.ids,
                chunk.sequence.pages,
                chunk.sequence.cached,
                chunk.sequence.cached + chunk.tokens,
                "last" if chunk.ends or (i == 0 and not ending) else "none",
            )
            for i, chunk in enumerate(chunks)
        ]
        logits = self._model(builder.build(pieces), self._cache.layers)
        return logits, ending

    def _output(self, request: Request) -> _Output:
        stream = TextStream(self._tokenizer, request.prompt_ids[-4:]) if self._tokenizer else None
        return _Output(request, stream, StopMatcher(request.sampling.stop))

    def _choose(self, output: _Output, chunk: Chunk, logits: Tensor, greedy: int) -> int:
        params, ids = output.request.sampling, chunk.sequence.ids
        if params.temperature == 0.0 and params.repetition_penalty == 1.0:
            return greedy
        number = uniform(params.seed, output.request.index, len(ids))
        return sample(logits.cpu(), params, ids, number)

    def _extend(self, output: _Output, token_id: int, logits: Tensor, start_s: float, events: Events) -> bool:
        """Take a token; append its events; return whether the request is finished."""
        request, params = output.request, output.request.sampling
        now_s = time.perf_counter()
        if not output.token_ids:
            output.first_s = now_s
            if not bool(torch.isfinite(logits).all()):
                raise Refused(
                    Problem(
                        "not-finite",
                        "the model's first logits are not finite numbers",
                        f"prompt {request.index}",
                        "weights or activations overflow: the text would be garbage",
                        "job=verify job.per_module=true names the first module; runtime.dtype=bfloat16",
                    )
                )
        output.token_ids.append(token_id)
        ends = token_id in params.stop_ids or (token_id in self._eos_ids and not params.ignore_eos)
        shown, hit = ("", False) if ends or output.stream is None else output.matcher.push(output.stream.push(token_id))
        reason: FinishReason | None = "stop" if ends or hit else None
        if reason is None and len(output.token_ids) >= params.max_new_tokens:
            reason = "length"
        if reason and not hit and output.stream is not None:
            rest, hit = output.matcher.push(output.stream.flush())
            shown += rest + ("" if hit else output.matcher.flush())
        output.text.append(shown)
        extra = logprobs(logits.cpu(), token_id, params.logprobs) if params.logprobs else None
        events.append(TokenEvent(request.index, token_id, shown, extra))
        if reason:
            events.append(_finished(output, reason, start_s, now_s))
        return reason is not None

    def _agree(self, token_ids: list[int], finished: list[bool]) -> tuple[list[int], list[bool]]:
        """Spread rank 0's choices: one token id a chunk, negative (minus one) when it ends its request."""
        if self._group.size == 1 or not token_ids:
            return token_ids, finished
        codes = [-1 - t if done else t for t, done in zip(token_ids, finished, strict=True)]
        spread = self._group.broadcast(torch.tensor(codes, device=self._cache.device)).tolist()
        return [-1 - code if code < 0 else code for code in spread], [code < 0 for code in spread]


def _finished(output: _Output, reason: FinishReason, start_s: float, now_s: float) -> Finished:
    more, seconds = len(output.token_ids) - 1, now_s - output.first_s
    return Finished(
        output.request.index,
        reason,
        len(output.request.prompt_ids),
        output.first_s - start_s,
        more / seconds if more and seconds else 0.0,
        "".join(output.text),
        output.token_ids,
    )
