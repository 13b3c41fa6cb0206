"""Requests that join and leave a running engine: the same answers, on all ranks in step, and no page lost."""

import threading
import time

import torch

from framework.engine.inbox import Inbox
from framework.engine.loop import Engine
from framework.engine.request import Failed, Finished, Load, Orders, Request, SamplingParams, TokenEvent
from framework.layers.group import Alone
from tests.engine.models import AttentionModel
from tests.engine.test_loop import prompt
from tests.threads import on_ranks

PAGES = 24


def make(model, group=None):
    options = {"max_batch": 3, "chunk_tokens": 64}
    return Engine(model, model.cache(PAGES), None, group or Alone(), **options)


def request(index, length, new=12, **sampling):
    return Request(index, prompt(length, index), SamplingParams(max_new_tokens=new, **sampling))


class Driver:
    """Sends orders once so many tokens have come, and closes the inbox after the last answer."""

    def __init__(self, first, later, answers):  # later: {tokens: orders}
        self.inbox, self.later, self.answers = Inbox(), sorted(later.items()), answers
        self.events = []
        self.inbox.put(first)

    def take(self, events):
        self.events += events
        tokens = sum(isinstance(e, TokenEvent) for e in self.events)
        while self.later and self.later[0][0] <= tokens:
            self.inbox.put(self.later.pop(0)[1])
        if sum(isinstance(e, Finished) for e in self.events) == self.answers:
            self.inbox.close()

    def tokens(self):
        return {e.index: e.token_ids for e in self.events if isinstance(e, Finished)}


def test_requests_that_join_one_by_one_say_what_each_says_alone_on_every_rank():
    later = {3: Orders((request(1, 150), request(2, 5))), 9: Orders((request(3, 130),)), 20: Orders((request(4, 1),))}

    def work(group):
        model = AttentionModel()
        driver = Driver(Orders((request(0, 17),)), later, answers=5)
        for events in make(model, group).serve(driver.inbox):
            driver.take(events)
        return driver.tokens(), [(b.token_ids.tolist(), b.slots.tolist()) for b in model.batches]

    (tokens, batches), *others = on_ranks(3, work)
    dense = AttentionModel()
    assert tokens == {i: dense.greedy(prompt(n, i), 12) for i, n in enumerate([17, 150, 5, 130, 1])}
    assert others == [({}, batches), ({}, batches)]


def test_a_cancelled_request_leaves_at_the_next_step_and_frees_its_pages():
    # three run and one waits; the first two and the waiting one are given up
    first = Orders((*(request(i, 200, 400) for i in range(3)), request(3, 9)))
    later = {12: Orders(cancelled=(0, 1, 3, 99)), 30: Orders((request(4, 9),)), 33: Orders(cancelled=(2,))}
    driver = Driver(first, later, answers=1)
    model = AttentionModel()
    for events in make(model).serve(driver.inbox):
        driver.take(events)
    loads = [e for e in driver.events if isinstance(e, Load)]
    assert max(load.pages_used for load in loads) == 3 * 5
    assert loads[-1] == Load(0, 0, 0)
    assert driver.tokens() == {4: model.greedy(prompt(9, 4), 12)}


def test_an_idle_engine_waits_without_computing_and_begins_as_soon_as_something_comes():
    inbox, model, begun = Inbox(), AttentionModel(), []

    def work():
        for events in make(model).serve(inbox):
            begun.extend((time.monotonic(), e) for e in events if isinstance(e, TokenEvent))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    before = time.thread_time(), len(model.batches)
    assert before[1] == 0
    asked = time.monotonic()
    inbox.put(Orders((request(0, 5, 3),)))
    while len(begun) < 3:
        time.sleep(0.001)
    inbox.close()
    thread.join(10)
    assert not thread.is_alive()
    assert begun[0][0] - asked < 0.2


def test_a_request_of_which_the_model_makes_no_numbers_fails_alone():
    class Overflowing(AttentionModel):
        def __call__(self, batch, cache):
            logits = super().__call__(batch, cache)
            firsts = batch.token_ids[torch.tensor([0, *batch.query_lengths]).cumsum(0)[:-1]]
            logits[firsts == 96] = float("inf")
            return logits

    model = Overflowing()
    bad = Request(0, [96, 1], SamplingParams(max_new_tokens=5))
    driver = Driver(Orders((bad, request(1, 7))), {}, answers=1)
    for events in make(model).serve(driver.inbox):
        driver.take(events)
    (failed,) = [e for e in driver.events if isinstance(e, Failed)]
    assert (failed.index, failed.problem.code) == (0, "not-finite")
    assert list(driver.tokens()) == [1]
    assert driver.events[-1] == Load(0, 0, 0)


def test_the_random_numbers_of_a_request_can_be_those_of_another_index():
    params = {"temperature": 1.5, "seed": 7}
    given = [Request(0, prompt(9), SamplingParams(max_new_tokens=12, **params)),
             Request(5, prompt(9), SamplingParams(max_new_tokens=12, **params), draw=0),
             Request(6, prompt(9), SamplingParams(max_new_tokens=12, **params))]  # fmt: skip
    events = [e for step in make(AttentionModel()).generate(given) for e in step]
    tokens = {e.index: e.token_ids for e in events if isinstance(e, Finished)}
    assert tokens[0] == tokens[5] != tokens[6]
