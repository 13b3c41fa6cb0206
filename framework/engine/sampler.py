"""From logits to a token.

Random numbers depend on seed, request and position alone, so text does not depend on what else is in the
batch or on how many ranks computed the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from framework.engine.request import SamplingParams, TokenLogprobs
from framework.engine.scheduler import Sequence as Running

_LIKELIEST = 256  # candidates of a first look for top-p


def choose(logits: Tensor, sequences: list[Running]) -> list[int]:
    """Return the next token of each sequence; logits [S, vocab] fp32."""
    wanted = [sequence.request.sampling for sequence in sequences]
    if all(params.temperature == 0.0 and params.repetition_penalty == 1.0 for params in wanted):
        if logits.is_cpu:
            # numpy's is ten times as fast as torch's along a row
            return [int(token) for token in logits.numpy().argmax(1)]
        return [int(token) for token in logits.argmax(1).tolist()]
    return [
        sample(row, params, sequence.ids, uniform(params.seed, _draw(sequence), len(sequence.ids)))
        for row, params, sequence in zip(logits.cpu(), wanted, sequences, strict=True)
    ]


def _draw(sequence: Running) -> int:
    request = sequence.request
    return request.index if request.draw is None else request.draw


def uniform(seed: int, index: int, position: int) -> float:
    """Return a number in [0, 1), a function of its arguments alone."""
    digest = blake2b(f"{seed}/{index}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: Tensor, params: SamplingParams, ids: Sequence[int], number: float) -> int:
    """Choose a token.

    The cumulative distribution runs in the order of token ids, not of probabilities: where rounding swaps two
    nearly equal tokens (another tensor-parallel size), the same number still takes the same token.

    Args:
        logits: [vocab] fp32, on the CPU.
        params: repetition penalty, then at temperature 0 the largest, else temperature, top-k, top-p, min-p.
        ids: prompt and generated tokens, for the repetition penalty (each token once, whatever its count).
        number: in [0, 1); the point of the cumulative distribution that is taken.
    """
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(ids)
        values = logits[seen]
        factor = params.repetition_penalty
        logits = logits.index_put((seen,), torch.where(values > 0, values / factor, values * factor))
    if params.temperature == 0.0:
        return int(logits.argmax())
    candidates: Tensor | None = None
    if 0 < params.top_k < len(logits):
        # a stable order among equals: the smaller id is in
        least = logits.topk(params.top_k).values[-1]
        candidates = torch.cat([(logits > least).nonzero(), (logits == least).nonzero()])[: params.top_k, 0].sort()[0]
        logits = logits[candidates]
    probabilities = (logits.double() / params.temperature).softmax(0)
    floor = _floor(probabilities, params)
    if floor > 0.0:
        probabilities = torch.where(probabilities >= floor, probabilities, 0.0)
    cumulative = probabilities.cumsum(0)
    total = cumulative[-1]
    # rounding may lift the product to the total itself, which lies behind the last token
    point = torch.minimum(total * number, torch.nextafter(total, torch.zeros_like(total)))
    chosen = int(torch.searchsorted(cumulative, point, right=True))
    return chosen if candidates is None else int(candidates[chosen])


def logprobs(logits: Tensor, token_id: int, count: int) -> TokenLogprobs:
    """Return the chosen token's log-probability and the `count` likeliest, from [vocab] fp32 logits."""
    values = logits.double().log_softmax(0)
    top = values.topk(min(count, len(values)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprobs(float(values[token_id]), tuple(pairs))


def _floor(probabilities: Tensor, params: SamplingParams) -> float:
    """The smallest probability that passes top-p and min-p."""
    floor = params.min_p * float(probabilities.max()) if params.min_p > 0.0 else 0.0
    if params.top_p >= 1.0:
        return floor
    # sorting a whole vocabulary takes milliseconds; the likeliest few nearly always hold top_p
    likeliest = probabilities.topk(min(_LIKELIEST, len(probabilities))).values
    if float(likeliest.sum()) < params.top_p:
        likeliest = probabilities.sort(descending=True).values
    before_each = likeliest.cumsum(0) - likeliest
    inside = int((before_each < params.top_p).sum())
    return max(floor, float(likeliest[inside - 1]))
