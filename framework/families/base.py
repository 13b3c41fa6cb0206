"""A decoder described: what its config says, as the numbers and switches that one shared decoder needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from framework.geometry import Kind, Module, Role, Split

# Well beyond every published model: more is an error of its config, and would take hours to describe
MOST_LAYERS, MOST_EXPERTS = 1 << 12, 1 << 16  # experts: of all layers

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding. `kind` is default, linear, llama3 or yarn; the rest parametrises it.

    `from_file`: the checkpoint stores a divisor per rotated pair instead of llama3 parameters (GGUF).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    from_file: bool = False  # divisors come from the checkpoint's rope_freqs tensor


@dataclass(frozen=True, slots=True)
class Moe:
    """Routed experts. A token's scores over all experts decide; formulas: transformers' modeling of each family.

    `layers[i]`: layer i has experts; the others have a dense MLP. `shared_intermediate`: width of all shared experts
    together, which every token passes (0: none).
    `scoring` is softmax or sigmoid. With `groups` > 1 only experts of the `top_groups` best groups can be chosen; a
    group's score is the sum of its `group_best` best experts. `correction_bias`: a learned term per expert is added
    for the choice alone, not to the weights. `renormalize`: the chosen weights are divided by their sum, before they
    are multiplied by `scaling`.
    """

    experts: int
    top_k: int
    intermediate: int
    layers: tuple[bool, ...]
    shared_intermediate: int = 0
    scoring: str = "softmax"
    renormalize: bool = True
    scaling: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    correction_bias: bool = False


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention (DeepSeek): keys and values of all heads come from one latent of `kv_rank`.

    A query head has `nope_dim` plain and `rope_dim` rotated features; the rotated part of the key is shared by all
    heads. `q_rank`: queries too come from a latent (None: straight from the hidden state). `interleaved`: rotated
    pairs are neighbours (2i, 2i+1), not halves.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    interleaved: bool = True


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer.

    `windows[i]` is the sliding window of layer i in tokens (None: full attention); layers with a window use
    `rope_local` where it is given. `norm_plus_one`: norm weights are stored as w - 1 (Gemma).
    `post_norms`: the outputs of attention and MLP are normed before they are added (Gemma 3).
    `activation` is silu or gelu_tanh, applied to the gate.
    `head_dim` is that of queries and keys; with `mla`, every query head counts as a KV head.
    `draft_layers`: layers for multi-token prediction that follow the model's own in the file, and are not run.
    """

    architecture: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    context: int
    rope: Rope
    rope_local: Rope | None = None
    windows: tuple[int | None, ...] = ()
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    activation: str = "silu"
    eos_ids: tuple[int, ...] = ()
    moe: Moe | None = None
    mla: Mla | None = None
    draft_layers: int = 0

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        return self.mla.rope_dim if self.mla else self.head_dim

    @property
    def cache_width(self) -> int:
        """Values cached per token, layer and KV head; for MLA the latent and the rotated key, once per rank."""
        return self.mla.kv_rank + self.mla.rope_dim if self.mla else 2 * self.head_dim

    def cache_values(self, kv_heads: int) -> int:
        """Values cached per token and layer by a rank that holds so many KV heads."""
        return self.cache_width if self.mla else kv_heads * self.cache_width

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is routed."""
        return self.moe is not None and self.moe.layers[layer]

    def to_json(self) -> dict[str, Any]:
        """Return plain data, `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DecoderSpec:
        """Read what `to_json` wrote, or what JSON made of it."""
        fields = dict(data)
        fields["rope"] = Rope(**data["rope"])
        fields["rope_local"] = Rope(**data["rope_local"]) if data["rope_local"] else None
        for name in ("windows", "eos_ids"):
            fields[name] = tuple(data[name])
        if moe := data.get("moe"):
            fields["moe"] = Moe(**(moe | {"layers": tuple(moe["layers"])}))
        if mla := data.get("mla"):
            fields["mla"] = Mla(**mla)
        return cls(**fields)


def modules(spec: DecoderSpec) -> Iterator[Module]:
    """Yield every weight of the decoder, in execution order; one EXPERTS module per layer and projection."""
    embed = "model.embed_tokens"
    yield Module(embed, Kind.EMBEDDING, (spec.vocab, spec.hidden), Split.VOCAB, "vocab")
    attention = _latent_attention if spec.mla else _attention
    for i in range(spec.layers):
        layer = f"model.layers.{i}"
        yield _norm(f"{layer}.input_layernorm", spec.hidden)
        yield from attention(spec, f"{layer}.self_attn")
        yield _norm(f"{layer}.post_attention_layernorm", spec.hidden)
        if spec.post_norms:
            yield _norm(f"{layer}.pre_feedforward_layernorm", spec.hidden)
        if spec.has_experts(i):
            yield from _routed(spec, f"{layer}.mlp")
        else:
            yield from _gated(f"{layer}.mlp", spec.hidden, spec.intermediate, "mlp", bias=spec.mlp_bias)
        if spec.post_norms:
            yield _norm(f"{layer}.post_feedforward_layernorm", spec.hidden)
    yield _norm("model.norm", spec.hidden)
    head = Module("lm_head", Kind.LINEAR, (spec.vocab, spec.hidden), Split.VOCAB, "vocab", role=Role.HEAD)
    yield head._replace(tied_to=embed) if spec.tied else head


def ignorable(name: str, spec: DecoderSpec) -> str | None:
    """Say why a tensor of the file that no module of the decoder uses may be left out, or None."""
    match = _LAYER.search(name)
    if match and spec.layers <= int(match[1]) < spec.layers + spec.draft_layers:
        return "a layer for multi-token prediction; drafting is not run"
    return None


def _norm(name: str, size: int) -> Module:
    return Module(name, Kind.NORM, (size, 1), Split.REPLICATED)


def _copied(name: str, rows: int, columns: int, *, bias: bool = False, role: Role = Role.NONE) -> Module:
    return Module(name, Kind.LINEAR, (rows, columns), Split.REPLICATED, bias=bias, role=role)


def _attention(spec: DecoderSpec, attn: str) -> Iterator[Module]:
    q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    hidden, dim, bias = spec.hidden, spec.head_dim, spec.qkv_bias
    yield Module(f"{attn}.q_proj", Kind.LINEAR, (q_rows, hidden), Split.COLUMN, "q_heads", dim, bias)
    for name in ("k_proj", "v_proj"):
        yield Module(f"{attn}.{name}", Kind.LINEAR, (kv_rows, hidden), Split.COLUMN, "kv_heads", dim, bias)
    if spec.qk_norm:
        yield _norm(f"{attn}.q_norm", dim)
        yield _norm(f"{attn}.k_norm", dim)
    yield Module(f"{attn}.o_proj", Kind.LINEAR, (hidden, q_rows), Split.ROW, "q_heads", dim, spec.o_bias)


def _latent_attention(spec: DecoderSpec, attn: str) -> Iterator[Module]:
    assert spec.mla is not None
    mla, hidden, heads, dim = spec.mla, spec.hidden, spec.heads, spec.head_dim
    query, features = "q_proj", hidden
    if mla.q_rank is not None:
        yield _copied(f"{attn}.q_a_proj", mla.q_rank, hidden, bias=spec.qkv_bias)
        yield _norm(f"{attn}.q_a_layernorm", mla.q_rank)
        query, features = "q_b_proj", mla.q_rank
    yield Module(f"{attn}.{query}", Kind.LINEAR, (heads * dim, features), Split.COLUMN, "q_heads", dim)
    yield _copied(f"{attn}.kv_a_proj_with_mqa", mla.kv_rank + mla.rope_dim, hidden, bias=spec.qkv_bias)
    yield _norm(f"{attn}.kv_a_layernorm", mla.kv_rank)
    rows = mla.nope_dim + mla.v_dim
    yield Module(f"{attn}.kv_b_proj", Kind.LINEAR, (heads * rows, mla.kv_rank), Split.COLUMN, "q_heads", rows,
                 absorbed=True)  # fmt: skip
    shape = (hidden, heads * mla.v_dim)
    yield Module(f"{attn}.o_proj", Kind.LINEAR, shape, Split.ROW, "q_heads", mla.v_dim, spec.o_bias)


def _gated(mlp: str, hidden: int, width: int, axis: str, *, bias: bool = False, experts: int = 0) -> Iterator[Module]:
    kind = Kind.EXPERTS if experts else Kind.LINEAR
    for name in ("gate_proj", "up_proj"):
        yield Module(f"{mlp}.{name}", kind, (width, hidden), Split.COLUMN, axis, bias=bias, experts=experts)
    yield Module(f"{mlp}.down_proj", kind, (hidden, width), Split.ROW, axis, bias=bias, experts=experts)


def _routed(spec: DecoderSpec, mlp: str) -> Iterator[Module]:
    assert spec.moe is not None
    moe, hidden = spec.moe, spec.hidden
    yield _copied(f"{mlp}.gate", moe.experts, hidden, role=Role.ROUTER)
    if moe.correction_bias:
        yield Module(
            f"{mlp}.gate.e_score_correction_bias", Kind.PARAMETER, (moe.experts, 1), Split.REPLICATED,
            role=Role.ROUTER, dims=(moe.experts,),
        )  # fmt: skip
    yield from _gated(f"{mlp}.experts.*", hidden, moe.intermediate, "expert_mlp", experts=moe.experts)
    if moe.shared_intermediate:
        width = moe.shared_intermediate
        yield from _gated(f"{mlp}.shared_experts", hidden, width, "shared_mlp", bias=spec.mlp_bias)
