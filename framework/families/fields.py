"""What the readers of configs share: the fields of every decoder, rotary parameters, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framework.errors import Problem, Refused
from framework.families.base import MOST_LAYERS, Rope

Config = Mapping[str, Any]


def refuse_other_maths(config: Config, activations: tuple[str, ...]) -> None:
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
                "use a checkpoint with one of these",
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


def common(
    architecture: str, family: str, config: Config, activations: tuple[str, ...] = ("silu", "swish")
) -> dict[str, Any]:
    refuse_other_maths(config, activations)
    layers = int(config["num_hidden_layers"])
    if layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers}")
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    eos = config.get("eos_token_id")
    return {
        "architecture": architecture,
        "family": family,
        "layers": layers,
        "hidden": int(config["hidden_size"]),
        "intermediate": int(config["intermediate_size"]),
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "vocab": int(config["vocab_size"]),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "context": int(config["max_position_embeddings"]),
        "rope": rope_of(config),
        "windows": (None,) * layers,
        "tied": bool(config.get("tie_word_embeddings", False)),
        "attention_scale": head_dim**-0.5,
        "eos_ids": tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    }


def qwen_windows(config: Config, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = int(config.get("max_window_layers", layers))
    return tuple(window if i >= first else None for i in range(layers))
