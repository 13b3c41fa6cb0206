"""A router that nearly chose other experts is named; that it flipped is shown by turning its choice."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from framework.families.base import Moe
from framework.jobs.reference import Reference
from framework.jobs.verify import Holds, _compare, near_ties
from framework.layers.experts import Router
from framework.layers.group import Alone
from framework.loading.load import load
from tests.plans import plan_for

ROOT = Path(__file__).resolve().parents[2]
MOE = ROOT / "tests/golden/tiny-qwen3-moe"

HOLDS = Holds("max_abs", 1e-3, 0.0)


def test_positions_below_the_margin_are_listed_the_closest_first():
    margins = {
        "layers.0.mlp": {"experts": np.array([0.2, 9e-4, 0.5]), "groups": np.array([np.inf, np.inf, 2e-4])},
        "layers.1.mlp": {"experts": np.array([1e-5, 0.3, 1e-3])},
    }
    found = [(tie["position"], tie["layer"], tie["decision"]) for tie in near_ties(margins)]
    assert found == [(0, "layers.1.mlp", "experts"), (2, "layers.0.mlp", "groups"), (1, "layers.0.mlp", "experts")]


def compared(flips, ties, tokens=40):
    """A model whose router flipped at these positions of layer 0, each of which moves what follows, too."""
    expected = np.random.default_rng(0).normal(size=(tokens, 8)).astype(np.float32)

    def logits(turned=()):
        ours = expected.copy()
        for position in {*flips} ^ {tie["position"] for tie in turned}:
            ours[position:] += 1.0 if position == min(flips) else 0.1
        return ours

    near = [{"position": position, "layer": "layers.0.mlp", "decision": "experts", "margin": 1e-4} for position in ties]
    return _compare(logits(), Reference(list(range(tokens)), expected), near, HOLDS, logits)


def positions(found):
    return [tie["position"] for tie in found.get("turned", ())]


def test_a_flip_is_turned_back_and_said():
    found = compared(flips=[7], ties=[7])
    assert HOLDS(found) and positions(found) == [7] and found["tokens"] == 40


def test_among_several_near_ties_those_that_flipped_are_found():
    found = compared(flips=[7, 21], ties=[30, 7, 2, 21])
    assert HOLDS(found) and positions(found) == [7, 21] and len(found["near_ties"]) == 4


def test_an_earlier_flip_does_not_hide_that_a_later_and_closer_one_is_needed():
    found = compared(flips=[7, 21], ties=[21, 7])  # the largest distance stays as long as the first is not turned
    assert HOLDS(found) and positions(found) == [7, 21]


def test_where_no_router_was_near_nothing_is_turned():
    found = compared(flips=[7], ties=[9])
    assert not HOLDS(found) and "turned" not in found and found["near_ties"]


def test_of_two_decisions_at_one_position_the_one_that_flipped_is_turned():
    expected = np.zeros((40, 8), np.float32)
    tries = []

    def logits(turned):
        tries.append([tie["decision"] for tie in turned])
        return expected + {"experts": 0.5, "groups": 0.0}[turned[-1]["decision"]]

    near = [
        {"position": 7, "layer": "layers.0.mlp", "decision": decision, "margin": 1e-4}
        for decision in ("experts", "groups")
    ]
    found = _compare(expected + 1, Reference(list(range(40)), expected), near, HOLDS, logits)
    assert HOLDS(found) and found["turned"] == near[1:]
    assert tries == [["experts"], ["groups"]]


def test_flips_at_more_than_five_of_a_hundred_positions_do_not_hold():
    assert "turned" not in compared(flips=[7, 8, 9], ties=[7, 8, 9])  # 3 of 40


def test_what_holds_needs_nothing_turned():
    found = compared(flips=[], ties=[3])
    assert HOLDS(found) and "turned" not in found


def moe(experts, top_k, **more):
    return Moe(experts=experts, top_k=top_k, intermediate=8, layers=(True,), **more)


CORRECTION = torch.tensor([0.0, 0.3, -0.2, 0.1, 0.0, -0.1, 0.2, -0.3])
ROUTERS = {
    "softmax": (moe(8, 2), None),
    "softmax as it is": (moe(8, 2, renormalize=False), None),
    "sigmoid": (moe(8, 3, scoring="sigmoid"), None),
    "corrected": (moe(8, 2, scoring="sigmoid", correction_bias=True, scaling=2.5), CORRECTION),
    "deepseek v2": (moe(16, 3, renormalize=False, groups=4, top_groups=2, scaling=16.0), None),
    "deepseek v3": (
        moe(16, 3, scoring="sigmoid", correction_bias=True, groups=4, top_groups=2, group_best=2, scaling=2.5),
        CORRECTION.repeat(2),
    ),
}


def ranking(values):
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def literal(scores, router, decision=None):
    """Return one token's experts with weights, and the margin of each decision: one of them can go the other way."""
    m = router.moe
    e = np.exp(scores - scores.max())
    chances = 1 / (1 + np.exp(-scores)) if m.scoring == "sigmoid" else e / e.sum()
    compared = chances + (0 if router.correction is None else router.correction.numpy())
    size, margins = len(scores) // m.groups, {"groups": np.inf}
    of_groups = [sum(sorted(compared[g * size : (g + 1) * size])[-m.group_best :]) for g in range(m.groups)]
    groups = ranking(of_groups)
    if m.top_groups < m.groups:
        margins["groups"] = of_groups[groups[m.top_groups - 1]] - of_groups[groups[m.top_groups]]
    kept = groups[: m.top_groups - 1] + groups[m.top_groups - (decision != "groups") :][:1]
    allowed = sorted(i for i in range(len(scores)) if i // size in kept)
    best = [allowed[i] for i in ranking(compared[allowed])]
    margins["experts"] = compared[best[m.top_k - 1]] - compared[best[m.top_k]]
    chosen = best[: m.top_k - 1] + best[m.top_k - (decision != "experts") :][:1]
    total = chances[chosen].sum() if m.renormalize else 1.0
    return {i: chances[i] / total * m.scaling for i in chosen}, margins


@pytest.mark.parametrize("name", ROUTERS)
def test_a_decision_of_a_router_goes_the_other_way_and_weights_follow(name):
    mixture, correction = ROUTERS[name]
    router = Router(torch.nn.Identity(), correction, mixture)
    scores = torch.randn(200, mixture.experts, generator=torch.Generator().manual_seed(1))
    margins = router.margins(scores)
    others = {decision: router.choose_otherwise(scores, decision) for decision in margins}
    weights, chosen = router.choose(scores)
    changed = set()
    for t, row in enumerate(scores.double().numpy()):
        wanted, near = literal(row, router)
        assert dict(zip(chosen[t].tolist(), weights[t].tolist(), strict=True)) == pytest.approx(wanted, rel=1e-5)
        for decision, (heavy, experts) in others.items():
            if near[decision] == np.inf:
                assert margins[decision][t] == torch.inf
                continue
            other, _ = literal(row, router, decision)
            assert dict(zip(experts[t].tolist(), heavy[t].tolist(), strict=True)) == pytest.approx(other, rel=1e-5)
            # another group from which nobody is taken, in the place of one of which nobody was, changes nothing
            margin = np.inf if {*other} == {*wanted} else near[decision]
            assert float(margins[decision][t]) == pytest.approx(margin, abs=1e-6)
            changed.add((decision, {*other} != {*wanted}))
    several = {("groups", True), ("groups", False)} if mixture.groups > 1 else set()
    assert changed == {("experts", True)} | several


@pytest.mark.parametrize("name", [name for name, (mixture, _) in ROUTERS.items() if mixture.groups == 1])
def test_among_equal_experts_another_one_is_taken(name):
    router = Router(torch.nn.Identity(), None, ROUTERS[name][0])
    scores = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).sign()
    before, after = router.choose(scores)[1].tolist(), router.choose_otherwise(scores, "experts")[1].tolist()
    assert all(len({*a} - {*b}) == 1 for a, b in zip(before, after, strict=True))


