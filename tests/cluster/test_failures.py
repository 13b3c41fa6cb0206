"""Ranks that die: one message, in time, and nothing left."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from framework.cluster.failures import Kind, PeerLost, Remains, Scene, digest, kind_of
from framework.cluster.rank import RankInfo
from framework.errors import Problem, Refused

MARK = "NPU_LAUNCH_TEST_RUN"


def _marked(mark):
    """Live processes whose environment carries the mark: process id to command."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes()
        except OSError:
            continue
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "victim", "sent", "status"),
    [
        ("load", 1, signal.SIGKILL, 1),
        ("decode", 0, signal.SIGKILL, 1),
        ("decode", "raylet", signal.SIGKILL, 1),
        ("decode", None, signal.SIGINT, 130),
    ],
)
def test_the_command_ends_in_time_and_leaves_nothing(scenario, victim, sent, status, tmp_path):
    mark = uuid.uuid4().hex
    shm = sorted(Path("/dev/shm").iterdir())
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {MARK: mark}
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        environment["TMPDIR"] = folder
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.driver", scenario],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        first = process.stdout.readline()
        assert first.startswith("ready "), first + process.stderr.read()
        pids = [int(pid) for pid in first.split()[1:]]
        time.sleep(1)
        begin = time.monotonic()
        if victim is None:
            os.killpg(process.pid, sent)  # as a terminal does
        elif victim == "raylet":
            (raylet,) = (pid for pid, command in _marked(mark).items() if command.split(b"\0")[0].endswith(b"/raylet"))
            os.kill(raylet, sent)
        else:
            os.kill(pids[victim], sent)
        output, errors = process.communicate(timeout=30)
        # ranks notice a dead raylet by Ray's own check, every ten seconds, and work until then
        assert time.monotonic() - begin < (25 if victim == "raylet" else 10)
        assert process.returncode == status, errors
        assert errors == ""
        last = output.splitlines()[-1]
        assert [line for line in output.splitlines()[:-1] if line] == []
        if status == 130:
            assert last == "interrupted"
        else:
            (problem,) = json.loads(last.removeprefix("problem "))
            assert problem["code"] == "rank-lost"
            who = r"[01]" if victim == "raylet" else victim
            assert re.match(rf"rank {who} ended while (loading \(\d+ %\)|in decode)", problem["what"])
            assert "signal 9" in problem["why"]
        assert list(Path(folder).iterdir()) == []
    assert _marked(mark) == {}
    assert sorted(Path("/dev/shm").iterdir()) == shm


def _scene(lines=(), free=8 << 30, oom=False):
    infos = {r: RankInfo(r, "host", "10.0.0.1", 100 + r, "cpu", "", "", 0) for r in range(3)}
    stages = {0: "in decode", 1: "in decode", 2: "loading (71 %)"}
    return Scene(infos, stages, {2: "runs/log.rank2.txt"}, lambda info: Remains(list(lines), free, oom))


def _died(text=""):
    from ray.exceptions import ActorDiedError

    return ActorDiedError(text) if text else ActorDiedError()


def test_a_ranks_own_exception_explains_more_than_a_death_and_a_death_more_than_a_collective():
    bug, lost = ValueError("x"), RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")
    assert [kind_of(e) for e in (bug, _died(), lost, PeerLost(1))] == [
        Kind.APPLICATION,
        Kind.DEATH,
        Kind.COLLECTIVE,
        Kind.COLLECTIVE,
    ]
    assert digest({0: lost, 1: _died(), 2: bug}, _scene()) is bug
    found = digest({0: PeerLost(2), 1: lost, 2: _died()}, _scene())
    assert found.problems[0].what == "rank 2 ended while loading (71 %)"
    assert found.problems[0].where == "node 10.0.0.1 (host), cpu, pid 102, log runs/log.rank2.txt"


def test_a_user_error_of_a_rank_is_kept_as_it_is():
    refused = Refused(Problem("tensor-missing", "a scale is missing"))
    assert digest({1: refused, 0: PeerLost(1)}, _scene()) is refused


def test_how_a_rank_died_is_said_with_its_last_lines():
    crash = ["something before", "Fatal Python error: Segmentation fault", "", ":actor_name:Rank", "Thread 1"]
    why = digest({1: _died()}, _scene(crash)).problems[0].why
    assert why.splitlines() == [
        "crashed (Segmentation fault); its host has 8.0 GiB memory left",
        "  | something before",
        "  | Fatal Python error: Segmentation fault",
        "  | Thread 1",
    ]
    assert "signal 9" in digest({1: _died()}, _scene()).problems[0].why


def test_a_death_by_lack_of_memory_is_said_with_what_helps():
    problem = digest({1: _died()}, _scene(oom=True, free=600 << 20)).problems[0]
    assert problem.why == "killed by signal 9: the host ran out of memory; its host has 0.6 GiB memory left"
    assert "runtime.max_batch" in problem.fix


def test_a_collective_that_gave_up_names_who_was_late_and_what_each_did():
    problem = digest({0: PeerLost(2, "no answer for 600 s")}, _scene()).problems[0]
    assert problem.code == "collective-timeout"
    assert problem.what == "rank 0 gave up waiting for rank 2"
    assert "rank 2 loading (71 %)" in problem.why
