"""The collectives of 2 and 3 processes, against sums written out in numpy."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

SIZES = (2, 3)
BACKENDS = ("shared_memory", "gloo")
COUNTS = (1, 576, 70_000)  # the last does not fit a small slot
LONG = 3_000


def values(rank, count):
    return np.random.default_rng(100 * rank + count).standard_normal(count).astype(np.float32) * 10.0 ** (rank % 3)


def _results(group):
    import torch

    found = {}
    for count in COUNTS:
        x = torch.from_numpy(values(group.rank, count))
        for dtype in (torch.float32, torch.bfloat16):
            found["sum", count, str(dtype)] = group.all_reduce(x.to(dtype).clone()).float().numpy()
    sizes = [3, 0, 5][: group.size]
    part = torch.full((4, sizes[group.rank], 2), float(group.rank))
    found["gather"] = group.all_gather(part, sizes, dim=1).numpy()
    longs = [LONG, LONG // 2, LONG * 2][: group.size]
    found["gather long"] = group.all_gather(torch.from_numpy(values(group.rank, longs[group.rank])), longs).numpy()
    for source in range(group.size):
        x = torch.from_numpy(values(group.rank, 2 * LONG)).view(2, LONG).t()
        found["broadcast", source] = group.broadcast(x.contiguous(), source).numpy()
    found["tokens"] = group.broadcast(torch.arange(5) * (group.rank + 1), 1).numpy()
    found["all to all"] = _exchanged(group)
    found["parts"] = _of_parts(group)
    # many steps in a row: a slot overwritten too early shows as a wrong sum
    steps = [float(group.all_reduce(torch.tensor([float(group.rank + k)]))) for k in range(200)]
    found["steps"] = np.array(steps)
    return found


def _counts(size):
    """Values that each rank has for each; some none, some more than a slot holds."""
    return [[(3 * s + r) % 4 * LONG // 2 for r in range(size)] for s in range(size)]


def _exchanged(group):
    import torch

    parts = [torch.from_numpy(values(10 * group.rank + r, n)) for r, n in enumerate(_counts(group.size)[group.rank])]
    return [part.numpy() for part in group.all_to_all(parts, _counts(group.size))]


def _of_parts(group):
    """Sums within {0, 2} and {1}, twice over, as ranks that load again split again."""
    import torch

    found = []
    for _ in range(2):
        part = group.split([[0, 2], [1]] if group.size == 3 else [[0], [1]])
        total = part.all_reduce(torch.tensor([float(group.rank + 1)]))
        got = part.all_gather(torch.tensor([float(group.rank)]), [1] * part.size)
        told = part.broadcast(torch.tensor([float(group.rank)]), part.size - 1)
        found.append((part.rank, part.size, float(total), got.tolist(), float(told)))
    whole = group.split([list(range(group.size))])
    return [*found, float(whole.all_reduce(torch.tensor([float(group.rank + 1)])))]


def _work(rank, ports, out, parent_says):
    import torch

    from framework.cluster import groups

    torch.set_num_threads(1)
    for (size, backend), port in ports.items():
        if rank < size:
            group = groups.join(rank, size, "127.0.0.1", port, backend, 20.0, address="127.0.0.1", slot_bytes=4096)
            out.put(((size, backend), rank, groups.name_of(group), _results(group)))
            if (size, backend) != (3, "shared_memory"):
                groups.leave(group)
            else:
                last = group
    if rank == 1:
        parent_says.wait()
        os._exit(9)
    begin = time.monotonic()
    try:
        last.all_reduce(torch.ones(3))
    except groups.PeerLost as error:
        out.put(("lost", rank, error.rank, time.monotonic() - begin))


@pytest.fixture(scope="module")
def outcome():
    from framework.cluster import groups

    before = sorted(Path("/dev/shm").iterdir())
    context = multiprocessing.get_context("spawn")
    out, go = context.Queue(), context.Event()
    keys = [(size, backend) for backend in reversed(BACKENDS) for size in SIZES]
    stores = {key: groups.open_store("127.0.0.1", 60.0) for key in keys}
    ports = {key: store.port for key, store in stores.items()}
    ranks = [context.Process(target=_work, args=(rank, ports, out, go)) for rank in range(3)]
    for process in ranks:
        process.start()
    found = {}
    for _ in range(sum(size for size, _ in keys)):
        key, rank, name, results = out.get(timeout=100)
        found[key, rank] = name, results
    go.set()
    lost = [out.get(timeout=30) for _ in range(2)]
    for process in ranks:
        process.join(10)
    return found, lost, before


def _each(outcome, size, backend):
    results = [outcome[0][(size, backend), rank] for rank in range(size)]
    assert {name for name, _ in results} == {backend}
    return [found for _, found in results]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_sums_are_in_rank_order_and_bit_equal_on_all_ranks(outcome, size, backend):
    for count in COUNTS:
        expected = values(0, count)
        for rank in range(1, size):
            expected = expected + values(rank, count)
        for found in _each(outcome, size, backend):
            assert np.array_equal(found["sum", count, "torch.float32"], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_every_rank_gets_from_each_what_that_one_had_for_it(outcome, size, backend):
    counts = _counts(size)
    for rank, found in enumerate(_each(outcome, size, backend)):
        for source, got in enumerate(found["all to all"]):
            assert np.array_equal(got, values(10 * source + rank, counts[source][rank]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_group_are_groups(outcome, backend):
    first, second, third = (found["parts"] for found in _each(outcome, 3, backend))
    assert first == [(0, 2, 4.0, [0.0, 2.0], 2.0)] * 2 + [6.0]
    assert second == [(0, 1, 2.0, [1.0], 1.0)] * 2 + [6.0]
    assert third == [(1, 2, 4.0, [0.0, 2.0], 2.0)] * 2 + [6.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_sums_are_added_in_float32_and_rounded_once(outcome, size, backend):
    import torch

    for count in COUNTS:
        parts = [torch.from_numpy(values(rank, count)).bfloat16().double() for rank in range(size)]
        # 3 values of 8 bits within a factor of 1000: exact in double, within one fp32 rounding in fp32
        exact = sum(parts).numpy()
        for found in _each(outcome, size, backend):
            ours = found["sum", count, "torch.bfloat16"]
            assert np.all(abs(ours - exact) <= abs(exact) * 2.0**-8 * 1.01 + 1e-6)
            assert np.array_equal(ours, _each(outcome, size, backend)[0]["sum", count, "torch.bfloat16"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_uneven_and_empty_parts_are_gathered_in_rank_order(outcome, size, backend):
    sizes = [3, 0, 5][:size]
    longs = [LONG, LONG // 2, LONG * 2][:size]
    for found in _each(outcome, size, backend):
        expected = np.concatenate([np.full((4, n, 2), float(r)) for r, n in enumerate(sizes)], axis=1)
        assert np.array_equal(found["gather"], expected)
        assert np.array_equal(found["gather long"], np.concatenate([values(r, n) for r, n in enumerate(longs)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_broadcast_gives_all_the_source_ranks_values(outcome, size, backend):
    for found in _each(outcome, size, backend):
        for source in range(size):
            assert np.array_equal(found["broadcast", source], values(source, 2 * LONG).reshape(2, LONG).T)
        assert found["tokens"].tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_no_step_is_overtaken_by_the_next(outcome, size, backend):
    expected = [sum(range(size)) + size * k for k in range(200)]
    for found in _each(outcome, size, backend):
        assert found["steps"].tolist() == expected


def test_a_dead_rank_is_noticed_by_all_others_within_two_seconds(outcome):
    lost = outcome[1]
    assert {(rank, dead) for _, rank, dead, _ in lost} == {(0, 1), (2, 1)}
    assert all(seconds < 2 for *_, seconds in lost)


def test_nothing_stays_in_dev_shm(outcome):
    assert sorted(Path("/dev/shm").iterdir()) == outcome[2]


def test_a_segment_is_refused_where_the_address_means_another_file(tmp_path):
    from framework.cluster.shared_memory import Segment

    with Path(tmp_path / "other").open("wb+") as other:
        other.write(b"x" * 100)
        other.flush()
        assert Segment.attach(f"{os.getpid()} {other.fileno()} {'0' * 64}", 2) is None
    assert Segment.attach(f"{os.getpid()} 999 {'0' * 64}", 2) is None


def test_the_store_listens_on_its_own_address_only():
    from framework.cluster import groups

    store = groups.open_store("127.0.0.1", 5.0)
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert f"0100007F:{store.port:04X}" in listening
    assert f"00000000:{store.port:04X}" not in listening
