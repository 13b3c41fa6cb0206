"""One decoder for all families: built from a DecoderSpec, its weights given by whoever loads them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from framework.families.base import DecoderSpec
from framework.geometry import HeadShare
from framework.layers.attention import Attention, Step
from framework.layers.embedding import VocabEmbedding
from framework.layers.experts import Experts, Router
from framework.layers.group import Group
from framework.layers.latent_attention import LatentAttention
from framework.layers.linear import ParallelLinear
from framework.layers.mlp import GatedMLP
from framework.layers.norm import RMSNorm
from framework.layers.rotary import RotaryTable
from framework.layers.submodules import LeanModule, find_submodules_directly


class Weights(Protocol):
    """Where the layers come from: this rank's part of each named module, decoded and prepared.

    `atb`: the tier has the ATB operators of a paged cache.
    """

    dtype: torch.dtype
    device: torch.device
    atb: bool

    def linear(self, *names: str) -> ParallelLinear:
        """Return the layer of one module, or of several over the same input."""
        ...

    def experts(self, *names: str) -> ParallelLinear:
        """Return the layer of one projection of all experts, or of several over the same input."""
        ...

    def expert_range(self, name: str) -> tuple[int, int]:
        """Return the half-open range of experts that this rank holds."""
        ...

    def matrix(self, name: str) -> Tensor:
        """Return this rank's part of a linear as a plain weight [N, K]."""
        ...

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return weight and, where the file has one, bias [H] of a norm."""
        ...

    def parameter(self, name: str) -> Tensor:
        """Return the values of a parameter in fp32."""
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


class DecoderLayer(LeanModule):
    """Attention and MLP with their norms; the residual is carried beside the activations."""

    def __init__(self, spec: DecoderSpec, i: int, share: HeadShare, weights: Weights) -> None:
        super().__init__()
        name = f"model.layers.{i}"

        def norm(suffix: str) -> RMSNorm:
            return _norm(spec, f"{name}.{suffix}", weights)

        self.input_layernorm = norm("input_layernorm")
        attention = _latent_attention if spec.mla else _attention
        self.self_attn = attention(spec, i, share, weights)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm") if spec.post_norms else None
        self.mlp = _experts(spec, i, weights) if spec.has_experts(i) else _mlp(spec, f"{name}.mlp", weights)
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


def _norm(spec: DecoderSpec, name: str, weights: Weights) -> RMSNorm:
    weight, bias = weights.norm(name)
    return RMSNorm(weight, spec.norm_eps, plus_one=spec.norm_plus_one, bias=bias)


def _attention(spec: DecoderSpec, i: int, share: HeadShare, weights: Weights) -> Attention:
    attn = f"model.layers.{i}.self_attn"
    return Attention(
        weights.linear(f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"),
        weights.linear(f"{attn}.o_proj"),
        (_norm(spec, f"{attn}.q_norm", weights), _norm(spec, f"{attn}.k_norm", weights)) if spec.qk_norm else None,
        heads=share.q1 - share.q0,
        kv_heads=share.kv1 - share.kv0,
        head_dim=spec.head_dim,
        scale=spec.attention_scale,
        window=spec.windows[i],
        local_rotary=spec.rope_local is not None and spec.windows[i] is not None,
        atb=weights.atb,
    )


def _latent_attention(spec: DecoderSpec, i: int, share: HeadShare, weights: Weights) -> LatentAttention:
    attn, mla = f"model.layers.{i}.self_attn", spec.mla
    if mla.q_rank is None:
        queries = (weights.linear(f"{attn}.q_proj"), None, None)
    else:
        first, second = weights.linear(f"{attn}.q_a_proj"), weights.linear(f"{attn}.q_b_proj")
        queries = (first, _norm(spec, f"{attn}.q_a_layernorm", weights), second)
    return LatentAttention(
        queries,
        weights.linear(f"{attn}.kv_a_proj_with_mqa"),
        _norm(spec, f"{attn}.kv_a_layernorm", weights),
        weights.matrix(f"{attn}.kv_b_proj"),
        weights.linear(f"{attn}.o_proj"),
        mla,
        heads=share.q1 - share.q0,
        scale=spec.attention_scale,
        atb=weights.atb,
    )


def _mlp(spec: DecoderSpec, mlp: str, weights: Weights) -> GatedMLP:
    gate_up = weights.linear(f"{mlp}.gate_proj", f"{mlp}.up_proj")
    return GatedMLP(gate_up, weights.linear(f"{mlp}.down_proj"), spec.activation)


def _experts(spec: DecoderSpec, i: int, weights: Weights) -> Experts:
    mlp, moe = f"model.layers.{i}.mlp", spec.moe
    correction = weights.parameter(f"{mlp}.gate.e_score_correction_bias") if moe.correction_bias else None
    return Experts(
        Router(weights.linear(f"{mlp}.gate"), correction, moe),
        weights.experts(f"{mlp}.experts.*.gate_proj", f"{mlp}.experts.*.up_proj"),
        weights.experts(f"{mlp}.experts.*.down_proj"),
        _mlp(spec, f"{mlp}.shared_experts", weights) if moe.shared_intermediate else None,
        moe,
        weights.expert_range(f"{mlp}.experts.*.down_proj"),
    )


class Decoder(nn.Module):
    """Token ids to logits, over a paged cache."""

    def __init__(self, spec: DecoderSpec, share: HeadShare, weights: Weights, group: Group, context: int) -> None:
        super().__init__()
        self.spec, self.group = spec, group
        embedding, first = weights.embedding("model.embed_tokens")
        self.embed_tokens = VocabEmbedding(embedding, first, group, spec.embedding_scale)
        self.layers = nn.ModuleList(DecoderLayer(spec, i, share, weights) for i in range(spec.layers))
        self.norm = _norm(spec, "model.norm", weights)
        self.lm_head = weights.linear("lm_head")
        dim, device = spec.rotary_dim, weights.device
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