def test_the_other_choice_moves_its_position_and_those_after_it():
    model = load(plan_for(MOE / "awq-w4g64", dtype="float32"), Alone(), lambda done, total: None)
    ids = list(range(3, 23))
    plain, other = model.score(ids), model.score(ids, [("layers.0.mlp", 9, "experts")])
    moved = np.abs(plain - other).max(1) > 1e-4
    assert not moved[:9].any() and moved[9]
    assert np.array_equal(model.score(ids), plain)


@pytest.mark.ray
@pytest.mark.slow
def test_flips_between_the_slices_of_two_ranks_do_not_fail_a_deployment(tmp_path):
    """Activations are quantized by rank: at TP 2 a router of the first layer chooses otherwise at position 3 of 25."""
    folder = MOE / "modelslim-w4a8-dynamic-g64"
    command = [sys.executable, "launch.py", "recipe=llm/local", "job=verify", f"model.path={folder}",
               "parallel.tp_size=2", "runtime.dtype=float32", "capability.allow=[tbd,wip]", "job.format=json",
               f"job.reference={folder / 'reference.npz'}", "job.logits_key=logits_sim", "job.metric=rel_l2",
               "job.tolerance=1e-2", "job.min_top1=0.92", f"run.dir={tmp_path}/run"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["prompts"]
    assert [(tie["layer"], tie["position"]) for tie in first["turned"]] == [("layers.0.mlp", 3)]
    assert first["tokens"] == 25 and max(first["rel_l2"], second["rel_l2"]) <= 1e-2 and "turned" not in second


def test_sigmoid_weights_that_are_not_renormalized_stay_as_they_are():
    moe = Moe(experts=4, top_k=2, intermediate=8, layers=(True,), scoring="sigmoid", renormalize=False, scaling=2.0)
    scores = torch.logit(torch.tensor([[0.9, 0.45, 0.5, 0.2]]))
    weights, chosen = Router(torch.nn.Identity(), None, moe).choose(scores)
    torch.testing.assert_close(weights, torch.tensor([[1.8, 1.0]]))
    assert chosen.tolist() == [[0, 2]]


def test_the_margin_is_between_the_last_chosen_and_the_next():
    moe = Moe(experts=4, top_k=2, intermediate=8, layers=(True,), scoring="sigmoid", correction_bias=True)
    router = Router(torch.nn.Identity(), torch.tensor([0.0, 0.1, 0.0, 0.0]), moe)
    scores = torch.logit(torch.tensor([[0.9, 0.45, 0.5, 0.2]]))
    # with the correction 0.9, 0.55, 0.5, 0.2: chosen are 0 and 1, expert 2 is next
    torch.testing.assert_close(router.margins(scores)["experts"], torch.tensor([0.05]))
    assert router.margins(scores)["groups"].tolist() == [torch.inf]
