"""Ranks killed under load: said within two seconds, in-flight answers end with an error, replicas come back."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager

import openai
import pytest

from tests.serving.running import MARK, serving

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SETTINGS = ("parallel.tp_size=2", "runtime.threads=1", "runtime.context=2048", "runtime.max_batch=4",
            "runtime.dtype=float32")  # fmt: skip
GREEDY = {"model": "local", "prompt": "The quick brown", "temperature": 0}
LONG = GREEDY | {"max_tokens": 2000, "stream": True, "extra_body": {"ignore_eos": True}}
# two nodes with room for two ranks each; a line of input takes a node away, adds one, or asks for placement groups
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
import ray
node = {"num_cpus": 2, "object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
second = cluster.add_node(**node)
print(cluster.address, flush=True)
ray.init(address=cluster.address, log_to_driver=False)
for line in sys.stdin:
    if line == "lose\\n":
        cluster.remove_node(second, allow_graceful=False)
    if line == "add\\n":
        cluster.add_node(**node)
    groups = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
    print("groups", json.dumps([sorted(g["bundles_to_node_id"].values()) for g in groups]), flush=True)
cluster.shutdown()
"""


def wait_until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.02)
    return found


def test_a_killed_rank_is_said_within_two_seconds_and_the_server_comes_back():
    with serving(*SETTINGS) as server, server.client() as client:
        said = client.completions.create(**GREEDY, max_tokens=8).choices[0].text
        streams = [iter(client.completions.create(**LONG)) for _ in range(2)]
        for stream in streams:
            next(stream)
        assert server.get("/health")[0] == 200
        ranks = server.ranks()
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        begin = time.monotonic()
        wait_until(lambda: server.get("/health")[0] == 503, 2, "health did not turn")
        assert time.monotonic() - begin < 2
        for stream in streams:
            with pytest.raises(openai.APIError, match=r"rank \d ended") as caught:
                list(stream)
            assert caught.value.body["code"] == "replica_lost"
        wait_until(lambda: server.get("/health")[0] == 200, 60, "it did not come back")
        assert not set(ranks) & set(server.ranks())
        assert client.completions.create(**GREEDY, max_tokens=8).choices[0].text == said
        assert server.figures()['replica_restarts_total{replica="0"}'] == 1
        assert server.pages_used() == 0
        assert server.interrupt() == 0
        assert server.left() == {}


@contextmanager
def two_nodes(folder):
    """A Ray cluster; yields what joins it in the environment, its address, and a function that lists its groups."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    joins = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), MARK: uuid.uuid4().hex}
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as temporary:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=os.environ | joins | {"RAY_TMPDIR": temporary},
        )  # fmt: skip

        def groups(order=""):
            process.stdin.write(f"{order}\n")
            process.stdin.flush()
            said = next(line for line in process.stdout if line.startswith("groups "))  # Ray speaks there too
            return json.loads(said.removeprefix("groups "))

        try:
            yield joins, process.stdout.readline().strip(), groups
        finally:
            process.stdin.close()
            process.wait(60)
            process.stdout.close()


def test_replicas_on_a_cluster_answer_on_while_a_rank_and_then_a_node_is_replaced(tmp_path):
    with two_nodes(tmp_path) as (joins, address, groups):
        there = ("cluster=attach", f"cluster.address={address}", "cluster.cpus_per_rank=1", "job.replicas=2")
        with serving(*SETTINGS, *there, environment=joins) as server:
            placed = groups()
            assert len(placed) == 2  # each its own, of two ranks
            assert [len(nodes) for nodes in placed] == [2, 2]
            assert len(server.ranks()) == 4
            asyncio.run(under_load(server))
            wait_until(lambda: server.get("/health")[0] == 200, 60, "the replica did not come back")
            assert len(server.ranks()) == 4
            figures = server.figures()
            assert sum(figures[f'replica_restarts_total{{replica="{i}"}}'] for i in range(2)
                       if f'replica_restarts_total{{replica="{i}"}}' in figures) == 1  # fmt: skip
            assert server.pages_used() == 0
            with server.client() as client:
                expected = client.completions.create(**GREEDY, max_tokens=8).choices[0].text
                groups("lose")
                wait_until(lambda: server.get("/health")[0] == 503, 20, "the lost node was not noticed")
                for _ in range(3):
                    assert client.completions.create(**GREEDY, max_tokens=8).choices[0].text == expected
                groups("add")
                wait_until(lambda: server.get("/health")[0] == 200, 90, "the replica did not come to the new node")
                assert len(server.ranks()) == 4
            assert server.interrupt() == 0
        assert groups() == []


async def under_load(server):
    """Kill a rank while both replicas stream: one's stream ends with an error, and new requests are answered."""
    async with server.async_client() as client:
        expected = (await client.completions.create(**GREEDY, max_tokens=8)).choices[0].text
        streams = [await client.completions.create(**LONG) for _ in range(2)]
        for stream in streams:
            await anext(aiter(stream))
        figures = server.figures()
        assert [figures[f'requests_running{{replica="{i}"}}'] for i in range(2)] == [1, 1]  # the one that has least

        async def drain(stream):
            try:
                async for _ in stream:
                    pass
            except openai.APIError as error:
                return error.body["code"]
            return "complete"

        ends = [asyncio.create_task(drain(stream)) for stream in streams]
        begin = time.monotonic()
        os.kill(server.ranks()[1], signal.SIGKILL)
        turned = 0.0
        while not all(task.done() for task in ends):
            # whoever comes now is answered, by the other one if need be: nothing of it was sent yet
            whole = await client.completions.create(**GREEDY, max_tokens=8)
            assert whole.choices[0].text == expected
            if not turned and (await asyncio.to_thread(server.get, "/health"))[0] == 503:
                turned = time.monotonic() - begin
        assert sorted([await task for task in ends]) == ["complete", "replica_lost"]
        assert 0 < turned < 2
