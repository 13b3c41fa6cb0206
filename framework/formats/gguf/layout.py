"""Where a GGUF keeps a module's tensors, and what it changed in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from framework.checkpoint.gguf import GGML_TYPES
from framework.checkpoint.index import Index
from framework.errors import InputError, Problem, nearest
from framework.formats.base import FLOATS, Assumed, Held, TensorSpec
from framework.geometry import Kind, Module, Role

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
# Blocks of 32 that are one group of npu_weight_quant_batchmatmul as they are.
KEPT = {"Q4_0": "w4a16", "Q4_1": "w4a16", "Q8_0": "w8a16"}
GROUP = 32

# Names that converters can write and that are not read: fused or split weights, scales beside blocks.
UNREAD = (
    (re.compile(r"\.ffn_gate_up_exps\."), "gate and up of all experts are fused in one tensor"),
    (re.compile(r"\.attn_qkv\."), "q, k and v are fused in one tensor"),
    (re.compile(r"\.attn_[kv]_b\."), "kv_b_proj of latent attention is split in attn_k_b and attn_v_b"),
    (re.compile(r"\.(?:input_)?scale$"), "scales are stored beside the blocks that they multiply"),
)

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"mlp\.experts\.(\d+|\*)\.(gate|up|down)_proj$")


@dataclass(frozen=True, slots=True)
class Model:
    """What the rules ask of a model: layers, query rows a KV row, routed experts of a layer."""

    layers: int
    gqa: int
    experts: int


Rule = tuple[str, str, Callable[[int, Model], bool]]  # the part's last name, its type, in which layers


def _every(layer: int, model: Model) -> bool:
    return True


def _more(layer: int, model: Model) -> bool:
    """The first and last eighth, and every third in between."""
    eighth = model.layers // 8
    return layer < eighth or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2


def _first_eighth(layer: int, model: Model) -> bool:
    return layer < model.layers // 8


def _grouped(layer: int, model: Model) -> bool:
    return model.gqa >= 4


_K_M: tuple[Rule, ...] = (("v_proj", "Q6_K", _more), ("kv_b_proj", "Q6_K", _more), ("down_proj", "Q6_K", _more))
# mix: type of most tensors, exceptions of which the first holds. Q4_K_M is what `Q4_K` stands for.
MIXES: dict[str, tuple[str, tuple[Rule, ...]]] = {
    "Q2_K": ("Q2_K", (("v_proj", "Q4_K", _grouped), ("v_proj", "Q3_K", _every), ("down_proj", "Q3_K", _every),
                      ("o_proj", "Q3_K", _every))),
    "Q3_K_S": ("Q3_K", ()),
    "Q3_K_M": ("Q3_K", (("v_proj", "Q5_K", lambda layer, _: layer < 2), ("v_proj", "Q4_K", _every),
                        ("down_proj", "Q5_K", lambda layer, model: layer < model.layers // 16),
                        ("down_proj", "Q4_K", _every), ("o_proj", "Q4_K", _every))),
    "Q4_K_S": ("Q4_K", (("v_proj", "Q5_K", lambda layer, _: layer < 4), ("down_proj", "Q5_K", _first_eighth))),
    "Q4_K_M": ("Q4_K", _K_M),
    "Q5_K_S": ("Q5_K", ()),
    "Q5_K_M": ("Q5_K", _K_M),
    "MXFP4_MOE": ("Q8_0", ()),
    **{kind: (kind, ()) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "BF16", "F16", "F32")},
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
FLOAT = ("BF16", "F16", "F32")
# with 8 experts a layer attention is small, and worth more bits
_OF_8 = {"k_proj": "Q8_0", "v_proj": "Q8_0", "kv_b_proj": "Q8_0"}
_OUTPUT_OF_8 = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
# when the columns are no multiple of the block
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_MIX_FOR = {"float": "Q4_K_M", "w4a16": "Q4_0", "w8a16": "Q8_0"}


def architecture(index: Index) -> str:
    """Return general.architecture."""
    return str(index.metadata.get("general.architecture"))


def tensor_name(module: Module, index: Index) -> str:
    """Return the GGUF name, without suffix, of the tensor that holds a module's weight, alone or in a stack."""
    name = module.name
    if module.tied_to and "output.weight" not in index.tensors:
        name = module.tied_to
    layer = _layer(name)
    expert = _EXPERT.search(name)
    if expert and _apart(layer, index):
        return f"blk.{layer}.ffn_{expert[2]}.{expert[1]}"
    gemma = architecture(index) == "gemma3" or f"blk.{layer}.post_ffw_norm.weight" in index.tensors
    return canonical_to_gguf(name, GEMMA3_PARTS if gemma else LAYER_PARTS)


