"""Sessions: in this process, and over the shared warm ranks."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from framework.cluster.processes import descendants
from framework.cluster.session import open_session
from framework.errors import InputError, Refused
from tests.cluster import stub


def test_one_rank_on_the_cpu_runs_in_this_process_and_imports_no_ray():
    program = """
import os, sys
from framework.cluster.session import open_session
from tests.cluster import stub
heard = []
with open_session("local", stub.plan(1), loader=stub.LOADER) as session:
    session.load(stub.plan(1), "a tokenizer", lambda done, total: heard.append((done, total)))
    assert session.call("rank_and_tokenizer") == [(0, "a tokenizer")]
    assert list(session.stream("generate", [1, 2])) == [[1.0], [2.0]]
    assert session.describe()[0].pid == os.getpid()
assert heard == [(50, 100), (100, 100)]
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_an_unknown_cluster_key_names_the_nearest_one():
    with (
        pytest.raises(InputError, match="strateg") as caught,
        open_session({"strategi": "PACK"}, stub.plan(2)),
    ):
        pass
    assert "cluster.strategy" in caught.value.problems[0].fix


@pytest.mark.ray
def test_ranks_load_stream_and_answer_together(warm_session):
    heard = []
    plan = stub.plan(2, load_steps=4, load_step_s=0.3)
    warm_session.load(plan, "a tokenizer", lambda *both: heard.append(both), loader=stub.LOADER)
    assert heard[-1] == (200, 200)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert len(heard) > 2
    assert warm_session.carrier() == "shared_memory"
    assert warm_session.call("rank_and_tokenizer") == [(0, "a tokenizer"), (1, "a tokenizer")]
    assert warm_session.call("threads") == [1, 1]
    assert list(warm_session.stream("generate", list(range(100)))) == [[2.0 * i] for i in range(100)]


@pytest.mark.ray
def test_warm_ranks_take_plans_of_other_sizes(warm_session):
    for size, total in ((3, 6.0), (1, 1.0), (2, 3.0)):
        warm_session.load(stub.plan(size), loader=stub.LOADER)
        assert warm_session.call("sum_of_ranks", 2) == [[total, total]] * size
    pids = [info.pid for info in warm_session.describe()]
    warm_session.load(stub.plan(3), loader=stub.LOADER)
    assert [info.pid for info in warm_session.describe()][:2] == pids


@pytest.mark.ray
def test_our_own_ray_listens_on_the_loopback_interface_only(warm_session):
    warm_session.load(stub.plan(2), loader=stub.LOADER)
    infos = warm_session.describe()
    assert [(info.rank, info.address) for info in infos] == [(0, "127.0.0.1"), (1, "127.0.0.1")]
    ours = {process.pid for process in descendants(os.getpid())}
    assert {info.pid for info in infos} <= ours
    sockets = {link for pid in ours for link in _links(pid)}
    seen = 0
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "0000000000000000FFFF00000100007F")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, _, state, *rest = line.split()[1:]
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                assert local.split(":")[0] == loopback, line
                seen += 1
    assert seen > 3


def _links(pid):
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            yield str(entry.readlink())


@pytest.mark.ray
def test_what_a_rank_refuses_reaches_the_user_as_it_is_and_ranks_can_start_again(warm_session):
    with pytest.raises(Refused) as caught:
        warm_session.load(stub.plan(2, refuse_rank=1), loader=stub.LOADER)
    assert [problem.code for problem in caught.value.problems] == ["stub-refused"]
    warm_session.load(stub.plan(2), loader=stub.LOADER)
    with pytest.raises(ZeroDivisionError) as bug:
        list(warm_session.stream("generate", list(range(50)), 0.001, 1, 20))
    assert "raised on rank 1 while in decode" in bug.value.__notes__[0]
    assert "stub.py" in bug.value.__notes__[0]


@pytest.mark.ray
def test_a_rank_that_exits_is_named_although_another_fails_by_it(warm_session, tmp_path):
    warm_session.load(stub.plan(2), loader=stub.LOADER)
    with pytest.raises(Refused) as caught:
        warm_session.call("end", 1)
    problem = caught.value.problems[0]
    assert problem.code == "rank-lost"
    assert problem.what == "rank 1 ended while running end"
    assert "GiB memory left" in problem.why
