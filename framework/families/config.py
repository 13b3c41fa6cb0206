"""From a published config.json to a DecoderSpec: one small function per family, registered by architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from framework.errors import InputError, Problem, Refused, nearest
from framework.families.base import DecoderSpec, Rope

Config = Mapping[str, Any]


def describe(config: Config) -> DecoderSpec:
    """Return the decoder that a Hugging Face config describes.

    Raises:
        Refused: `architecture-unsupported`, with the supported ones; `rope-unsupported`.
        InputError: `config-key` when the config lacks a key that its family needs or has a wrong type.
    """
    given = config.get("architectures") or [config.get("model_type")]
    architecture = str(given if isinstance(given, str) else given[0])
    build = FAMILIES.get(architecture)
    if build is None:
        like = nearest(architecture, FAMILIES)
        raise Refused(
            Problem(
                "architecture-unsupported",
                f"models of architecture {architecture} cannot be run yet",
                "config.json: architectures",
                f"supported: {', '.join(sorted(FAMILIES))}",
                f"is it a {like[0]}?" if like else "use a checkpoint of a supported architecture",
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
            Problem("config-value", f"a value in the config is unusable: {error}", "config.json")
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


def _refuse_other_maths(config: Config, activations: tuple[str, ...]) -> None:
    """Refuse switches that would change the result and are not computed here."""
    activation = config.get("hidden_activation") or config.get("hidden_act") or activations[0]
    found = []
    if activation not in activations:
        found.append(f"activation {activation}")
    rope = config.get("rope_parameters") or {}
    if float(config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0) != 1.0:
        found.append("partial_rotary_factor")
    found += [name for name in ("attn_logit_softcapping", "final_logit_softcapping") if config.get(name)]
    found += [name for name in ("use_bidirectional_attention",) if config.get(name)]
    if found:
        raise Refused(
            Problem(
                "architecture-unsupported",
                f"the config asks for {', '.join(found)}, which cannot be run yet",
                "config.json",
                f"this family is run with activation {activations[0]} and full rotary embeddings, without softcapping",
                "use a checkpoint without it",
            )
        )


def rope_of(config: Config, parameters: Mapping[str, Any] | None = None) -> Rope:
    """Return the rotary parameters, from `rope_parameters` (newer) or `rope_theta` and `rope_scaling`."""
    given = parameters if parameters is not None else config.get("rope_parameters")
    scaling = dict(given or config.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise Refused(
            Problem(
                "rope-unsupported",
                f"rotary embeddings of type {kind} cannot be run yet",
                "config.json: rope_scaling",
                "supported: default, linear, llama3, yarn",
            )
        )

    original = int(scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0)
    if kind == "yarn" and scaling.get("factor") is None and original:
        scaling["factor"] = float(config["max_position_embeddings"]) / original
    if kind != "default" and scaling.get("factor") is None:
        raise KeyError("rope_scaling.factor")
    if "full_attention" in scaling:
        raise ValueError("rope_parameters per layer type are read for Gemma 3 only")

    def number(name: str, default: float) -> float:
        value = scaling.get(name)
        return default if value is None else float(value)

    return Rope(
        theta=theta,
        kind=kind,
        factor=number("factor", 1.0),
        original_context=original,
        low_freq_factor=number("low_freq_factor", 1.0),
        high_freq_factor=number("high_freq_factor", 4.0),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=scaling.get("attention_factor"),
        mscale=scaling.get("mscale"),
        mscale_all_dim=scaling.get("mscale_all_dim"),
        truncate=bool(scaling.get("truncate", True)),
    )


def _common(
    architecture: str, family: str, config: Config, activations: tuple[str, ...] = ("silu", "swish")
) -> dict[str, Any]:
    _refuse_other_maths(config, activations)
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    eos = config.get("eos_token_id")
    return {
        "architecture": architecture,
        "family": family,
        "layers": int(config["num_hidden_layers"]),
        "hidden": int(config["hidden_size"]),
        "intermediate": int(config["intermediate_size"]),
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "vocab": int(config["vocab_size"]),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "context": int(config["max_position_embeddings"]),
        "rope": rope_of(config),
        "windows": (None,) * int(config["num_hidden_layers"]),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "attention_scale": head_dim**-0.5,
        "eos_ids": tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    }


def _llama(architecture: str, config: Config) -> DecoderSpec:
    bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    common = _common(architecture, "llama", config)
    return DecoderSpec(**common, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def _mistral(architecture: str, config: Config) -> DecoderSpec:
    common = _common(architecture, "mistral", config)
    common["windows"] = (config.get("sliding_window"),) * common["layers"]
    return DecoderSpec(**common)


def _qwen_windows(config: Config, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = int(config.get("max_window_layers", layers))
    return tuple(window if i >= first else None for i in range(layers))


def _qwen2(architecture: str, config: Config) -> DecoderSpec:
    common = _common(architecture, "qwen2", config)
    common["windows"] = _qwen_windows(config, common["layers"])
    return DecoderSpec(**common, qkv_bias=True)


def _qwen3(architecture: str, config: Config) -> DecoderSpec:
    common = _common(architecture, "qwen3", config)
    common["windows"] = _qwen_windows(config, common["layers"])
    bias = bool(config.get("attention_bias", False))
    return DecoderSpec(**common, qkv_bias=bias, o_bias=bias, qk_norm=True)


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
    common = _common(architecture, "gemma3", flat, ("gelu_pytorch_tanh", "gelu_tanh"))
    layers, window = common["layers"], text.get("sliding_window", 4096)
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
    common |= {
        "rope": rope,
        "windows": tuple(window if is_local else None for is_local in local),
        "attention_scale": scalar**-0.5,
    }
    return DecoderSpec(
        **common,
        rope_local=rope_local,
        qk_norm=True,
        norm_plus_one=True,
        post_norms=True,
        embedding_scale=common["hidden"] ** 0.5,
        activation="gelu_tanh",
    )


FAMILIES: dict[str, Callable[[str, Config], DecoderSpec]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3,
}
