"""A router that nearly chose other experts is named, and excuses its own positions only."""

import numpy as np
import torch

from framework.families.base import Moe
from framework.jobs.reference import Reference
from framework.jobs.verify import Holds, _compare, near_ties
from framework.layers.experts import Router

HOLDS = Holds("max_abs", 1e-3, 0.0)


def test_positions_below_the_margin_are_listed_the_closest_first():
    margins = {"layers.0.mlp": np.array([0.2, 9e-4, 0.5]), "layers.1.mlp": np.array([1e-5, 0.3, 1e-3])}
    found = [(tie["position"], tie["layer"]) for tie in near_ties(margins)]
    assert found == [(0, "layers.1.mlp"), (1, "layers.0.mlp")]


def compared(wrong, ties, tokens=40):
    expected = np.random.default_rng(0).normal(size=(tokens, 8)).astype(np.float32)
    ours = expected.copy()
    ours[wrong] += 1.0
    near = [{"position": position, "layer": "layers.0.mlp", "margin": 1e-4} for position in ties]
    return _compare(ours, Reference(list(range(tokens)), expected), near, HOLDS)


def test_a_flipped_position_is_left_out_and_said():
    found = compared(wrong=[7], ties=[7])
    assert HOLDS(found) and found["excluded"] == [7] and found["tokens"] == 40


def test_no_other_position_is_excused():
    found = compared(wrong=[7], ties=[9])
    assert not HOLDS(found) and "excluded" not in found and found["near_ties"]


def test_more_than_five_of_a_hundred_excuse_nothing():
    assert "excluded" not in compared(wrong=[7], ties=[7, 8, 9])  # 3 of 40


def test_what_holds_needs_no_excuse():
    found = compared(wrong=[], ties=[3])
    assert HOLDS(found) and "excluded" not in found


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
    torch.testing.assert_close(router.margins(scores), torch.tensor([0.05]))
