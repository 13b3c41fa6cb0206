"""Where requests wait to join a running engine: filled by any thread, emptied by the engine's between steps."""

from __future__ import annotations

import threading
from collections import deque

from framework.engine.request import Orders


class Inbox:
    """Orders in the order they came. Pure Python."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._orders: deque[Orders] = deque()
        self._closed = False

    def put(self, orders: Orders) -> None:
        """Add orders."""
        with self._changed:
            self._orders.append(orders)
            self._changed.notify()

    def close(self) -> None:
        """End the engine's run at its next step, whatever is unfinished."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, wait_s: float) -> tuple[list[Orders], bool]:
        """Return all orders that came and whether to end, as soon as there is either, at the latest after `wait_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._orders or self._closed, wait_s)
            taken = list(self._orders)
            self._orders.clear()
            return taken, self._closed
