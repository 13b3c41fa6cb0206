"""From a published config.json to a DecoderSpec: one small function per family, registered by architecture."""

from __future__ import annotations

from collections.abc import Callable

from framework.errors import InputError, Problem, Refused
from framework.families.base import MOST_EXPERTS, DecoderSpec, Moe, Rope
from framework.families.fields import Config, common, qwen_windows, rope_of
from framework.families.sparse import deepseek, mixtral, qwen3_moe


def describe(config: Config) -> DecoderSpec:
    """Return the decoder that a Hugging Face config describes.

    Raises:
        Refused: `architecture-unsupported`, with the supported ones; `rope-unsupported`.
        InputError: `config-key` when the config lacks a key that its family needs or has a wrong type.
    """
    given = config.get("architectures") or _OF_MODEL_TYPE.get(str(config.get("model_type")), config.get("model_type"))
    architecture = str(given[0] if isinstance(given, list) else given)
    build = FAMILIES.get(architecture)
    if build is None:
        raise Refused(
            Problem(
                "architecture-unsupported",
                f"models of architecture {architecture} cannot be run yet",
                "config.json: architectures",
                f"supported: {', '.join(sorted(FAMILIES))}",
                "use a checkpoint of a supported architecture",
            )
        )
    try:
        spec = build(architecture, config)
        _consistent(spec)
        return spec
    except KeyError as error:
        raise InputError(
            Problem(
                "config-key",
                f"the config of this {architecture} has no {error.args[0]}",
                "config.json",
                "the family's shapes cannot be told without it",
                "use the config.json that was published with the weights",
            )
        ) from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(
            Problem(
                "config-value",
                f"a value in the config is unusable: {error}",
                "config.json",
                fix="use the config.json that was published with the weights",
            )
        ) from error


def _consistent(spec: DecoderSpec) -> None:
    """Refuse shapes that cannot be.

    Raises:
        ValueError: in words for the user.
    """
    sizes = {
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}")
    if spec.heads % spec.kv_heads:
        raise ValueError(f"{spec.heads} query heads are no multiple of {spec.kv_heads} KV heads")
    if len(spec.windows) != spec.layers:
        raise ValueError(f"layer_types has {len(spec.windows)} entries for {spec.layers} layers")
    if not all(isinstance(token, int) for token in spec.eos_ids):
        raise ValueError("eos_token_id is not a token id")
    if spec.moe:
        _consistent_experts(spec.moe)
    if spec.mla and min(spec.mla.kv_rank, spec.mla.nope_dim, spec.mla.rope_dim, spec.mla.v_dim) < 1:
        raise ValueError("a size of the latent attention is below 1")


def _consistent_experts(moe: Moe) -> None:
    if min(moe.experts, moe.top_k, moe.intermediate, moe.groups, moe.top_groups) < 1:
        raise ValueError("a size or count of the experts is below 1")
    if moe.experts * sum(moe.layers) > MOST_EXPERTS:
        raise ValueError(f"{moe.experts} experts in each of {sum(moe.layers)} layers")
    if moe.experts % moe.groups or moe.top_groups > moe.groups:
        raise ValueError(f"{moe.top_groups} of {moe.groups} groups cannot be chosen among {moe.experts} experts")
    if moe.top_k > moe.experts // moe.groups * moe.top_groups:
        raise ValueError(f"a token cannot choose {moe.top_k} experts where there are fewer")


def _llama(architecture: str, config: Config) -> DecoderSpec:
    bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    fields = common(architecture, "llama", config)
    return DecoderSpec(**fields, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def _mistral(architecture: str, config: Config) -> DecoderSpec:
    fields = common(architecture, "mistral", config)
    fields["windows"] = (config.get("sliding_window"),) * fields["layers"]
    return DecoderSpec(**fields)


def _qwen2(architecture: str, config: Config) -> DecoderSpec:
    fields = common(architecture, "qwen2", config)
    fields["windows"] = qwen_windows(config, fields["layers"])
    return DecoderSpec(**fields, qkv_bias=True)


def _qwen3(architecture: str, config: Config) -> DecoderSpec:
    fields = common(architecture, "qwen3", config)
    fields["windows"] = qwen_windows(config, fields["layers"])
    bias = bool(config.get("attention_bias", False))
    return DecoderSpec(**fields, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _gemma3(architecture: str, config: Config) -> DecoderSpec:
    text = dict(config.get("text_config") or config)
    text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", True))
    # what the published configs leave out are transformers' class defaults
    text.setdefault("max_position_embeddings", 131072)
    text.setdefault("head_dim", 256)
    text.setdefault("num_attention_heads", 8)
    text.setdefault("num_key_value_heads", 4)
    text.setdefault("vocab_size", 262208)
    text.setdefault("eos_token_id", config.get("eos_token_id"))
    flat = {key: value for key, value in text.items() if key not in ("rope_parameters", "rope_scaling")}
    fields = common(architecture, "gemma3", flat, ("gelu_pytorch_tanh", "gelu_tanh"))
    layers, window = fields["layers"], text.get("sliding_window", 4096)
    types = text.get("layer_types")
    pattern = int(text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or 6)
    local = (
        [kind == "sliding_attention" for kind in types] if types else [bool((i + 1) % pattern) for i in range(layers)]
    )
    given = text.get("rope_parameters") or {}
    if "full_attention" in given:
        rope, rope_local = rope_of(text, given["full_attention"]), rope_of(text, given["sliding_attention"])
    else:
        rope = rope_of({"rope_theta": 1_000_000.0, **text})
        rope_local = Rope(theta=float(text.get("rope_local_base_freq", 10000.0)))
    scalar = float(text.get("query_pre_attn_scalar", 256))
    fields |= {
        "rope": rope,
        "windows": tuple(window if is_local else None for is_local in local),
        "attention_scale": scalar**-0.5,
    }
    return DecoderSpec(
        **fields,
        rope_local=rope_local,
        qk_norm=True,
        norm_plus_one=True,
        post_norms=True,
        embedding_scale=fields["hidden"] ** 0.5,
        activation="gelu_tanh",
    )


FAMILIES: dict[str, Callable[[str, Config], DecoderSpec]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "MixtralForCausalLM": mixtral,
    "DeepseekV2ForCausalLM": deepseek,
    "DeepseekV3ForCausalLM": deepseek,
}
# for configs that name no architecture
_OF_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
