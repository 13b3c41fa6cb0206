"""Memory for weights: parts of maps that do not meet, whatever their sizes, threads and order of death."""

import gc
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from framework.ops.cpu.memory import new_bytes

MAP = 16 << 20


def test_parts_are_zero_aligned_and_do_not_meet():
    def fill(seed):
        parts = []
        for i in range(40):
            size = 1 + (seed * 7919 + i * 104729) % (3 << 20)
            part = new_bytes(size)
            assert part.data_ptr() % 64 == 0 and not part.any()
            parts.append(part.fill_(1 + (seed * 40 + i) % 255))
        return parts

    with ThreadPoolExecutor(4) as pool:
        filled = list(pool.map(fill, range(4)))
    for seed, parts in enumerate(filled):
        for i, part in enumerate(parts):
            assert bool((part == 1 + (seed * 40 + i) % 255).all())


def test_what_is_larger_than_a_map_has_its_own():
    large, small = new_bytes(3, MAP), new_bytes(5)
    assert large.shape == (3, MAP) and large.is_contiguous()
    small.fill_(9)
    assert not large.any()


def test_a_part_made_outside_of_inference_can_be_written_there_whoever_mapped_its_memory():
    with torch.inference_mode():
        new_bytes(64).fill_(1)
    outside = new_bytes(64)
    assert not outside.is_inference()
    outside.fill_(2)


def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_little_is_left_unused_whatever_the_sizes():
    before, sizes = resident(), [9 << 20, 3 << 19, 12 << 20, 5 << 18] * 8
    parts = [new_bytes(size) for size in sizes]
    assert len(parts) == len(sizes) and resident() - before < 1.13 * sum(sizes) + MAP


def test_memory_goes_back_with_its_tensors():
    before = resident()
    parts = [new_bytes(1 << 20) for _ in range(256)]
    assert resident() - before > 200 << 20
    del parts
    assert resident() - before < 2 * MAP
