"""Where a GGUF keeps a module's tensors, and what it changed in them."""

from __future__ import annotations

import re

from framework.checkpoint.index import Index
from framework.formats.base import TensorSpec
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
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
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
# Blocks of 32 that are one group of npu_weight_quant_batchmatmul as they are.
KEPT = {"Q4_0": "w4a16", "Q4_1": "w4a16", "Q8_0": "w8a16"}
GROUP = 32

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)$")


def architecture(index: Index) -> str:
    """Return general.architecture."""
    return str(index.metadata.get("general.architecture"))


def tensor_name(module: Module, index: Index) -> str:
    """Return the GGUF name, without suffix, of the tensor that holds a module's weight."""
    name = module.name
    if module.tied_to and "output.weight" not in index.tensors:
        name = module.tied_to
    if name in TOP:
        return TOP[name]
    match = _LAYER.match(name)
    parts = GEMMA3_PARTS if architecture(index) == "gemma3" else LAYER_PARTS
    if match is None or match.group(2) not in parts:
        raise ValueError(f"no GGUF name for module {name}")
    return f"blk.{match.group(1)}.{parts[match.group(2)]}"


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

    def schemes_of(self, module: Module, index: Index) -> tuple[str, ...]:
        """Float for every type; the blocks of 32 of Q4_0, Q4_1 and Q8_0 can be kept packed."""
        info = index.tensors.get(f"{tensor_name(module, index)}.weight")
        kept = KEPT.get(info.dtype) if info is not None and module.kind is Kind.LINEAR else None
        return ("float", kept) if kept else ("float",)

    def tensors_of(self, module: Module, index: Index) -> list[TensorSpec]:
        """A weight, and a bias where the module has one; vectors have one dimension."""
        name = tensor_name(module, index)
        n, k = module.shape
        shape = (n,) if module.kind is Kind.NORM else (n, k)
        specs = [TensorSpec("weight", f"{name}.weight", shape, DECODABLE)]
        if module.bias:
            specs.append(TensorSpec("bias", f"{name}.bias", (n,), ("F32", "F16", "BF16")))
        return specs

    def extras(self, index: Index) -> dict[str, list[TensorSpec]]:
        """Tensors that belong to no weight: llama 3's rotary divisors."""
        info = index.tensors.get("rope_freqs.weight")
        return {} if info is None else {"rotary": [TensorSpec("divisors", info.name, info.shape, ("F32",))]}

    def ignorable(self, name: str) -> str | None:
        """Nothing in a GGUF is ignored."""
        return None

    def grain(self, module: Module, scheme: str, index: Index) -> tuple[int, int]:
        """A dequantized weight can be cut anywhere, a packed one between groups."""
        return (1, 1) if scheme == "float" else (1, GROUP)
