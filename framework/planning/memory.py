"""Bytes a rank will hold: weights by scheme, the paged cache, workspace. Formulas, no device."""

from __future__ import annotations

from framework.capability.storage import STORAGE, WEIGHT_ONLY
from framework.families.base import DecoderSpec
from framework.geometry import HeadShare, Kind, Module
from framework.planning.plan import PlannedModule

PAGE_TOKENS = 128
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def module_bytes(planned: PlannedModule, rank: int, dtype: str) -> int:
    """Bytes of one rank's part of a module as its scheme holds it on the device (scales and bias included).

    In the fp32 reference mode weight-only schemes are held dequantized.
    """
    width = DTYPE_BYTES["float32" if planned.fp32 else dtype]
    n, k = planned.shards[rank].shape
    bias = n * width if planned.module.bias else 0
    scheme = "float" if dtype == "float32" and planned.scheme in WEIGHT_ONLY else planned.scheme
    return planned.linears_on(rank) * (STORAGE[scheme].of(n, k, planned.group, width, planned.bits) + bias)


def rank_weights(modules: tuple[PlannedModule, ...], rank: int, dtype: str) -> list[int]:
    """Bytes of each module on one rank. A tied head that keeps its embedding's form holds nothing of its own."""
    schemes = {planned.name: planned.scheme for planned in modules}
    return [
        0
        if planned.module.tied_to and schemes.get(planned.module.tied_to) == planned.scheme
        else module_bytes(planned, rank, dtype)
        for planned in modules
    ]


def held_at_once(modules: tuple[PlannedModule, ...], rank: int, dtype: str, offload: str) -> list[int]:
    """Bytes of each module of those that a rank holds at a time: with `experts` those of the larger transformer."""
    if offload == "none":
        return rank_weights(modules, rank, dtype)
    parts: dict[str, list[PlannedModule]] = {}
    for planned in modules:
        parts.setdefault(planned.name.partition(".")[0], []).append(planned)
    return max((rank_weights(tuple(part), rank, dtype) for part in parts.values()), key=sum)


def page_bytes(spec: DecoderSpec, share: HeadShare, dtype: str) -> int:
    """Bytes of one page of 128 tokens over all layers of a rank: keys and values, or MLA's latent."""
    return PAGE_TOKENS * spec.layers * spec.cache_values(share.kv1 - share.kv0) * DTYPE_BYTES[dtype]


def workspace_bytes(spec: DecoderSpec, tp_size: int, ep_size: int, chunk_tokens: int, max_batch: int) -> int:
    """Activations of one prefill chunk at its widest (gate and up, fp32), and the logits of a full batch.

    Experts that are dealt to `ep_size` groups of ranks are cut over the ranks of their group alone.
    """
    dense = -(-2 * spec.intermediate // tp_size)
    if spec.moe is None:
        widest = dense
    else:
        routed = spec.moe.top_k * (-(-2 * spec.moe.intermediate // (tp_size // ep_size)) + spec.hidden)
        widest = max(dense, routed + -(-2 * spec.moe.shared_intermediate // tp_size))
    return 4 * (chunk_tokens * (widest + 2 * spec.hidden) + max_batch * spec.vocab)


def kv_bytes_per_token(spec: DecoderSpec, share: HeadShare, dtype: str) -> int:
    """KV bytes of one token on one rank."""
    return page_bytes(spec, share, dtype) // PAGE_TOKENS


def read_share(module: Module, spec: DecoderSpec | None) -> float:
    """Share of a module's weights that one token reads: one row of an embedding, top_k of the experts."""
    if module.kind is Kind.EMBEDDING:
        return 0.0
    if module.kind is Kind.EXPERTS and spec is not None and spec.moe is not None:
        return spec.moe.top_k / spec.moe.experts
    return 1.0
