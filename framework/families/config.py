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
    architecture = (list(config.get("architectures") or []) or [str(config.get("model_type"))])[0]
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
        return build(architecture, config)
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
    except (TypeError, ValueError) as error:
        raise InputError(
            Problem("config-value", f"a value in the config is unusable: {error}", "config.json")
        ) from error


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

    def number(name: str, default: float) -> float:
        value = scaling.get(name)
        return default if value is None else float(value)

    return Rope(
        theta=theta,
        kind=kind,
        factor=number("factor", 1.0),
        original_context=int(
            scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0
        ),
        low_freq_factor=number("low_freq_factor", 1.0),
        high_freq_factor=number("high_freq_factor", 4.0),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=scaling.get("attention_factor"),
        mscale=scaling.get("mscale"),
        mscale_all_dim=scaling.get("mscale_all_dim"),
        truncate=bool(scaling.get("truncate", True)),
    )


def _common(architecture: str, family: str, config: Config) -> dict[str, Any]:
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
        "context": int(config.get("max_position_embeddings") or 2048),
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
    text.setdefault("head_dim", 256)
    text.setdefault("num_attention_heads", 8)
    text.setdefault("num_key_value_heads", 4)
    text.setdefault("vocab_size", 262208)
    text.setdefault("eos_token_id", config.get("eos_token_id"))
    common = _common(architecture, "gemma3", text)
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
