"""Families with routed experts: Qwen3-MoE, Mixtral, DeepSeek-V2 and V3 (R1 is a V3)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from framework.errors import Problem, Refused
from framework.families.base import DecoderSpec, Mla, Moe, Rope
from framework.families.fields import Config, common


def qwen3_moe(architecture: str, config: Config) -> DecoderSpec:
    """Return a Qwen3-MoE: attention of Qwen3; layers can be dense by list or by step.

    Raises:
        Refused: `architecture-unsupported`, sliding windows, whose layers releases of transformers disagree about.
    """
    fields = common(architecture, "qwen3_moe", config)
    layers = fields["layers"]
    if config.get("use_sliding_window") and config.get("sliding_window"):
        raise _cannot("use_sliding_window", "this family is run with full attention in every layer")
    dense, step = config.get("mlp_only_layers") or (), int(config.get("decoder_sparse_step") or 1)
    moe = Moe(
        experts=_experts(config),
        top_k=int(config["num_experts_per_tok"]),
        intermediate=int(config["moe_intermediate_size"]),
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)),
        renormalize=bool(config.get("norm_topk_prob", False)),
    )
    bias = bool(config.get("attention_bias", False))
    return DecoderSpec(**fields, qkv_bias=bias, o_bias=bias, qk_norm=True, moe=moe)


def mixtral(architecture: str, config: Config) -> DecoderSpec:
    """Return a Mixtral: attention of Mistral, every layer routed, experts of `intermediate_size`."""
    fields = common(architecture, "mixtral", config)
    fields["windows"] = (config.get("sliding_window"),) * fields["layers"]
    moe = Moe(
        experts=_experts(config),
        top_k=int(config["num_experts_per_tok"]),
        intermediate=fields["intermediate"],
        layers=(True,) * fields["layers"],
    )
    return DecoderSpec(**fields, moe=moe)


def _experts(config: Config) -> int:
    """The count, under either of the names that releases of transformers write."""
    return int(config["num_experts"] if "num_experts" in config else config["num_local_experts"])


@dataclass(frozen=True, slots=True)
class _Routing:
    """How one generation of DeepSeek chooses: `methods` tells which of them group the experts."""

    scoring: str
    methods: dict[str, bool]
    group_best: int
    correction_bias: bool
    can_renormalize: bool


_V2 = _Routing("softmax", {"greedy": False, "group_limited_greedy": True}, 1, False, False)
_V3 = _Routing("sigmoid", {"noaux_tc": True}, 2, True, True)
_ROUTING = {"DeepseekV2ForCausalLM": _V2, "DeepseekV3ForCausalLM": _V3}


def deepseek(architecture: str, config: Config) -> DecoderSpec:
    """Return a DeepSeek-V2 or V3: latent attention, grouped experts with shared ones, the first layers dense.

    Raises:
        Refused: `architecture-unsupported`, a way to choose experts that this generation does not have.
    """
    routing = _ROUTING[architecture]
    mla = Mla(
        q_rank=None if config["q_lora_rank"] is None else int(config["q_lora_rank"]),
        kv_rank=int(config["kv_lora_rank"]),
        nope_dim=int(config["qk_nope_head_dim"]),
        rope_dim=int(config["qk_rope_head_dim"]),
        v_dim=int(config["v_head_dim"]),
        interleaved=bool(config.get("rope_interleave", True)),
    )
    # head_dim in newer files is that of the rotated part
    head_dim = mla.nope_dim + mla.rope_dim
    heads = int(config["num_attention_heads"])
    fields = common(architecture, "deepseek", {**config, "head_dim": head_dim, "num_key_value_heads": heads})
    fields["attention_scale"] *= _yarn_scale(fields["rope"])
    method = str(config.get("topk_method") or next(iter(routing.methods)))
    renormalize = bool(config.get("norm_topk_prob", routing.can_renormalize))
    _refuse_other_routing(config, routing, method, renormalize=renormalize)
    grouped = routing.methods[method]
    first, step = int(config["first_k_dense_replace"]), int(config.get("moe_layer_freq") or 1)
    moe = Moe(
        experts=int(config["n_routed_experts"]),
        top_k=int(config["num_experts_per_tok"]),
        intermediate=int(config["moe_intermediate_size"]),
        layers=tuple(i >= first and i % step == 0 for i in range(fields["layers"])),
        shared_intermediate=int(config["moe_intermediate_size"]) * int(config.get("n_shared_experts") or 0),
        scoring=routing.scoring,
        renormalize=renormalize,
        scaling=float(config.get("routed_scaling_factor", 1.0)),
        groups=int(config.get("n_group") or 1) if grouped else 1,
        top_groups=int(config.get("topk_group") or 1) if grouped else 1,
        group_best=routing.group_best,
        correction_bias=routing.correction_bias,
    )
    bias = bool(config.get("attention_bias", False))
    drafts = int(config.get("num_nextn_predict_layers") or 0)
    return DecoderSpec(**fields, qkv_bias=bias, o_bias=bias, moe=moe, mla=mla, draft_layers=drafts)


def _yarn_scale(rope: Rope) -> float:
    """Factor on the scale of attention: the square of yarn's mscale over all dimensions (DeepSeek's modeling)."""
    if rope.kind == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return float(0.1 * rope.mscale_all_dim * log(rope.factor) + 1.0) ** 2


def _refuse_other_routing(config: Config, routing: _Routing, method: str, *, renormalize: bool) -> None:
    scoring = config.get("scoring_func") or routing.scoring
    found = [f"scoring_func {scoring}"] if scoring != routing.scoring else []
    found += [f"topk_method {method}"] if method not in routing.methods else []
    found += ["norm_topk_prob"] if renormalize and not routing.can_renormalize else []
    if found:
        rule = f"this family chooses experts by {routing.scoring} and {' or '.join(routing.methods)}"
        raise _cannot(", ".join(found), rule)


def _cannot(what: str, why: str) -> Refused:
    return Refused(
        Problem(
            "architecture-unsupported",
            f"the config asks for {what}, which cannot be run yet",
            "config.json",
            why,
            "use a checkpoint without it",
        )
    )
