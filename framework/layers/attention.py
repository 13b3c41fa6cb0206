"""Grouped-query attention over a paged KV cache, heads dealt to ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from framework import ops
from framework.layers.linear import ParallelLinear
from framework.layers.norm import RMSNorm
from framework.layers.submodules import LeanModule, find_submodules_directly

PAGE_TOKENS = 128
WHOLE = 2147483647
CAUSAL, BAND = 3, 4  # sparse_mode of npu_fused_infer_attention_score
# tiers with the ATB operators of a paged cache; A5 writes by npu_scatter_pa_kv_cache, and reads by the fused operator
ATB_TIERS = ("a2", "a3")


def write_cache(keys: Tensor, values: Tensor, cache: tuple[Tensor, Tensor], slots: Tensor, *, atb: bool) -> None:
    """Write rows [T, KV, D] and [T, KV, Dv] to their slots of the paged cache."""
    if atb:
        ops._npu_reshape_and_cache(keys, values, *cache, slots)
    else:
        ops.npu_scatter_pa_kv_cache(keys, values, *cache, slots, cache_mode="Norm")


@dataclass
class Step:
    """What all layers share in one forward pass over T packed tokens of B sequences.

    `query_ends` and `context_lengths`: cumulative query lengths and total lengths per sequence, as lists and,
    for decoding, `context_tensor` int32 [B]. `block_table` int32 [B, P]. `slots` int32 [T].
    """

    slots: Tensor
    block_table: Tensor
    query_ends: list[int]
    context_lengths: list[int]
    context_tensor: Tensor
    longest: int
    is_decode: bool
    causal_mask: Tensor
    rotary: tuple[Tensor, Tensor]
    rotary_local: tuple[Tensor, Tensor]
    windows: dict[int, Window] = field(default_factory=dict)

    def window(self, size: int) -> Window:
        """Return the last `size` keys of each sequence, for single queries; made once for all layers of that size."""
        if size not in self.windows:
            self.windows[size] = Window.of(self, size)
        return self.windows[size]


@dataclass(frozen=True)
class Window:
    """The pages that hold the last keys of each sequence, and a mask over what stands before those in the first page.

    For a single query the fused operator ignores `sparse_mode` and with it a band (npu_ops.yaml), but not a mask.
    `block_table` int32 [B, P], `lengths` from the first of those pages on, `mask` bool [B, 1, 1, P * 128].
    """

    block_table: Tensor
    lengths: list[int]
    mask: Tensor

    @classmethod
    def of(cls, step: Step, size: int) -> Window:
        """Return the window of a step of single queries."""
        device, table = step.block_table.device, step.block_table
        begins = [max(0, length - size) for length in step.context_lengths]
        firsts = [begin // PAGE_TOKENS for begin in begins]
        pages = min(-(-size // PAGE_TOKENS) + 1, table.shape[1])
        first, begin = torch.tensor([firsts, begins], device=device).unsqueeze(-1)
        index = (first + torch.arange(pages, device=device)).clamp(max=table.shape[1] - 1)
        position = first * PAGE_TOKENS + torch.arange(pages * PAGE_TOKENS, device=device)
        lengths = [length - page * PAGE_TOKENS for length, page in zip(step.context_lengths, firsts, strict=True)]
        return cls(table.gather(1, index), lengths, (position < begin)[:, None, None])


class Attention(LeanModule):
    """q, k, v, optional head norms, rotary, cache write, attention, output projection."""

    def __init__(
        self,
        qkv: ParallelLinear,
        output: ParallelLinear,
        norms: tuple[RMSNorm, RMSNorm] | None,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int | None,
        local_rotary: bool,
        atb: bool,
    ) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = qkv, output
        self.q_norm, self.k_norm = norms if norms else (None, None)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_size, self.kv_size = heads * head_dim, kv_heads * head_dim
        self.scale = scale
        self.window = window
        self.local_rotary, self.atb = local_rotary, atb
        find_submodules_directly(self)

    def forward(self, x: Tensor, step: Step, cache: tuple[Tensor, Tensor]) -> Tensor:
        """[T, H] -> [T, H]; writes this step's keys and values into `cache` ([pages, 128, kv_heads, D] each)."""
        tokens, heads, kv_heads = x.shape[0], self.heads, self.kv_heads
        qkv = self.qkv_proj(x).view(1, tokens, -1, self.head_dim)
        cos, sin = step.rotary_local if self.local_rotary else step.rotary
        if self.q_norm is None or self.k_norm is None:
            qk, v = qkv.split_with_sizes([heads + kv_heads, kv_heads], 2)
            q, k = ops.npu_rotary_mul(qk, cos, sin).squeeze(0).split_with_sizes([heads, kv_heads], 1)
            q = q.contiguous()
        else:
            q, k, v = qkv.split_with_sizes([heads, kv_heads, kv_heads], 2)
            q = ops.npu_rotary_mul(self.q_norm(q), cos, sin).squeeze(0)
            k = ops.npu_rotary_mul(self.k_norm(k), cos, sin).squeeze(0)
        keys, values = cache
        write_cache(k.contiguous(), v.squeeze(0).contiguous(), cache, step.slots, atb=self.atb)
        attended = self._attend(q, keys, values, step)
        return self.o_proj(attended.reshape(tokens, self.q_size))

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        windowed = self.window is not None and step.longest > self.window
        if step.is_decode and self.atb and not windowed:
            out = torch.empty_like(q)
            ops._npu_paged_attention(
                q,
                keys,
                values,
                self.kv_heads,
                self.heads,
                self.scale,
                step.block_table,
                step.context_tensor,
                out,
            )
            return out
        pages = keys.shape[0]
        rows = keys.view(pages, PAGE_TOKENS, self.kv_size), values.view(pages, PAGE_TOKENS, self.kv_size)
        if step.is_decode and windowed:
            window = step.window(self.window)
            return ops.npu_fused_infer_attention_score(
                q.unsqueeze(1),
                *rows,
                atten_mask=window.mask,
                actual_seq_lengths_kv=window.lengths,
                block_table=window.block_table,
                num_heads=self.heads,
                scale=self.scale,
                input_layout="BSND",
                num_key_value_heads=self.kv_heads,
                sparse_mode=0,
                block_size=PAGE_TOKENS,
            )[0].squeeze(1)
        return ops.npu_fused_infer_attention_score(
            q,
            *rows,
            atten_mask=step.causal_mask,
            actual_seq_lengths=step.query_ends,
            actual_seq_lengths_kv=step.context_lengths,
            block_table=step.block_table,
            num_heads=self.heads,
            scale=self.scale,
            input_layout="TND",
            num_key_value_heads=self.kv_heads,
            sparse_mode=BAND if windowed else CAUSAL,
            pre_tokens=self.window - 1 if windowed else WHOLE,
            next_tokens=0,
            block_size=PAGE_TOKENS,
        )[0]
