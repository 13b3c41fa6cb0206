"""From logits to a token. Random numbers depend on seed, request and position alone, so text does not depend on
what else is in the batch or on how many ranks computed the logits."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from framework.engine.request import SamplingParams, TokenLogprobs


def uniform(seed: int, index: int, position: int) -> float:
    """Return a number in [0, 1), a function of its arguments alone."""
    digest = blake2b(f"{seed}/{index}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: Tensor, params: SamplingParams, ids: Sequence[int], number: float) -> int:
    """Choose a token.

    Args:
        logits: [vocab] fp32.
        params: temperature 0 takes the largest; else repetition penalty, temperature, top-k, top-p, min-p in turn.
        ids: prompt and generated tokens, for the repetition penalty (each token once, whatever its count).
        number: in [0, 1); the point of the cumulative distribution that is taken.
    """
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(ids)))
        values = logits[seen]
        factor = params.repetition_penalty
        logits = logits.clone()
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if params.temperature == 0.0:
        return int(logits.argmax())
    scores, order = torch.sort(logits.double() / params.temperature, descending=True, stable=True)
    probabilities = scores.softmax(0)
    kept = _kept(probabilities, params)
    cumulative = probabilities[:kept].cumsum(0)
    chosen = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
    return int(order[min(chosen, kept - 1)])


def _kept(probabilities: Tensor, params: SamplingParams) -> int:
    """How many of the sorted probabilities pass the filters; at least one."""
    kept = len(probabilities)
    if params.top_k > 0:
        kept = min(kept, params.top_k)
    if params.top_p < 1.0:
        # the smallest set that holds top_p of what top-k left
        cumulative = probabilities[:kept].cumsum(0)
        kept = min(kept, int((cumulative < params.top_p * cumulative[-1]).sum()) + 1)
    if params.min_p > 0.0:
        kept = min(kept, int((probabilities >= params.min_p * probabilities[0]).sum()))
    return max(kept, 1)


def logprobs(logits: Tensor, token_id: int, count: int) -> TokenLogprobs:
    """Return the chosen token's log-probability and the `count` likeliest, from [vocab] fp32 logits."""
    values = logits.double().log_softmax(0)
    top = values.topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprobs(float(values[token_id]), tuple(pairs))
