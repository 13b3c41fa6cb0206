"""job=generate: prompts to streamed text and results.jsonl. The driver imports no torch."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from framework.engine.request import Finished, Request, SamplingParams, TokenEvent
from framework.jobs import run_dir
from framework.jobs.common import open_checked, options, resolve_device
from framework.jobs.log import note
from framework.jobs.prompts import Prompt, read_prompts
from framework.jobs.ranks import started
from framework.planning.make import make_plan
from framework.planning.runnable import require_runnable
from framework.recipe.schema import Recipe
from framework.report.generate import closing, first_line, ready_line
from framework.text.tokenizer import load_tokenizer


def run(recipe: Recipe) -> int:
    """Generate. Returns 0, or raises what the command line turns into its exit status."""
    start = time.perf_counter()
    checked = open_checked(recipe)
    require_runnable(checked)
    plan = make_plan(checked, resolve_device(recipe))
    note(first_line(plan.to_json()))
    tokenizer = load_tokenizer(checked.index)
    prompts = read_prompts(recipe, tokenizer, plan.runtime.context)
    _note_short(prompts, int(options(recipe)["max_new_tokens"]), plan.runtime.context)
    run = run_dir.create(recipe, plan)
    with started(recipe, plan, tokenizer.to_json(), log_dir=run.path) as (session, load_s):
        held = session.call("bytes_held")
        note(ready_line(load_s, held, plan.to_json()))
        stream = _Stream(run, prompts)
        begin = time.perf_counter()
        try:
            for events in session.stream("generate", requests(recipe, prompts)):
                stream.take(events)
        except KeyboardInterrupt:
            note(f"\n{stream.current} of {len(prompts)} prompts written to {run.path / 'results.jsonl'}")
            raise
        generate_s = time.perf_counter() - begin
    tokens = sum(len(result["token_ids"]) for result in stream.results.values())
    metrics = {
        "load_s": load_s,
        "generate_s": generate_s,
        "total_s": time.perf_counter() - start,
        "tokens": tokens,
        "ttft_s": min(r["ttft_s"] for r in stream.results.values()),
        "aggregate_tok_s": tokens / generate_s,
        "bytes_per_rank": held,
        "device": plan.runtime.device,
    }
    run.write_json("metrics.json", metrics)
    results = [stream.results[i] for i in range(len(prompts))]
    note(closing(results, metrics, plan.to_json(), str(run.path / "results.jsonl")))
    return 0


def requests(recipe: Recipe, prompts: list[Prompt]) -> list[Request]:
    """One request per prompt, with the job's sampling options."""
    chosen = options(recipe)
    sampling = SamplingParams(
        max_new_tokens=int(chosen["max_new_tokens"]),
        temperature=float(chosen["temperature"]),
        top_k=int(chosen["top_k"]),
        top_p=float(chosen["top_p"]),
        min_p=float(chosen["min_p"]),
        repetition_penalty=float(chosen["repetition_penalty"]),
        stop=tuple(stop for stop in chosen["stop"] if isinstance(stop, str)),
        stop_ids=tuple(stop for stop in chosen["stop"] if isinstance(stop, int)),
        seed=int(recipe.runtime.seed),
        logprobs=int(chosen["logprobs"]),
    )
    return [Request(i, prompt.ids, sampling) for i, prompt in enumerate(prompts)]


def _note_short(prompts: list[Prompt], wanted: int, context: int) -> None:
    """Say which answers the context can end before `max_new_tokens`."""
    short = [i for i, prompt in enumerate(prompts) if len(prompt.ids) + wanted > context]
    if short:
        room = context - max(len(prompts[i].ids) for i in short)
        many = f"{len(short)} of {len(prompts)} prompts leave" if len(prompts) > 1 else "the prompt leaves"
        note(f"note      {many} room for {room} of {wanted} new tokens at the least (runtime.context={context})")


@dataclass
class _Stream:
    """Writes text as it comes: the first unfinished prompt live, the others when their turn comes."""

    run: run_dir.RunDirectory
    prompts: list[Prompt]
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    waiting: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    current: int = 0

    def take(self, events: list[TokenEvent | Finished]) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                self._text(event.index, event.text)
                if event.logprobs is not None:
                    self.logprobs.setdefault(event.index, []).append(asdict(event.logprobs))
            else:
                self._finish(event)
        sys.stdout.flush()

    def _text(self, index: int, text: str) -> None:
        if index == self.current:
            sys.stdout.write(text)
        else:
            self.waiting.setdefault(index, []).append(text)

    def _finish(self, event: Finished) -> None:
        self.results[event.index] = {
            "index": event.index,
            "prompt": self.prompts[event.index].text,
            "text": event.text,
            "token_ids": event.token_ids,
            "finish_reason": event.finish_reason,
            "prompt_tokens": event.prompt_tokens,
            "ttft_s": event.ttft_s,
            "tok_s": event.tok_s,
        }
        if event.index in self.logprobs:
            self.results[event.index]["logprobs"] = self.logprobs.pop(event.index)
        while self.current in self.results:
            self.run.append_line("results.jsonl", self.results[self.current])
            sys.stdout.write("\n")
            self.current += 1
            if self.current < len(self.prompts):
                sys.stdout.write("\n" + "".join(self.waiting.pop(self.current, [])))
