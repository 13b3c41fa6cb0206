"""Bytes a rank will hold: weights by scheme, the paged KV cache, workspace. Formulas, no device."""

from __future__ import annotations

from framework.families.base import DecoderSpec
from framework.geometry import HeadShare, Kind, Module, Rect

PAGE_TOKENS = 128
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GROUP = 32  # of GGUF's 4- and 8-bit blocks


def module_bytes(module: Module, scheme: str, rect: Rect, dtype: str) -> int:
    """Bytes of one rank's part of a module as its scheme holds it on the device (scales and bias included).

    float: one `dtype` value a weight. w4a16, w8a16: packed codes, a scale and an offset a group of 32.
    In the fp32 reference mode packed weights are held dequantized.
    """
    width = DTYPE_BYTES[dtype]
    n, k = rect.shape
    bias = n * width if module.bias else 0
    if scheme == "float" or dtype == "float32":
        return rect.size * width + bias
    bits = {"w4a16": 4, "w8a16": 8}[scheme]
    return rect.size * bits // 8 + n * -(-k // GROUP) * 2 * width + bias


def page_bytes(spec: DecoderSpec, share: HeadShare, dtype: str) -> int:
    """Bytes of one page of 128 tokens over all layers of a rank: keys and values."""
    heads = share.kv1 - share.kv0
    return PAGE_TOKENS * spec.layers * 2 * heads * spec.head_dim * DTYPE_BYTES[dtype]


def workspace_bytes(spec: DecoderSpec, tp_size: int, chunk_tokens: int, max_batch: int) -> int:
    """Activations of one prefill chunk at its widest (gate and up, fp32), and the logits of a full batch."""
    widest = 2 * spec.intermediate // tp_size + 2 * spec.hidden
    return 4 * (chunk_tokens * widest + max_batch * spec.vocab)


def kv_bytes_per_token(spec: DecoderSpec, share: HeadShare, dtype: str) -> int:
    """KV bytes of one token on one rank."""
    return page_bytes(spec, share, dtype) // PAGE_TOKENS


def is_read_every_token(module: Module) -> bool:
    """False for an embedding, of which a token reads one row only."""
    return module.kind is not Kind.EMBEDDING
