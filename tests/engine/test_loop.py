import random

import pytest
import torch

from framework.engine.loop import Engine
from framework.engine.request import Finished, Request, SamplingParams, TokenEvent
from framework.errors import InputError
from framework.layers.group import Alone
from tests.engine.models import VOCAB, AttentionModel
from tests.threads import on_ranks

LENGTHS = [1, 2, 3, 5, 17, 31, 64, 100, 126, 127, 128, 129, 150, 200, 255, 256]


def prompt(length, seed=0):
    return random.Random(1000 * seed + length).choices(range(VOCAB), k=length)


def engine(model, pages=64, *, max_batch=16, chunk_tokens=512, group=None, **options):
    return Engine(
        model,
        model.cache(pages),
        None,
        group or Alone(),
        max_batch=max_batch,
        chunk_tokens=chunk_tokens,
        **options,
    )


def answers(model, requests, **options):
    """Token ids by request index."""
    events = [event for step in engine(model, **options).generate(requests) for event in step]
    return {event.index: event.token_ids for event in events if isinstance(event, Finished)}


def requests(lengths, **sampling):
    sampling.setdefault("max_new_tokens", 6)
    return [Request(i, prompt(length, i), SamplingParams(**sampling)) for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def model():
    return AttentionModel()


@pytest.fixture(scope="module")
def expected(model):
    return {i: model.greedy(prompt(length, i), 6) for i, length in enumerate(LENGTHS)}


def test_sixteen_prompts_of_mixed_lengths_in_one_batch_say_what_dense_attention_says(model, expected):
    assert answers(model, requests(LENGTHS)) == expected


def test_prompts_cut_into_chunks_say_the_same(model, expected):
    assert answers(model, requests(LENGTHS), chunk_tokens=50) == expected


def test_sequences_join_and_leave_a_small_running_batch_and_say_the_same(model, expected):
    model.batches.clear()
    assert answers(model, requests(LENGTHS), max_batch=3, chunk_tokens=70) == expected
    assert max(len(batch.query_lengths) for batch in model.batches) == 3
    mixed = [b for b in model.batches if 1 in b.query_lengths and max(b.query_lengths) > 1]
    assert mixed, "no step held a decoding sequence beside a prompt"


def test_sequences_that_lose_their_pages_are_computed_again_and_say_the_same(model):
    given = [Request(i, prompt(120, i), SamplingParams(max_new_tokens=20)) for i in range(4)]
    # 4 prompts fill a page each; all need a second one at the same time, and there are 5
    model.batches.clear()
    assert answers(model, given, pages=5) == {i: model.greedy(prompt(120, i), 20) for i in range(4)}
    prefills = sum(length for batch in model.batches for length in batch.query_lengths if length > 1)
    assert prefills > 4 * 120, "nobody was computed again"


def test_scores_of_chunks_and_of_single_tokens_are_those_of_dense_attention(model):
    ids = prompt(300)
    dense = model.dense(ids)
    for logits in (
        engine(model, chunk_tokens=512).score(ids),
        engine(model, chunk_tokens=77).score(ids),
        engine(model).score_stepwise(ids),
    ):
        assert logits.shape == (300, VOCAB)
        torch.testing.assert_close(logits, dense, rtol=1e-5, atol=1e-5)


def test_the_same_seed_draws_the_same_in_every_batch(model):
    sampling = {"temperature": 1.5, "top_p": 0.95, "seed": 7, "max_new_tokens": 12, "repetition_penalty": 1.2}
    given = requests(LENGTHS[:8], **sampling)
    together = answers(model, given)
    alone = {}
    for request in given:
        alone |= answers(model, [request])
    assert together == alone
    assert together == answers(model, given, max_batch=2, chunk_tokens=9)
    assert together != answers(model, requests(LENGTHS[:8], **{**sampling, "seed": 8}))


class Deaf:
    """The model of a rank that must not decide anything: right cache, meaningless logits."""

    def __init__(self, model):
        self.model = model
        self.cache = model.cache

    def __call__(self, batch, cache):
        return torch.full_like(self.model(batch, cache), float("nan"))


def test_all_ranks_run_the_same_batches_and_only_the_first_one_samples():
    def work(group):
        model = AttentionModel()
        shown = model if group.rank == 0 else Deaf(model)
        running = engine(shown, pages=6, max_batch=3, chunk_tokens=64, group=group)
        events = [event for step in running.generate(requests(LENGTHS[:9])) for event in step]
        inputs = [(batch.token_ids.tolist(), batch.slots.tolist()) for batch in model.batches]
        return events, inputs

    (events, inputs), *others = on_ranks(3, work)
    assert sum(isinstance(event, Finished) for event in events) == 9
    assert others == [([], inputs), ([], inputs)]


def test_leaving_the_loop_early_gives_the_pages_back(model, expected):
    running = engine(model, pages=4)
    for _ in range(3):
        next(running.generate([Request(0, prompt(200), SamplingParams(max_new_tokens=100))]))
    events = [e for step in running.generate(requests(LENGTHS[:5])) for e in step]
    assert {e.index: e.token_ids for e in events if isinstance(e, Finished)} == {i: expected[i] for i in range(5)}


def test_the_context_ends_an_answer_with_reason_length(model):
    running = engine(model, context=40)
    steps = list(running.generate([Request(3, prompt(30), SamplingParams(max_new_tokens=100))]))
    (end,) = [e for step in steps for e in step if isinstance(e, Finished)]
    assert (end.finish_reason, end.prompt_tokens, len(end.token_ids)) == ("length", 30, 10)
    assert end.token_ids == model.greedy(prompt(30), 10)


def test_stop_ids_end_an_answer_and_eos_can_be_ignored(model, expected):
    end_id = expected[4][2]
    at = expected[4].index(end_id) + 1
    given = [Request(0, prompt(17, 4), SamplingParams(max_new_tokens=6))]
    assert answers(model, given, eos_ids=[end_id]) == {0: expected[4][:at]}
    given = [Request(0, prompt(17, 4), SamplingParams(max_new_tokens=6, ignore_eos=True))]
    assert answers(model, given, eos_ids=[end_id]) == {0: expected[4]}
    given = [Request(0, prompt(17, 4), SamplingParams(max_new_tokens=6, stop_ids=(end_id,)))]
    assert answers(model, given) == {0: expected[4][:at]}


def test_logprobs_are_those_of_the_dense_logits(model):
    given = [Request(0, prompt(9), SamplingParams(max_new_tokens=1, logprobs=3, temperature=0.7, top_k=5))]
    (event, _) = [e for step in engine(model).generate(given) for e in step]
    logs = model.dense(prompt(9))[-1].double().log_softmax(-1)
    assert isinstance(event, TokenEvent)
    assert event.logprobs.chosen == pytest.approx(float(logs[event.token_id]), abs=1e-5)
    best = logs.sort(descending=True)
    assert [token for token, _ in event.logprobs.top] == best.indices[:3].tolist()
    assert [value for _, value in event.logprobs.top] == pytest.approx(best.values[:3].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (Request(0, [], SamplingParams()), "bad-request"),
        (Request(0, [1], SamplingParams(max_new_tokens=0)), "bad-request"),
        (Request(0, [1] * 128, SamplingParams()), "prompt-too-long"),
    ],
)
def test_impossible_requests_are_refused_before_anything_runs(model, given, code):
    with pytest.raises(InputError) as error:
        list(engine(model, pages=1).generate([given, given]))
    assert [problem.code for problem in error.value.problems] == [code, code]
