"""Who gets how many tokens of a step; no model, no tensors."""

from framework.engine.request import Request, SamplingParams
from framework.engine.scheduler import Scheduler


def scheduler(prompts, *, pages=100, max_batch=8, chunk_tokens=100, new=50, context=None):
    given = [Request(i, [1] * n, SamplingParams(max_new_tokens=new)) for i, n in enumerate(prompts)]
    return Scheduler(given, pages, max_batch=max_batch, chunk_tokens=chunk_tokens, context=context)


def shares(chunks):
    return [(chunk.sequence.request.index, chunk.tokens, chunk.ends) for chunk in chunks]


def step(made, finish=()):
    """Run one step; requests in `finish` end with it."""
    chunks = made.next()
    ending = [c.sequence.request.index for c in chunks if c.ends]
    made.advance(chunks, [7] * len(ending), [index in finish for index in ending])
    return shares(chunks)


def test_a_long_prompt_is_cut_and_does_not_hold_up_who_decodes():
    made = scheduler([10, 250])
    assert step(made) == [(0, 10, True), (1, 90, False)]
    assert step(made) == [(0, 1, True), (1, 99, False)]
    assert step(made) == [(0, 1, True), (1, 61, True)]
    assert step(made) == [(0, 1, True), (1, 1, True)]


def test_a_waiting_request_joins_when_one_leaves():
    made = scheduler([5, 6, 7], max_batch=2)
    assert step(made) == [(0, 5, True), (1, 6, True)]
    assert step(made, finish={0}) == [(0, 1, True), (1, 1, True)]
    assert step(made) == [(1, 1, True), (2, 7, True)]


def test_requests_start_in_the_order_they_came_even_if_a_later_one_would_fit():
    # 3 pages: the first takes 2, the second needs 2, the third would fit into the one left
    made = scheduler([200, 200, 5], pages=3, chunk_tokens=1000)
    assert step(made) == [(0, 200, True)]
    assert step(made, finish={0}) == [(0, 1, True)]
    assert step(made) == [(1, 200, True), (2, 5, True)]


def test_prompts_go_on_even_where_decoding_fills_the_step():
    made = scheduler([1] * 8 + [40], max_batch=9, chunk_tokens=8)
    step(made)
    assert step(made)[-1] == (8, 2, False)


def test_the_youngest_gives_its_pages_to_the_older_and_starts_again():
    # of 6 pages request 0 holds 2; 5 for a whole run of 1 or 2 are not free, so both grow page by page
    sampling = [SamplingParams(max_new_tokens=n) for n in (156, 500, 500)]
    given = [Request(i, [1] * 100, params) for i, params in enumerate(sampling)]
    made = Scheduler(given, 6, max_batch=8, chunk_tokens=1000)
    assert step(made) == [(0, 100, True), (1, 100, True), (2, 100, True)]
    for _ in range(156):
        assert step(made) == [(0, 1, True), (1, 1, True), (2, 1, True)]
    _, old, young = made.running
    assert [len(s.pages) for s in made.running] == [2, 2, 2]
    assert len(old.ids) == 257
    step(made, finish={0})
    assert [len(s.pages) for s in (old, young)] == [3, 0]
    assert list(made.waiting) == [young]
    while old in made.running:
        step(made, finish={1} if len(old.ids) + 1 == old.most else ())
    # it came back when request 0 left and lost its pages once more at 384 tokens: all of them again
    assert step(made) == [(2, 384, True)]


def test_a_sequence_may_fill_the_whole_cache_but_no_more():
    made = scheduler([100], pages=1, new=1000)
    total = 0
    while made.unfinished:
        (sequence,) = made.running or made.waiting
        total += 1
        step(made, finish={0} if len(sequence.ids) + 1 >= sequence.most else ())
    assert total == 28  # 128 tokens in all


def test_two_schedulers_with_the_same_requests_and_tokens_make_the_same_steps():
    one, other = (scheduler([30, 300, 5, 129, 64], pages=5, max_batch=3) for _ in range(2))
    for i in range(60):
        finish = {i // 12}
        a, b = one.next(), other.next()
        assert [(c.sequence.request.index, c.tokens, c.sequence.pages) for c in a] == [
            (c.sequence.request.index, c.tokens, c.sequence.pages) for c in b
        ]
        for made, chunks in ((one, a), (other, b)):
            ending = [c.sequence.request.index for c in chunks if c.ends]
            made.advance(chunks, [7] * len(ending), [index in finish for index in ending])
        if not one.unfinished:
            break
