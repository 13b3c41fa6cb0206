"""Where a GGUF keeps a module's tensors, and what it changed in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import Problem
from framework.formats.base import FLOATS, Assumed, Held, TensorSpec
from framework.formats.gguf.mixes import KEPT, LAYER, layer_of, types
from framework.geometry import Kind, Module

# Canonical part of a layer -> GGUF's. Formats: gguf's tensor_mapping, llama.cpp's converters.
LAYER_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
GEMMA3_PARTS = LAYER_PARTS | {
    "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

# Architectures whose converter permutes the rows of q and k for interleaved rotary embeddings.
PERMUTED = ("llama", "mistral", "mistral3")

# Everything that gguf 0.19 dequantizes.
DECODABLE = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
    "MXFP4", "NVFP4",
)  # fmt: skip
GROUP = 32  # of every type in KEPT

# Names that converters can write and that are not read: fused or split weights, scales beside blocks.
UNREAD = (
    (re.compile(r"\.ffn_gate_up_exps\."), "gate and up of all experts are fused in one tensor"),
    (re.compile(r"\.attn_qkv\."), "q, k and v are fused in one tensor"),
    (re.compile(r"\.attn_[kv]_b\."), "kv_b_proj of latent attention is split in attn_k_b and attn_v_b"),
    (re.compile(r"\.(?:input_)?scale$"), "scales are stored beside the blocks that they multiply"),
)

_EXPERT = re.compile(r"mlp\.experts\.(\d+|\*)\.(gate|up|down)_proj$")


def architecture(index: Index) -> str:
    """Return general.architecture."""
    return str(index.metadata.get("general.architecture"))


def tensor_name(module: Module, index: Index) -> str:
    """Return the GGUF name, without suffix, of the tensor that holds a module's weight, alone or in a stack."""
    name = module.name
    if module.tied_to and "output.weight" not in index.tensors:
        name = module.tied_to
    layer = layer_of(name)
    expert = _EXPERT.search(name)
    if expert and _apart(layer, index):
        return f"blk.{layer}.ffn_{expert[2]}.{expert[1]}"
    gemma = architecture(index) == "gemma3" or f"blk.{layer}.post_ffw_norm.weight" in index.tensors
    return canonical_to_gguf(name, GEMMA3_PARTS if gemma else LAYER_PARTS)


def stack_place(module: Module, index: Index) -> int:
    """Return which of a stack [E, ...] a module's expert is; 0 for a module whose tensors are its own."""
    expert = _EXPERT.search(module.name)
    return int(expert[1]) if expert and expert[1] != "*" and not _apart(layer_of(module.name), index) else 0


def canonical_to_gguf(name: str, parts: Mapping[str, str]) -> str:
    """Return the GGUF name, without suffix, of a module; one that has none keeps its name, which no file has."""
    match = LAYER.match(name)
    if match is None:
        return TOP.get(name, name)
    part = _EXPERT.sub(r"mlp.experts.*.\2_proj", match[2])
    return f"blk.{match[1]}.{parts.get(part, part)}"


def _apart(layer: int, index: Index) -> bool:
    """Whether experts of a layer have tensors of their own, as in Mixtral files of early converters."""
    return f"blk.{layer}.ffn_gate.0.weight" in index.tensors


class GgufLayout:
    """Layout of GGUF files (formats.base.Layout)."""

    name = "gguf"

    def detect(self, index: Index) -> str | None:
        """A GGUF is one by its magic."""
        if index.container != "gguf":
            return None
        kinds: dict[str, int] = {}
        for info in index.tensors.values():
            kinds[info.dtype] = kinds.get(info.dtype, 0) + 1
        return "it starts with GGUF; " + ", ".join(f"{n} {k}" for k, n in sorted(kinds.items(), key=lambda i: -i[1]))

    def held(self, module: Module, index: Index) -> Held:
        """Float for every type (dequantized at load); blocks of 32 of Q4_0, Q4_1 and Q8_0 can be kept packed."""
        name = tensor_name(module, index)
        if module.kind is Kind.PARAMETER:
            label = _stored(f"{name}.bias", index)
            return Held("float", (TensorSpec("weight", f"{name}.bias", module.dims, FLOATS),), label)
        n, k = module.shape
        stack = (module.experts,) if self.stacked(module, index) else ()
        shape = (n,) if module.kind is Kind.NORM else (*stack, n, k)
        tensors: tuple[TensorSpec, ...] = (TensorSpec("weight", f"{name}.weight", shape, DECODABLE),)
        if module.bias:
            tensors += (TensorSpec("bias", f"{name}.bias", (*stack, n), FLOATS),)
        label = _stored(f"{name}.weight", index)
        kept = KEPT.get(label) if module.kind is Kind.LINEAR else None
        if kept is None:
            return Held("float", tensors, label)
        # dequantized, it can be cut anywhere; packed, between groups
        return Held("float", tensors, label, group=GROUP, serves=(kept,), grain=(1, GROUP), symmetric=label != "Q4_1")

    def stacked(self, module: Module, index: Index) -> bool:
        """One tensor holds all experts, but in files of early converters."""
        return module.kind is Kind.EXPERTS and not _apart(layer_of(module.name), index)

    def extras(self, index: Index) -> dict[str, list[TensorSpec]]:
        """Tensors that belong to no weight: llama 3's rotary divisors."""
        info = index.tensors.get("rope_freqs.weight")
        return {} if info is None else {"rotary": [TensorSpec("divisors", info.name, info.shape, ("F32",))]}

    def ignorable(self, name: str, index: Index) -> str | None:
        """Nothing in a GGUF is ignored."""
        return None

    def faults(self, modules: Sequence[Module], index: Index) -> list[Problem]:
        """The header describes every tensor by itself; ways to fuse or split them that are not read are named."""
        found = [(why, [name for name in index.tensors if part.search(name)]) for part, why in UNREAD]
        return [
            Problem(
                "format-feature",
                f"{why}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}",
                index.root.name,
                "such tensors are not read",
                "convert the model with llama.cpp's default options, or use its safetensors files",
            )
            for why, names in found
            if names
        ]

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return the headers that llama.cpp's quantizer would write (types).

        Options: `mix` (Q4_K_M, Q8_0, ...; by default what `scheme` needs), `layers` (ordered patterns with schemes).

        Raises:
            InputError: `quant-type-unknown`, a mix that is not known or a scheme that its types cannot serve;
                `pattern-syntax`.
        """
        parts = GEMMA3_PARTS if any("pre_feedforward" in module.name for module in modules) else LAYER_PARTS
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        for module, kind in zip(modules, types(modules, scheme, options), strict=True):
            if module.tied_to:
                continue
            name, (n, k) = canonical_to_gguf(module.name, parts), module.shape
            if module.kind is Kind.PARAMETER:
                tensors.append((f"{name}.bias", kind, module.dims))
                continue
            stack = (module.experts,) if module.experts else ()
            shape = (n,) if module.kind is Kind.NORM else (*stack, n, k)
            tensors.append((f"{name}.weight", kind, shape))
            tensors += [(f"{name}.bias", "F32", (*stack, n))] if module.bias else []
        return Assumed(tuple(tensors), {}, {})


def _stored(name: str, index: Index) -> str:
    info = index.tensors.get(name)
    return info.dtype if info is not None else ""
