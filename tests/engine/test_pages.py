import random

from framework.engine.pages import PageAllocator


def test_pages_are_dealt_once_and_come_back():
    allocator, made, held = PageAllocator(20), random.Random(3), []
    for _ in range(500):
        if held and made.random() < 0.45:
            allocator.give_back(held.pop(made.randrange(len(held))))
        elif (pages := allocator.take(made.randint(1, 6))) is not None:
            held.append(pages)
        if held and made.random() < 0.3:
            allocator.extend(made.choice(held))
        dealt = [page for pages in held for page in pages]
        assert len(dealt) == len(set(dealt))
        assert set(dealt) <= set(range(20))
        assert allocator.free == 20 - len(dealt)


def test_pages_are_consecutive_where_a_run_is_free():
    allocator = PageAllocator(8)
    first, second = allocator.take(2), allocator.take(3)
    assert (first, second) == ([0, 1], [2, 3, 4])
    allocator.give_back(first)
    assert allocator.take(3) == [5, 6, 7]
    assert allocator.extend(second)
    assert second == [2, 3, 4, 0]


def test_nothing_is_dealt_where_too_little_is_free():
    allocator = PageAllocator(3)
    assert allocator.take(4) is None
    assert allocator.free == 3
    pages = allocator.take(3)
    assert not allocator.extend(pages)
    assert pages == [0, 1, 2]
