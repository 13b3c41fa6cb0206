"""One decoder for all families: built from a DecoderSpec, its weights given by whoever loads them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from framework.families.base import DecoderSpec
from framework.geometry import HeadShare
from framework.layers.attention import Attention, Step
from framework.layers.embedding import VocabEmbedding
from framework.layers.group import Group
from framework.layers.linear import ParallelLinear
from framework.layers.mlp import GatedMLP
from framework.layers.norm import RMSNorm
from framework.layers.rotary import RotaryTable
from framework.layers.submodules import find_submodules_directly


class Weights(Protocol):
    """Where the layers come from: this rank's part of each named module, decoded and prepared."""

    dtype: torch.dtype
    device: torch.device

    def linear(self, *names: str) -> ParallelLinear:
        """Return the layer of one module, or of several over the same input."""
        ...

    def vector(self, name: str) -> Tensor:
        """Return a norm weight [H]."""
        ...

    def embedding(self, name: str) -> tuple[Tensor, int]:
        """Return this rank's rows of the embedding and the first one's index."""
        ...

    def rope_divisors(self) -> Tensor | None:
        """Return rotary divisors that the file carries."""
        ...


class StepInput(Protocol):
    """A packed batch, as the engine makes it (engine/batch.py)."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_lengths: list[int]
    context_lengths: list[int]
    block_table: Tensor
    logit_rows: Tensor
    is_decode: bool


class DecoderLayer(nn.Module):
    """Attention and MLP with their norms; the residual is carried beside the activations."""

    def __init__(self, spec: DecoderSpec, i: int, share: HeadShare, weights: Weights) -> None:
        super().__init__()
        name = f"model.layers.{i}"

        def norm(suffix: str) -> RMSNorm:
            vector = weights.vector(f"{name}.{suffix}")
            return RMSNorm(vector, spec.norm_eps, plus_one=spec.norm_plus_one)

        attn = f"{name}.self_attn"
        self.input_layernorm = norm("input_layernorm")
        self.self_attn = Attention(
            weights.linear(f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"),
            weights.linear(f"{attn}.o_proj"),
            (norm("self_attn.q_norm"), norm("self_attn.k_norm")) if spec.qk_norm else None,
            heads=share.q1 - share.q0,
            kv_heads=share.kv1 - share.kv0,
            head_dim=spec.head_dim,
            scale=spec.attention_scale,
            window=spec.windows[i],
            local_rotary=spec.rope_local is not None and spec.windows[i] is not None,
        )
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm") if spec.post_norms else None
        self.mlp = GatedMLP(
            weights.linear(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"),
            weights.linear(f"{name}.mlp.down_proj"),
            spec.activation,
        )
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm") if spec.post_norms else None
        find_submodules_directly(self)

    def forward(
        self, x: Tensor, residual: Tensor | None, step: Step, cache: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return (output not yet added, residual); the next norm adds them."""
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, step, cache)
        if self.pre_feedforward_layernorm is None:
            x, residual = self.post_attention_layernorm.add(x, residual)
            return self.mlp(x), residual
        x, residual = self.pre_feedforward_layernorm.add(self.post_attention_layernorm(x), residual)
        return self.post_feedforward_layernorm(self.mlp(x)), residual


class Decoder(nn.Module):
    """Token ids to logits, over a paged cache."""

    def __init__(self, spec: DecoderSpec, share: HeadShare, weights: Weights, group: Group, context: int) -> None:
        super().__init__()
        self.spec, self.group = spec, group
        embedding, first = weights.embedding("model.embed_tokens")
        self.embed_tokens = VocabEmbedding(embedding, first, group, spec.embedding_scale)
        self.layers = nn.ModuleList(DecoderLayer(spec, i, share, weights) for i in range(spec.layers))
        self.norm = RMSNorm(weights.vector("model.norm"), spec.norm_eps, plus_one=spec.norm_plus_one)
        self.lm_head = weights.linear("lm_head")
        dim, device = spec.head_dim, weights.device
        # npu_rotary_mul wants tables of the input's dtype on an NPU; the CPU's takes exact ones
        dtype = torch.float32 if device.type == "cpu" else weights.dtype
        self.rotary = RotaryTable(spec.rope, dim, context, dtype, device, weights.rope_divisors())
        self.rotary_local = RotaryTable(spec.rope_local, dim, context, dtype, device, None) if spec.rope_local else None
        # prefill: a fixed upper-triangular mask, True = excluded, which sparse modes 3 and 4 shift per sequence
        self.causal_mask = torch.ones(2048, 2048, dtype=torch.bool, device=device).triu_(1)

    def forward(self, batch: StepInput, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return fp32 logits [S, vocab] of `batch.logit_rows`, the same on every rank."""
        step = self._step(batch)
        x, residual = self.embed_tokens(batch.token_ids), None
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, residual = layer(x, residual, step, layer_cache)
        if not (batch.is_decode and batch.logit_rows.shape[0] == x.shape[0]):
            x, residual = x.index_select(0, batch.logit_rows), residual.index_select(0, batch.logit_rows)
        logits = self.lm_head(self.norm.add(x, residual)[0])
        if self.group.size > 1:
            logits = self.group.all_gather(logits, self.lm_head.out_sizes)
        return logits.float()

    def _step(self, batch: StepInput) -> Step:
        rotary = self.rotary.at(batch.positions)
        ends, total = [], 0
        for length in batch.query_lengths:
            total += length
            ends.append(total)
        return Step(
            slots=batch.slots,
            block_table=batch.block_table,
            query_ends=ends,
            context_lengths=batch.context_lengths,
            context_tensor=torch.tensor(batch.context_lengths, dtype=torch.int32),
            longest=max(batch.context_lengths),
            is_decode=batch.is_decode,
            causal_mask=self.causal_mask,
            rotary=rotary,
            rotary_local=self.rotary_local.at(batch.positions) if self.rotary_local else rotary,
        )
