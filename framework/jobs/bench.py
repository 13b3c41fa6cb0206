"""job=bench: time to first token, prefill and decode speed, batches, load time, bytes per rank."""

from __future__ import annotations

import statistics
import time
from typing import Any

from framework.cluster.session import Session
from framework.engine.request import Finished, Request, SamplingParams
from framework.errors import InputError, Problem
from framework.jobs import run_dir
from framework.jobs.common import emit, emit_json, options, resolve_device
from framework.jobs.ranks import started
from framework.jobs.verify import plan_of
from framework.planning.plan import Plan
from framework.recipe.schema import Recipe
from framework.report.bench import bench_markdown, bench_text
from framework.report.progress import waiting

REPEATS = 3  # medians of this many runs at batch 1


def run(recipe: Recipe) -> int:
    """Measure and report. Figures are of this machine in this minute: compare only within one run."""
    chosen = options(recipe)
    plan = plan_of(recipe)
    prompt_tokens, new_tokens = int(chosen["prompt_tokens"]), int(chosen["new_tokens"])
    if prompt_tokens + new_tokens > plan.runtime.context:
        raise InputError(
            Problem(
                "prompt-too-long",
                f"{prompt_tokens} + {new_tokens} tokens do not fit the context of {plan.runtime.context}",
                "job.prompt_tokens, job.new_tokens",
                fix=f"job.prompt_tokens={max(1, plan.runtime.context - new_tokens)}",
            )
        )
    start = time.perf_counter()
    run = run_dir.create(recipe, plan)
    with started(recipe, plan, log_dir=run.path) as (session, load_s), waiting("measuring"):
        _generate(session, plan, 1, prompt_tokens, 4)
        alone = [_generate(session, plan, 1, prompt_tokens, new_tokens)[1][0] for _ in range(REPEATS)]
        aggregate = {}
        for size in chosen["batch_sizes"]:
            seconds, finished = _generate(session, plan, int(size), prompt_tokens, new_tokens)
            aggregate[str(size)] = sum(len(f.token_ids) for f in finished) / seconds
        held = session.call("bytes_held")
    ttft_s = statistics.median(f.ttft_s for f in alone)
    document: dict[str, Any] = {
        "ttft_s": ttft_s,
        "prefill_tok_s": prompt_tokens / ttft_s,
        "decode_tok_s": statistics.median(f.tok_s for f in alone),
        "aggregate": aggregate,
        "load_s": load_s,
        "bytes_per_rank": held,
    }
    run.write_json("bench.json", document)
    run.write_json("metrics.json", document | {"total_s": time.perf_counter() - start})
    facts = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "device": resolve_device(recipe),
        "path": str(run.path / "bench.json"),
    }
    match chosen["format"]:
        case "json":
            emit_json(document)
        case "markdown":
            emit(bench_markdown(document, facts))
        case _:
            emit(bench_text(document, plan.to_json(), facts))
    return 0


def _generate(
    session: Session, plan: Plan, batch: int, prompt_tokens: int, new_tokens: int
) -> tuple[float, list[Finished]]:
    """Run `batch` equal requests at once; returns seconds from submission to the last token, and the results."""
    vocab = plan.spec.vocab
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    requests = [
        Request(i, [(104729 * (i + 1) + 7919 * t) % vocab for t in range(prompt_tokens)], sampling)
        for i in range(batch)
    ]
    begin = time.perf_counter()
    events = [event for step in session.stream("generate", requests) for event in step]
    return time.perf_counter() - begin, [event for event in events if isinstance(event, Finished)]
