"""The application on replicas without a model: a test says what they answer, and when they die."""

import asyncio
import queue
from contextlib import asynccontextmanager

from aiohttp.test_utils import TestClient, TestServer

from framework.checkpoint.open import open_index
from framework.engine.request import Finished, TokenEvent
from framework.serving.app import make_app
from framework.serving.metrics import Metrics
from framework.serving.prompts import Model
from framework.serving.replicas import Limits, Pool, Replica
from framework.text.tokenizer import load_tokenizer
from tests.serving.running import TINY

ASKED = {"model": "stub", "prompt": "Hello", "max_tokens": 3, "temperature": 0}
TOKENIZER = load_tokenizer(open_index(TINY))


class StubSession:
    """A session whose stream yields what `put` gave it; `answers`: every request gets all its tokens at once."""

    def __init__(self, *, answers=True):
        self.answers, self.loads, self.broken = answers, 0, None
        self.requests, self.cancelled = [], []
        self._items = queue.SimpleQueue()

    def load(self):
        self.loads += 1
        if self.broken is not None:
            raise self.broken

    def put(self, *events):
        self._items.put(list(events))

    def die(self, error):
        self._items.put(error)

    def stream(self, method, *args):
        assert (method, args) == ("serve", ())
        while (item := self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def tell(self, method, *args):
        if method == "end":
            self._items.put(None)
            return
        (orders,) = args
        self.requests += orders.requests
        self.cancelled += orders.cancelled
        if self.answers:
            for request in orders.requests:
                self.put(*answer(request))

    def alive(self, timeout_s):
        return True


def token(request):
    return TokenEvent(request.index, 65, "A")


def answer(request):
    count = request.sampling.max_new_tokens
    end = Finished(request.index, "length", len(request.prompt_ids), 0.1, 1.0, "A" * count, [65] * count)
    return [*[token(request)] * count, end]


@asynccontextmanager
async def application(*sessions, keys=(), max_queue=1):
    """A client of the application on these sessions, each with room for two answers and a queue; and the pool."""
    metrics, limits = Metrics(), Limits(2, max_queue, 8)
    pool = Pool([Replica(i, s, s.load, limits, metrics) for i, s in enumerate(sessions)], limits, metrics)
    for replica in pool.replicas:
        replica.start()
    app = make_app(Model("stub", TOKENIZER, 256, 1 << 17), pool, metrics, keys=keys, max_body_bytes=1 << 20)
    async with TestClient(TestServer(app, handler_cancellation=True)) as client:
        try:
            await until(lambda: all(replica.ready for replica in pool.replicas))
            yield client, pool
        finally:
            for replica in pool.replicas:
                replica.close(5)


async def until(condition, seconds=5):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
