"""Which pages of the cache are free. Pure Python: every rank comes to the same answers."""

from __future__ import annotations


class PageAllocator:
    """Deals out pages, consecutive ones where it can: attention reads those as one slice."""

    def __init__(self, pages: int) -> None:
        self._free = set(range(pages))
        self._pages = pages

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Return `count` pages, consecutive ones if there is such a run; None if too few are free."""
        if count > len(self._free):
            return None
        start = self._run(count)
        taken = list(range(start, start + count)) if start is not None else sorted(self._free)[:count]
        self._free.difference_update(taken)
        return taken

    def extend(self, held: list[int]) -> bool:
        """Append one page to `held`, the next one if it is free; False if no page is free."""
        if not self._free:
            return False
        page = held[-1] + 1 if held and held[-1] + 1 in self._free else min(self._free)
        self._free.remove(page)
        held.append(page)
        return True

    def give_back(self, held: list[int]) -> None:
        """Free all pages of `held` and empty it."""
        self._free.update(held)
        held.clear()

    def _run(self, count: int) -> int | None:
        length = 0
        for page in range(self._pages):
            length = length + 1 if page in self._free else 0
            if length == count:
                return page - count + 1
        return None
