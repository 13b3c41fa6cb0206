"""Clusters that are there already, of one or several nodes."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from framework.cluster import placement
from framework.cluster.options import ClusterOptions
from framework.cluster.session import open_session
from framework.errors import InputError, Refused
from tests.cluster import stub

ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable, str(ROOT / "launch.py"), "recipe=llm/local", "runtime.dtype=float32", "runtime.threads=1",
    f"model.path={ROOT / 'tests' / 'golden' / 'tiny-qwen3' / 'gguf-q4_k_m' / 'model.gguf'}", "job.chat=false",
    "job.prompts=['def f(x):', 'The quick brown fox']", "job.max_new_tokens=12",
]  # fmt: skip
TWO_NODES = """
import json, subprocess, sys
from dataclasses import asdict
from ray.cluster_utils import Cluster
from framework.cluster.session import open_session
from framework.errors import UserError
from tests.cluster import stub

node = {"num_cpus": 1, "object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
cluster.add_node(**node)
options = {"name": "attach", "address": cluster.address, "cpus_per_rank": 1.0}
found = {}
try:
    with open_session(options | {"strategy": "STRICT_PACK", "placement_timeout_s": 2}, stub.plan(2)):
        pass
except UserError as error:
    found["refused"] = asdict(error.problems[0])
for backend in ("gloo", "auto"):
    with open_session(options | {"backend": backend}, stub.plan(2), loader=stub.LOADER) as session:
        session.load(stub.plan(2))
        found[backend] = [session.carrier(), list(session.stream("generate", [1, 2, 3]))]
run = subprocess.run([*sys.argv[1:], f"cluster.address={cluster.address}"], capture_output=True, text=True)
found["command"] = [run.returncode, run.stderr]
cluster.shutdown()
print(json.dumps(found))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ranks_spread_over_two_nodes_and_strict_pack_is_refused_with_each_nodes_numbers(tmp_path):
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        environment["RAY_TMPDIR"] = folder
        there = ["cluster=attach", "cluster.cpus_per_rank=1", "parallel.tp_size=2", f"run.dir={tmp_path / 'there'}"]
        command = [sys.executable, "-c", TWO_NODES, *COMMAND, *there]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    problem = found["refused"]
    assert problem["code"] == "placement"
    assert problem["what"] == "the cluster cannot give 2 x 1 CPU on one node"
    assert problem["why"].count("1 of 1 CPU free") == 2
    assert "cluster.strategy=PACK" in problem["fix"]
    assert found["gloo"] == ["gloo", [[2.0], [4.0], [6.0]]]
    assert found["auto"] == ["shared_memory", [[2.0], [4.0], [6.0]]]
    status, said = found["command"]
    assert status == 0, said
    subprocess.run([*COMMAND, f"run.dir={tmp_path / 'here'}"], check=True, capture_output=True, timeout=120)
    assert tokens(tmp_path / "there") == tokens(tmp_path / "here")


def tokens(run_dir):
    return [json.loads(line)["token_ids"] for line in (run_dir / "results.jsonl").read_text().splitlines()]


def test_a_cluster_that_does_not_answer_is_said_at_once(monkeypatch):
    monkeypatch.setattr("framework.cluster.placement.start", _attach_only)
    with (
        pytest.raises(Refused) as caught,
        open_session({"name": "attach", "address": "127.0.0.1:1"}, stub.plan(2)),
    ):
        pass
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == ("ray-unreachable", "cluster.address=127.0.0.1:1")
    assert "Connection refused" in problem.why


def _attach_only(options, ranks, threads):
    # past the look whether this process is connected already: the shared Ray of these tests
    return placement._attach(options)


def test_auto_needs_an_address_or_a_ray_started_here(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
    with pytest.raises(Refused) as caught:
        placement._attach(ClusterOptions(name="attach"))
    assert "RAY_ADDRESS is not set" in caught.value.problems[0].why


def test_an_address_of_another_kind_is_refused(monkeypatch):
    with pytest.raises(InputError):
        placement._attach(ClusterOptions(name="attach", address="ray://somewhere:10001"))
