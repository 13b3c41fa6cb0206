"""The load of benchmarks/serve.py, smaller: nothing fails, no page is kept, memory stays where it is."""

import subprocess
import sys

import pytest

from tests.serving.running import ROOT, TINY


@pytest.mark.slow
@pytest.mark.ray
def test_many_requests_of_which_some_are_given_up_leave_nothing():
    recipe = ["recipe=llm/local", f"model.path={TINY}", "parallel.tp_size=2", "runtime.threads=1",
              "runtime.context=512", "runtime.max_batch=16"]  # fmt: skip
    command = [sys.executable, "benchmarks/serve.py", "soak", "--requests", "200", "--tokens", "8", *recipe]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    last = run.stdout.splitlines()[-1]
    assert "200 requests" in last
    assert " 0 failed" in last
    assert " 0 pages held" in last
