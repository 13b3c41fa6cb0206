"""Every scheme's calls against torch_npu's own Meta kernels: nothing is refused, dtypes and shapes are ours.

It needs the torch_npu wheel and libraries under the names of CANN's on the loader path (empty ones do, whose functions
return an error). Where either is missing the tests are skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from framework.jobs.common import torch_npu_installed
from tests.ops.scheme_calls import ROWS, N, cases

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.torch_npu


def calls(which):
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.scheme_calls", which],
        cwd=ROOT,
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def recorded():
    if not torch_npu_installed():
        pytest.skip("torch_npu is not installed")
    theirs = calls("torch_npu")
    if "absent" in theirs:
        pytest.skip(f"torch_npu cannot be loaded: {theirs['absent']}")
    return calls("ours"), theirs


@pytest.mark.parametrize("name", cases())
def test_torch_npu_takes_a_schemes_calls_and_returns_what_ours_do(recorded, name):
    ours, theirs = (found[name] for found in recorded)
    assert "refused" not in theirs, theirs["refused"]
    assert ours["calls"], "no operator was recorded"
    assert theirs == ours
    assert theirs["y"] == [f"torch.{name.rsplit(' ', 1)[1]}", [ROWS, N]]
