"""A decoder described: what its config says, as the numbers and switches that one shared decoder needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from framework.geometry import Kind, Module, Split


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
class DecoderSpec:
    """A decoder-only transformer.

    `windows[i]` is the sliding window of layer i in tokens (None: full attention); layers with a window use
    `rope_local` where it is given. `norm_plus_one`: norm weights are stored as w - 1 (Gemma).
    `post_norms`: the outputs of attention and MLP are normed before they are added (Gemma 3).
    `activation` is silu or gelu_tanh, applied to the gate.
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
        return cls(**fields)


def modules(spec: DecoderSpec) -> Iterator[Module]:
    """Yield every weight of the decoder, in execution order."""
    q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    hidden, dim = spec.hidden, spec.head_dim
    embed = "model.embed_tokens"
    yield Module(embed, Kind.EMBEDDING, (spec.vocab, hidden), Split.VOCAB, "vocab")

    def norm(name: str, size: int = hidden) -> Module:
        return Module(name, Kind.NORM, (size, 1), Split.REPLICATED)

    for i in range(spec.layers):
        layer = f"model.layers.{i}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        yield norm(f"{layer}.input_layernorm")
        yield Module(f"{attn}.q_proj", Kind.LINEAR, (q_rows, hidden), Split.COLUMN, "q_heads", dim, spec.qkv_bias)
        for name in ("k_proj", "v_proj"):
            yield Module(f"{attn}.{name}", Kind.LINEAR, (kv_rows, hidden), Split.COLUMN, "kv_heads", dim, spec.qkv_bias)
        if spec.qk_norm:
            yield norm(f"{attn}.q_norm", dim)
            yield norm(f"{attn}.k_norm", dim)
        yield Module(f"{attn}.o_proj", Kind.LINEAR, (hidden, q_rows), Split.ROW, "q_heads", dim, spec.o_bias)
        yield norm(f"{layer}.post_attention_layernorm")
        if spec.post_norms:
            yield norm(f"{layer}.pre_feedforward_layernorm")
        for name in ("gate_proj", "up_proj"):
            shape = (spec.intermediate, hidden)
            yield Module(f"{mlp}.{name}", Kind.LINEAR, shape, Split.COLUMN, "mlp", 1, spec.mlp_bias)
        shape = (hidden, spec.intermediate)
        yield Module(f"{mlp}.down_proj", Kind.LINEAR, shape, Split.ROW, "mlp", 1, spec.mlp_bias)
        if spec.post_norms:
            yield norm(f"{layer}.post_feedforward_layernorm")
    yield norm("model.norm")
    tied_to = embed if spec.tied else ""
    yield Module("lm_head", Kind.LINEAR, (spec.vocab, hidden), Split.VOCAB, "vocab", tied_to=tied_to)