def canonical_to_gguf(name: str, parts: Mapping[str, str]) -> str:
    """Return the GGUF name, without suffix, of a module; one that has none keeps its name, which no file has."""
    match = _LAYER.match(name)
    if match is None:
        return TOP.get(name, name)
    part = _EXPERT.sub(r"mlp.experts.*.\2_proj", match[2])
    return f"blk.{match[1]}.{parts.get(part, part)}"


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


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
        return module.kind is Kind.EXPERTS and not _apart(_layer(module.name), index)

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


def types(modules: Sequence[Module], scheme: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the ggml type that llama.cpp's quantizer gives each module's weight.

    `scheme` is float or one of KEPT; options are those of GgufLayout.stand_in. Rules: llama_tensor_get_type of
    llama.cpp's llama-quant.cpp.

    Raises:
        InputError: `quant-type-unknown`; `pattern-syntax`.
    """
    mix = str(options.get("mix", _default(scheme)))
    mix = ALIASES.get(mix, mix)
    if mix not in MIXES:
        raise _unknown(f"there is no mix {mix} of GGUF types", "gguf_mix", mix, MIXES)
    if scheme not in ("float", KEPT.get(MIXES[mix][0])):
        why = f"a GGUF of mix {mix} cannot serve {scheme}"
        raise _unknown(why, "gguf_mix", "", [name for name, one in MIXES.items() if KEPT.get(one[0]) == scheme])
    rules = [(_pattern(str(rule["pattern"])), _kind(str(rule["scheme"]))) for rule in options.get("layers", ())]
    model = _model(modules)
    tied = any(module.tied_to for module in modules)
    for module in modules:
        kind = _type(module, mix, model, tied=tied)
        if module.quantizable and module.role is not Role.ROUTER:
            kind = next((asked for pattern, asked in rules if pattern.match(module.names()[0])), kind)
        yield _fitting(kind, module.shape[1]) if module.kind not in (Kind.NORM, Kind.PARAMETER) else kind


def _type(module: Module, mix: str, model: Model, *, tied: bool) -> str:
    base, rules = MIXES[mix]
    if module.kind in (Kind.NORM, Kind.PARAMETER) or module.role is Role.ROUTER:
        return "F32"
    if base in FLOAT:
        return base
    if module.role is Role.HEAD or (module.kind is Kind.EMBEDDING and tied):
        return "Q8_0" if base == "Q8_0" or module.shape[1] % GGML_TYPES[base][1] else "Q6_K"
    if module.kind is Kind.EMBEDDING:
        return base
    if mix == "MXFP4_MOE":
        return "MXFP4" if module.experts else base
    part = module.name.rpartition(".")[2]
    if model.experts == 8 and (part in _OF_8 or (part == "o_proj" and mix in _OUTPUT_OF_8)):
        return _OF_8.get(part, "Q5_K")
    layer = _layer(module.name)
    kind = next((kind for name, kind, where in rules if name == part and where(layer, model)), base)
    wide = part == "v_proj" and model.layers == 80 and model.gqa > 1 and not model.experts  # Llama 70B, Qwen2 72B
    return "Q5_K" if wide and kind in ("Q3_K", "Q4_K") else kind


def _fitting(kind: str, columns: int) -> str:
    if columns % GGML_TYPES[kind][1]:
        kind = _FALLBACK.get(kind, kind)
    return "F16" if columns % GGML_TYPES[kind][1] else kind


def _model(modules: Sequence[Module]) -> Model:
    layers = {_layer(module.name) for module in modules} - {-1}
    rows = {module.name.rpartition(".")[2]: module.shape[0] for module in modules if ".self_attn." in module.name}
    gqa = rows["q_proj"] // rows["k_proj"] if "q_proj" in rows and "k_proj" in rows else 1
    return Model(len(layers), gqa, max((module.experts for module in modules), default=0))


def _default(scheme: str) -> str:
    if scheme not in _MIX_FOR:
        raise _unknown(f"no GGUF type serves {scheme}", "scheme", scheme, _MIX_FOR)
    return _MIX_FOR[scheme]


def _kind(scheme: str) -> str:
    """A pattern's scheme, or a type as it is; float: kept in bf16."""
    return "BF16" if scheme == "float" else scheme if scheme in GGML_TYPES else _default(scheme)


def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(f"(?:{pattern[3:]})\\Z" if pattern.startswith("re:") else translate(pattern))
    except re.error as error:
        raise InputError(
            Problem("pattern-syntax", f"{pattern} is not a regular expression: {error}", "model.assume.layers")
        ) from error


def _unknown(what: str, where: str, given: str, known: Any) -> InputError:  # noqa: ANN401
    near = nearest(given, known) or list(known)[:1]
    fix = f"model.assume.{where}={near[0]}" if near else ""
    return InputError(Problem("quant-type-unknown", what, "model.assume", f"known: {', '.join(known)}", fix))
