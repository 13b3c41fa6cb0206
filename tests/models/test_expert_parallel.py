"""Experts dealt to groups of ranks give the logits that one rank gives."""

import json
from pathlib import Path

import numpy as np
import pytest

from framework.loading.load import load
from framework.planning.plan import Plan
from tests.plans import checked_for, plan_for
from tests.threads import on_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-qwen3-moe"
# folder: rank-local scales of activations move the logits (README of the golden files), all others are exact
FOLDERS = {
    "gguf-q4_k_m-1l": False,
    "ct-w4a16-g128-1l": False,
    "ct-w4a8-clip-1l": True,
    "ct-w4a8-channel-1l": True,
    "modelslim-w4a8-dynamic-g64": True,
}
ALLOWED = "capability.allow=[tbd,wip]"


def path_of(folder):
    path = GOLDEN / folder
    return path / "model.gguf" if (path / "model.gguf").is_file() else path


def logits(folder, tp_size, ep_size):
    ids = np.load(GOLDEN / folder / "reference.npz")["prompt1.input_ids"].reshape(-1).tolist()
    plan = plan_for(path_of(folder), ALLOWED, f"parallel.ep_size={ep_size}", tp_size=tp_size, dtype="float32")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    return plan, on_ranks(tp_size, lambda group: load(plan, group, lambda done, total: None).score(ids))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("tp_size", "ep_size"), [(2, 2), (4, 2), (3, 3)])
@pytest.mark.parametrize("folder", FOLDERS)
def test_g53_experts_over_ranks_equal_one_rank(folder, tp_size, ep_size):
    _, expected = logits(folder, 1, 1)
    plan, got = logits(folder, tp_size, ep_size)
    experts = [m for m in plan.modules if m.module.experts]
    held = [len(experts[0].experts_on(rank)) for rank in range(tp_size)]
    assert sum(held) == experts[0].module.experts * tp_size // ep_size
    if FOLDERS[folder]:
        assert np.linalg.norm(got - expected) / np.linalg.norm(expected) <= 1e-2
    else:
        assert np.abs(got - expected).max() <= 1e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize(
    ("tp_size", "ep_size", "fix"),
    [(4, 3, "parallel.ep_size=1 or 2 or 4"), (8, 16, "parallel.ep_size=1 or 2 or 4 or 8")],
)
def test_groups_that_do_not_divide_the_ranks_are_refused_with_those_that_do(tp_size, ep_size, fix):
    sizes = [f"parallel.tp_size={tp_size}", f"parallel.ep_size={ep_size}"]
    problems = checked_for(path_of("gguf-q4_k_m-1l"), ALLOWED, *sizes).problems
    assert [p for p in problems if p.code == "ep-size" and fix in p.fix]


def test_a_dense_model_has_no_experts_to_deal():
    dense = GOLDEN.parent / "tiny-qwen3" / "gguf-zoo" / "model.gguf"
    (problem,) = checked_for(dense, "parallel.tp_size=2", "parallel.ep_size=2").problems
    assert problem.code == "parallel-unused" and "experts" in problem.what
