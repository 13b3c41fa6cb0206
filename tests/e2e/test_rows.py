"""Every row of the support table that judges language models runs, and gives the logits that it must, on 1, 2, 4 ranks.

Two ranks are processes of Ray, four are threads. The rows are those of the table's file: a new one without a checkpoint
in `rows.py` fails.
"""

from math import floor
from pathlib import Path

import numpy as np
import pytest

from framework.capability.table import read_table
from framework.loading.load import load
from framework.planning.make import make_plan
from tests.e2e.literal import forward, read
from tests.e2e.made import GOLDEN, PER_TOKEN, key
from tests.e2e.rows import ROWS
from tests.plans import checked_for
from tests.threads import on_ranks

TABLE = read_table(Path(__file__).parents[2] / "conf" / "capability", "default")
JUDGING = [row.row for row in TABLE.rows.values() if row.llm]
SIZES = [1, pytest.param(2, marks=pytest.mark.ray), 4]
RECIPE = (
    "hardware=a5", "capability.allow=[tbd,wip]", "runtime.dtype=float32", "runtime.context=128", "runtime.max_batch=1",
)  # fmt: skip
EXACT = {"float", "w4a16", "w8a16"}
FOUR_BIT_INPUTS = {"w4a4_dynamic", "mxfp4", "mxfp4_dualscale"}
NEAR = 1e-3  # a router that is closer to another choice may take it
DROPPED = 0.05


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def find(run):
        if isinstance(run.source, str):
            return GOLDEN / run.source
        if run not in made:
            made[run] = tmp_path_factory.mktemp("made") / "model"
            made[run].mkdir()
            run.source(made[run])
        return made[run]

    return find


@pytest.fixture(scope="module")
def scores_of(folder_of):
    """Rows and their schemes, logits of both prompts and, of one rank, where a router was near another choice; once."""
    done = {}

    def scores(run, size, session):
        if (run, size) not in done:
            found = checked(folder_of(run), run, size)
            plan = make_plan(found, "cpu")
            prompts = [reference["input_ids"].tolist() for reference in references(folder_of(run))]
            logits, near = by_ray(session(), plan, prompts) if size == 2 else by_threads(plan, prompts)
            done[run, size] = {use.row: use.scheme for use in found.rows}, logits, near
        return done[run, size]

    return scores


def by_ray(session, plan, prompts):
    session.load(plan)
    return [session.call("score", ids)[0] for ids in prompts], None


def by_threads(plan, prompts):
    def work(group):
        model = load(plan, group, lambda done, total: None)
        margins = [model.router_margins(ids) if plan.spec.moe else {} for ids in prompts] if group.size == 1 else []
        near = [np.any([n < NEAR for layer in m.values() for n in layer.values()] or [False], axis=0) for m in margins]
        return [model.score(ids) for ids in prompts], near

    return on_ranks(plan.tp_size, work)[0]


def checked(folder, run, size):
    path = next(iter(sorted(folder.glob("*.gguf"))), folder)
    found = checked_for(path, *RECIPE, *run.overrides, f"parallel.tp_size={size}")
    assert found.ok, found.problems
    return found


def references(folder):
    """The arrays of each prompt by name."""
    with np.load(folder / "reference.npz") as arrays:
        return [{n.partition(".")[2]: arrays[n] for n in arrays.files if n.startswith(f"prompt{k}.")} for k in (0, 1)]


def right_logits(arrays, size):
    """Of the activations' quantization if there is one, with the scales that this many ranks give."""
    return next(arrays[k] for k in (key(size), "logits_sim", "logits_dequant_fp32", "logits") if k in arrays)


def settled(ours, right, near):
    """Both without the positions that differ most of those at which a router nearly chose otherwise: one in 20."""
    error = np.where(near, np.abs(ours - right).max(-1), 0)
    worst = np.argsort(-error)[: floor(DROPPED * len(error))]
    kept = np.setdiff1d(np.arange(len(error)), worst[error[worst] > 0])
    return ours[kept], right[kept]


def test_every_row_has_a_checkpoint():
    assert set(JUDGING) == ROWS.keys()


@pytest.mark.parametrize("run", [ROWS["none.float.linear"], ROWS["none.float.moe"]], ids=["dense", "experts"])
def test_the_literal_forward_pass_gives_the_goldens_logits(run, folder_of):
    tensors, config = read(folder_of(run))
    for arrays in references(folder_of(run)):
        logits = forward(tensors, config, {}, arrays["input_ids"].tolist())
        assert np.abs(logits - right_logits(arrays, 1)).max() <= 1e-4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", JUDGING)
def test_a_row_runs_and_gives_its_logits(row, size, folder_of, scores_of, request):
    run = ROWS[row]
    uses, ours, _ = scores_of(run, size, lambda: request.getfixturevalue("warm_session"))
    assert uses[row] == TABLE.rows[row].scheme
    schemes = set(uses.values())
    _, alone, ties = scores_of(run, 1, None)
    for logits, one, near, arrays in zip(ours, alone, ties, references(folder_of(run)), strict=True):
        kept, right = settled(logits, right_logits(arrays, size), near)
        off, relative = np.abs(kept - right).max(), np.linalg.norm(kept - right) / np.linalg.norm(right)
        same = np.mean(kept.argmax(-1) == right.argmax(-1))
        if schemes <= EXACT:
            assert off <= 1e-4
        elif schemes & FOUR_BIT_INPUTS:
            assert (relative <= 1e-1, same >= 0.8) == (True, True), (relative, same)
        else:
            assert (relative <= 1e-2, same >= 0.92) == (True, True), (relative, same)
        if not schemes & PER_TOKEN:
            assert np.abs(logits - one).max() <= 1e-4 * np.ptp(one)
