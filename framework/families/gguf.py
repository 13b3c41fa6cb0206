"""The Hugging Face config that a GGUF's metadata and tensor shapes amount to (formats/gguf names the tensors)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import InputError, Problem, Refused
from framework.families.base import DecoderSpec
from framework.families.config import describe

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mistral3": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
# What the same names stand for in a file that counts experts
WITH_EXPERTS = {"qwen3moe": "Qwen3MoeForCausalLM", "llama": "MixtralForCausalLM"}


def describe_gguf(index: Index) -> DecoderSpec:
    """Return the decoder that a GGUF holds. Llama 3 files carry their rotary divisors as a tensor."""
    spec = describe(config_of(index))
    if "rope_freqs.weight" in index.tensors:
        spec = replace(spec, rope=replace(spec.rope, from_file=True))
    return spec


def config_of(index: Index) -> dict[str, Any]:
    """Return a config like the one published with the model. Shapes come from the tensors, the rest from keys.

    Raises:
        InputError: `gguf-key`, a key that nothing replaces is missing or of the wrong type.
        Refused: `architecture-unsupported`; `config-mismatch`, keys and tensors disagree.
    """
    meta = index.metadata
    arch = str(meta.get("general.architecture"))
    if arch not in ARCHITECTURES:
        raise Refused(
            Problem(
                "architecture-unsupported",
                f"GGUF files of architecture {arch} cannot be run yet",
                f"{index.root}: general.architecture",
                f"supported: {', '.join(sorted(ARCHITECTURES))}",
                "use a file of a supported architecture",
            )
        )

    def key(name: str, default: Any = ...) -> Any:  # noqa: ANN401
        value = meta.get(f"{arch}.{name}", default)
        if value is ...:
            raise _bad_key(index, f"the GGUF has no {arch}.{name}")
        return value

    def number(name: str, default: Any = ...) -> int | float:  # noqa: ANN401
        return _number(index, f"{arch}.{name}", key(name, default))

    experts = int(number("expert_count", 0))
    if experts and arch not in WITH_EXPERTS:
        raise Refused(
            Problem(
                "architecture-unsupported",
                f"{arch} GGUF files with {experts} experts cannot be run yet",
                f"{index.root}: {arch}.expert_count",
                f"with experts: {', '.join(sorted(WITH_EXPERTS))}",
                "use a file of a supported architecture",
            )
        )

    tensors = index.tensors
    layers = int(number("block_count"))
    heads = _same_in_all_layers(index, f"{arch}.attention.head_count", key("attention.head_count"))
    kv_heads = _same_in_all_layers(index, f"{arch}.attention.head_count_kv", key("attention.head_count_kv", heads))
    hidden = int(number("embedding_length"))
    head_dim = int(number("attention.key_length", hidden // max(heads, 1)))
    windowed = f"{arch}.attention.sliding_window" in meta  # Mistral is converted as llama
    dense = "MistralForCausalLM" if arch == "llama" and windowed else ARCHITECTURES[arch]
    width = key("feed_forward_length", meta.get(f"{arch}.expert_feed_forward_length", ...))
    config: dict[str, Any] = {
        "architectures": [WITH_EXPERTS[arch] if experts else dense],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": _same_in_all_layers(index, f"{arch}.feed_forward_length", width),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": _vocab(index),
        "rms_norm_eps": float(number("attention.layer_norm_rms_epsilon", 1e-6)),
        "max_position_embeddings": int(number("context_length", 2048)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": float(number("rope.freq_base", 1_000_000.0 if arch == "gemma3" else 10000.0)),
        "eos_token_id": [meta[name] for name in ("tokenizer.ggml.eos_token_id",) if name in meta],
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    if windowed:
        config["sliding_window"] = int(number("attention.sliding_window"))
    if experts:
        config["num_experts"] = experts
        config["num_experts_per_tok"] = int(number("expert_used_count"))
        config["moe_intermediate_size"] = int(number("expert_feed_forward_length", config["intermediate_size"]))
        config["norm_topk_prob"] = True  # no key says so; llama.cpp's graphs of these families always do
    config |= _rope_scaling(meta, arch)
    if arch == "gemma3":
        # convert_hf_to_gguf writes no query scalar: head_dim for all sizes but 27B, where it is hidden / heads
        config["query_pre_attn_scalar"] = hidden / max(heads, 1) if layers == 62 else head_dim
        config["rope_local_base_freq"] = float(number("rope.freq_base_swa", 10000.0))
    _check_shape(index, "blk.0.attn_q.weight", (heads * head_dim, hidden))
    _check_shape(index, "blk.0.attn_k.weight", (kv_heads * head_dim, hidden))
    return config


def _rope_scaling(meta: Mapping[str, Any], arch: str) -> dict[str, Any]:
    # as llama.cpp reads it: linear unless the file says otherwise, the factor under its old name too
    factor = meta.get(f"{arch}.rope.scaling.factor") or meta.get(f"{arch}.rope.scale_linear") or 1.0
    kind = str(meta.get(f"{arch}.rope.scaling.type", "linear" if factor != 1.0 else "none"))
    if kind == "none":
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    names = {
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
        "yarn_attn_factor": "attention_factor",
    }
    for theirs, ours in names.items():
        if (value := meta.get(f"{arch}.rope.scaling.{theirs}")) is not None:
            scaling[ours] = value
    return {"rope_scaling": scaling}


def _same_in_all_layers(index: Index, name: str, value: Any) -> int:  # noqa: ANN401
    values = {int(_number(index, name, one)) for one in (value if isinstance(value, list) else [value])}
    if len(values) != 1:
        raise Refused(
            Problem(
                "architecture-unsupported",
                f"{name} differs between layers",
                f"{index.root}",
                f"values {sorted(values)}; layers of one shape are supported",
                "use a model whose layers are alike",
            )
        )
    return values.pop()


def _number(index: Index, name: str, value: Any) -> int | float:  # noqa: ANN401
    if isinstance(value, int | float) and isfinite(value):
        return value
    raise _bad_key(index, f"{name} of the GGUF is {value!r:.60}, no number")


def _bad_key(index: Index, what: str) -> InputError:
    return InputError(Problem("gguf-key", what, str(index.root), fix="re-convert the model"))


def _vocab(index: Index) -> int:
    embedding = index.tensors.get("token_embd.weight")
    if embedding is None:
        raise Refused(
            Problem(
                "tensor-missing",
                "the GGUF has no token_embd.weight",
                str(index.root),
                "every decoder needs one",
                "re-convert the model",
            )
        )
    return embedding.shape[0]


def _check_shape(index: Index, name: str, expected: tuple[int, int]) -> None:
    info = index.tensors.get(name)
    if info is not None and info.shape != expected:
        raise Refused(
            Problem(
                "config-mismatch",
                f"{name} has shape {list(info.shape)}, the metadata says {list(expected)}",
                str(index.root),
                "heads x head size of the metadata must give the rows of the tensor",
                "re-convert the model",
            )
        )
