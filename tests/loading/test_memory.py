"""A rank that loads holds its shard and little more."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import quickstart_model  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[2]
SLACK_BYTES = 350 << 20
CODE = """
import resource, sys
import torch
from framework.layers.group import Alone
from framework.loading.load import load
from framework import ops
from framework.planning.make import make_plan
from tests.plans import checked_for

ops.npu_rms_norm(torch.ones(1, 8), torch.ones(8))
plan = make_plan(checked_for(sys.argv[1], "runtime.context=256", "runtime.max_batch=1", *sys.argv[2:]), "cpu")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
baseline = peak()
model = load(plan, Alone(), lambda done, total: None)
print(peak() - baseline, model.bytes_held())
"""
PACKED = ['quantization.layers=[{pattern: lm_head, scheme: w8a16}, {pattern: "model.layers.*", scheme: w4a16}]',
          "capability.allow=[tbd]"]  # fmt: skip


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [["runtime.dtype=float32"], ["runtime.dtype=bfloat16"], PACKED], ids=["fp32", "bf16", "packed"]
)
def test_loading_peaks_at_the_shard_plus_350_mib(quickstart_model, overrides):  # noqa: F811
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(quickstart_model), *overrides],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, held = map(int, done.stdout.split())
    print(f"peak over import baseline {peak >> 20} MiB, held {held >> 20} MiB")
    assert peak <= held + SLACK_BYTES
