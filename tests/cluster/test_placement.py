"""Clusters that are there already, of one or several nodes."""

import json
import os
import secrets
import subprocess
import sys
import tempfile

import pytest

from framework.cluster import placement
from framework.cluster.options import ClusterOptions
from framework.cluster.session import open_session
from framework.errors import InputError, Refused
from tests.cluster import stub

TWO_NODES = """
import json
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
        command = [sys.executable, "-c", TWO_NODES]
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
