"""The sampler against plain Python lists: which tokens can come, and how often."""

import math
import random

import pytest
import torch

from framework.engine.request import SamplingParams
from framework.engine.sampler import logprobs, sample, uniform

VOCAB = 40


def logits(seed, spread=3.0):
    made = random.Random(seed)
    return [made.gauss(0, spread) for _ in range(VOCAB)]


def distribution(values, params, seen=()):
    """Probability of every token, by the textbook: penalty, temperature, top-k, top-p, min-p in turn."""
    scores = list(values)
    for token in set(seen):
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    scores = [score / params.temperature for score in scores]
    ranked = sorted(range(VOCAB), key=lambda token: -scores[token])
    if params.top_k:
        ranked = ranked[: params.top_k]
    weights = {token: math.exp(scores[token] - max(scores)) for token in ranked}
    total = sum(weights.values())
    kept, held = [], 0.0
    for token in ranked:
        if held < params.top_p:
            kept.append(token)
        held += weights[token] / total
    kept = [token for token in kept if weights[token] >= params.min_p * weights[ranked[0]]]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 7},
        {"temperature": 1.4, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.7, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 1000},
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_numbers_spread_evenly_over_0_to_1_give_the_textbook_distribution(options, seed):
    params, values, seen = SamplingParams(**options), logits(seed), [3, 3, 17, 5]
    expected = distribution(values, params, seen if params.repetition_penalty != 1 else ())
    row, count = torch.tensor(values), 2000
    drawn = [sample(row, params, seen, (i + 0.5) / count) for i in range(count)]
    assert set(drawn) <= set(expected)
    for token, probability in expected.items():
        assert drawn.count(token) / count == pytest.approx(probability, abs=1.1 / count)


def test_top_p_that_needs_more_than_the_first_candidates_sorts_the_whole_vocabulary():
    row = torch.zeros(5000)
    row[4321] = 0.5
    # 5000 nearly equal tokens: the fewest that hold 0.9 are 4500 of them, the largest first
    drawn = {sample(row, SamplingParams(temperature=1.0, top_p=0.9), [], i / 7000) for i in range(7000)}
    assert 4321 in drawn


def test_the_ends_of_the_number_range_give_tokens_that_can_come():
    row = torch.tensor([-1e30, 0.0, 2.0, -1e30])
    params = SamplingParams(temperature=1.0)
    assert sample(row, params, [], 0.0) == 1
    assert sample(row, params, [], 1 - 2.0**-53) == 2


def test_temperature_0_takes_the_largest_after_the_penalty():
    row = torch.tensor([1.0, 3.0, 2.5, -1.0])
    assert sample(row, SamplingParams(repetition_penalty=1.0), [1], 0.9) == 1
    # 3 / 1.5 = 2 < 2.5
    assert sample(row, SamplingParams(repetition_penalty=1.5), [1], 0.9) == 2
    assert row.tolist() == [1.0, 3.0, 2.5, -1.0], "the logits were changed"


def test_two_nearly_equal_logits_that_change_places_change_no_answer():
    values = logits(5)
    values[10] = values[30] = max(values)
    one, other = torch.tensor(values), torch.tensor(values)
    one[10] += 1e-6
    other[30] += 1e-6
    params = SamplingParams(temperature=1.0, top_k=20)
    numbers = [(i + 0.5) / 500 for i in range(500)]
    assert [sample(one, params, [], n) for n in numbers] == [sample(other, params, [], n) for n in numbers]


def test_numbers_are_even_and_depend_on_seed_request_and_position():
    numbers = [uniform(0, index, position) for index in range(20) for position in range(100)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == 2000
    # mean and variance of the uniform distribution, four standard errors wide
    mean = sum(numbers) / 2000
    assert mean == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 2000))
    assert sum((n - mean) ** 2 for n in numbers) / 2000 == pytest.approx(1 / 12, abs=0.01)
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    assert len({uniform(1, 2, 3), uniform(2, 1, 3), uniform(1, 3, 2), uniform(12, 3, 0)}) == 4


def test_logprobs_are_natural_logarithms_of_the_softmax():
    values = logits(9)
    total = sum(math.exp(v) for v in values)
    found = logprobs(torch.tensor(values), 4, 2)
    best = sorted(range(VOCAB), key=lambda token: -values[token])[:2]
    assert found.chosen == pytest.approx(values[4] - math.log(total), abs=1e-6)
    assert [token for token, _ in found.top] == best
    assert [value for _, value in found.top] == pytest.approx([values[t] - math.log(total) for t in best], abs=1e-6)
