"""How far two sets of logits are apart."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def compare(ours: Array, reference: Array) -> dict[str, float | int]:
    """Compare logits [T, vocab]; a NaN or Inf on our side makes every distance the largest number there is.

    rel_l2 is over all logits; cosine the mean over positions; kl the mean over positions of KL(reference || ours)
    in nats; top1 the share of positions with the same largest logit.
    """
    import numpy as np

    a, b = ours.astype(np.float64), reference.astype(np.float64)
    if not np.isfinite(a).all():
        inf = sys.float_info.max  # JSON has no infinity
        return {
            "tokens": len(b),
            "max_abs": inf,
            "mean_abs": inf,
            "rel_l2": inf,
            "cosine": 0.0,
            "kl": inf,
            "top1": 0.0,
        }
    difference = np.abs(a - b)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    log_p, log_q = _log_softmax(b), _log_softmax(a)
    return {
        "tokens": len(b),
        "max_abs": float(difference.max()),
        "mean_abs": float(difference.mean()),
        "rel_l2": float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)),
        "cosine": float(np.mean((a * b).sum(1) / np.maximum(norms, 1e-300))),
        "kl": float(np.mean((np.exp(log_p) * (log_p - log_q)).sum(1))),
        "top1": float(np.mean(a.argmax(1) == b.argmax(1))),
    }


def _log_softmax(x: Array) -> Array:
    import numpy as np

    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))
