"""Multi-head latent attention (DeepSeek): keys and values of all heads are one cached latent per token.

The up-projections of the latent are absorbed: queries are projected into the latent's space, attention runs there with
one KV head, and its outputs are projected to the heads' values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from framework import ops
from framework.families.base import Mla
from framework.layers.attention import CAUSAL, PAGE_TOKENS, WHOLE, Step, write_cache
from framework.layers.linear import ParallelLinear
from framework.layers.norm import RMSNorm
from framework.layers.submodules import LeanModule, find_submodules_directly


class LatentAttention(LeanModule):
    """Queries (from a latent of their own or straight), the latent of keys and values, attention, output projection.

    `up` [heads * (nope + v), kv_rank]: this rank's rows of kv_b_proj.
    """

    def __init__(
        self,
        queries: tuple[ParallelLinear, RMSNorm | None, ParallelLinear | None],
        latent: ParallelLinear,
        latent_norm: RMSNorm,
        up: Tensor,
        output: ParallelLinear,
        mla: Mla,
        *,
        heads: int,
        scale: float,
        atb: bool,
    ) -> None:
        super().__init__()
        self.q_first, self.q_norm, self.q_second = queries
        self.kv_a_proj, self.kv_a_norm, self.o_proj = latent, latent_norm, output
        per_head = up.view(heads, mla.nope_dim + mla.v_dim, mla.kv_rank)
        self.key_up = per_head[:, : mla.nope_dim].contiguous()  # [heads, nope, rank]
        self.value_up = per_head[:, mla.nope_dim :].transpose(1, 2).contiguous()  # [heads, rank, v]
        self.mla, self.heads, self.scale, self.atb = mla, heads, scale, atb
        find_submodules_directly(self)

    def forward(self, x: Tensor, step: Step, cache: tuple[Tensor, Tensor]) -> Tensor:
        """[T, H] -> [T, H]; writes the latent and the rotated key into `cache` ([pages, 128, 1, width] each)."""
        mla, tokens = self.mla, x.shape[0]
        q = self.q_first(x)
        if self.q_norm is not None and self.q_second is not None:
            q = self.q_second(self.q_norm(q))
        q = q.view(tokens, self.heads, -1)
        q_plain, q_rotated = q.split([mla.nope_dim, mla.rope_dim], dim=-1)
        latent, k_rotated = self.kv_a_proj(x).split([mla.kv_rank, mla.rope_dim], dim=-1)
        latent = self.kv_a_norm(latent.contiguous()).view(tokens, 1, -1)
        cos, sin = step.rotary
        q_rotated = ops.npu_rotary_mul(self._halves(q_rotated).unsqueeze(0), cos, sin).squeeze(0)
        k_rotated = ops.npu_rotary_mul(self._halves(k_rotated.unsqueeze(1)).unsqueeze(0), cos, sin).squeeze(0)
        latents, rotated = cache
        write_cache(latent, k_rotated, cache, step.slots, atb=self.atb)
        absorbed = torch.bmm(q_plain.transpose(0, 1), self.key_up).transpose(0, 1).contiguous()
        attended = self._attend(absorbed, q_rotated, latents, rotated, step)
        values = torch.bmm(attended.transpose(0, 1), self.value_up).transpose(0, 1)
        return self.o_proj(values.reshape(tokens, -1))

    def _halves(self, x: Tensor) -> Tensor:
        """Turn neighbouring pairs (2i, 2i + 1) into halves (i, i + D/2), which npu_rotary_mul rotates."""
        if not self.mla.interleaved:
            return x.contiguous()
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    def _attend(self, q: Tensor, q_rotated: Tensor, latents: Tensor, rotated: Tensor, step: Step) -> Tensor:
        pages = latents.shape[0]
        keys = latents.view(pages, PAGE_TOKENS, -1)
        # over a latent the operator takes 1, 2, 4, .. heads: queries of zeros make up the number
        missing = (1 << (self.heads - 1).bit_length()) - self.heads
        if missing:
            q, q_rotated = (F.pad(part, (0, 0, 0, missing)) for part in (q, q_rotated))
        attended = ops.npu_fused_infer_attention_score(
            q,
            keys,
            keys,
            query_rope=q_rotated,
            key_rope=rotated.view(pages, PAGE_TOKENS, -1),
            # a single query sees all keys, and A5 takes no mask for it
            atten_mask=None if step.is_decode else step.causal_mask,
            actual_seq_lengths=step.query_ends,
            actual_seq_lengths_kv=step.context_lengths,
            block_table=step.block_table,
            num_heads=self.heads + missing,
            scale=self.scale,
            input_layout="TND",
            num_key_value_heads=1,
            sparse_mode=0 if step.is_decode else CAUSAL,
            pre_tokens=WHOLE,
            next_tokens=0,
            block_size=PAGE_TOKENS,
        )[0]
        return attended[:, : self.heads]
