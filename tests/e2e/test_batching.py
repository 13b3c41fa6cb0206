"""Requests in one running batch give, token for token, what each gives alone."""

from pathlib import Path

import pytest

from framework.engine.request import Finished, Request, SamplingParams
from framework.loading.load import load
from tests.plans import plan_for
from tests.threads import on_ranks

MODEL = Path(__file__).parents[1] / "golden" / "tiny-qwen3" / "gguf-q4_k_m" / "model.gguf"


def prompts():
    lengths = [3, 130, 17, 64, 256, 1, 40, 90, 5, 200, 128, 33, 127, 129, 70, 11]
    return [[(37 * i + 11 * j) % 500 for j in range(length)] for i, length in enumerate(lengths)]


def run(plan, batches):
    def work(group):
        model = load(plan, group, lambda done, total: None)
        results = []
        for requests in batches:
            events = [event for step in model.generate(requests) for event in step]
            results.append({e.index: e.token_ids for e in events if isinstance(e, Finished)})
        return results

    return on_ranks(plan.tp_size, work)[0]


@pytest.mark.parametrize("sampling", [SamplingParams(max_new_tokens=24, ignore_eos=True),
                                      SamplingParams(24, temperature=0.8, top_p=0.9, seed=7, ignore_eos=True)],
                         ids=["greedy", "sampled"])  # fmt: skip
@pytest.mark.parametrize("tp_size", [1, 2])
def test_sixteen_prompts_of_mixed_lengths_in_one_batch_equal_each_alone(sampling, tp_size):
    # a batch of 16 over a cache that cannot hold all of them at once: some wait, join, and are preempted
    plan = plan_for(MODEL, tp_size=tp_size, dtype="float32", context=512, max_batch=4)
    requests = [Request(i, ids, sampling) for i, ids in enumerate(prompts())]
    together, *alone = run(plan, [requests, *([request] for request in requests)])
    assert together == {index: ids for result in alone for index, ids in result.items()}


def test_the_same_seed_gives_the_same_text_at_every_size():
    sampling = SamplingParams(max_new_tokens=32, temperature=1.0, top_k=40, seed=3, ignore_eos=True)
    requests = [Request(i, ids, sampling) for i, ids in enumerate(prompts()[:4])]
    results = [run(plan_for(MODEL, tp_size=n, dtype="float32", context=512), [requests])[0] for n in (1, 2, 4)]
    assert results[0] == results[1] == results[2]
