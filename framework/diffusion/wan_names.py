"""Wan's own names of weights to those of diffusers, rule by rule, anchored at both ends."""

from __future__ import annotations

import re

# What may follow a module's name: tensors of a quantized or float linear, norm or convolution.
_SUFFIXES = (
    "weight", "bias", "weight_scale", "weight_offset", "input_scale", "input_offset", "deq_scale", "quant_bias",
    "weight_dual_scale", "mul_scale", "svd_lowrank_l1", "svd_lowrank_l2",
)  # fmt: skip
_MODULES = (
    (r"patch_embedding", r"patch_embedding"),
    (r"text_embedding\.0", r"condition_embedder.text_embedder.linear_1"),
    (r"text_embedding\.2", r"condition_embedder.text_embedder.linear_2"),
    (r"time_embedding\.0", r"condition_embedder.time_embedder.linear_1"),
    (r"time_embedding\.2", r"condition_embedder.time_embedder.linear_2"),
    (r"time_projection\.1", r"condition_embedder.time_proj"),
    (r"img_emb\.proj\.0", r"condition_embedder.image_embedder.norm1"),
    (r"img_emb\.proj\.1", r"condition_embedder.image_embedder.ff.net.0.proj"),
    (r"img_emb\.proj\.3", r"condition_embedder.image_embedder.ff.net.2"),
    (r"img_emb\.proj\.4", r"condition_embedder.image_embedder.norm2"),
    (r"head\.head", r"proj_out"),
    (r"blocks\.(\d+)\.self_attn\.([qkv])", r"blocks.\1.attn1.to_\2"),
    (r"blocks\.(\d+)\.self_attn\.o", r"blocks.\1.attn1.to_out.0"),
    (r"blocks\.(\d+)\.self_attn\.norm_([qk])", r"blocks.\1.attn1.norm_\2"),
    (r"blocks\.(\d+)\.cross_attn\.([qkv])", r"blocks.\1.attn2.to_\2"),
    (r"blocks\.(\d+)\.cross_attn\.o", r"blocks.\1.attn2.to_out.0"),
    (r"blocks\.(\d+)\.cross_attn\.norm_([qk])", r"blocks.\1.attn2.norm_\2"),
    (r"blocks\.(\d+)\.cross_attn\.([kv])_img", r"blocks.\1.attn2.add_\2_proj"),
    (r"blocks\.(\d+)\.cross_attn\.norm_k_img", r"blocks.\1.attn2.norm_added_k"),
    (r"blocks\.(\d+)\.norm3", r"blocks.\1.norm2"),  # the affine one, before cross-attention
    (r"blocks\.(\d+)\.norm2", r"blocks.\1.norm3"),
    (r"blocks\.(\d+)\.ffn\.0", r"blocks.\1.ffn.net.0.proj"),
    (r"blocks\.(\d+)\.ffn\.2", r"blocks.\1.ffn.net.2"),
)
# Whole names: tables, and what quantized attention keeps beside its linears.
_WHOLE = (
    (r"img_emb\.emb_pos", r"condition_embedder.image_embedder.pos_embed"),
    (r"head\.modulation", r"scale_shift_table"),
    (r"blocks\.(\d+)\.modulation", r"blocks.\1.scale_shift_table"),
    (r"blocks\.(\d+)\.self_attn\.(q_rot|k_rot|quant_type|fa3_[qkv]\..+)", r"blocks.\1.attn1.\2"),
    (r"blocks\.(\d+)\.cross_attn\.(q_rot|k_rot|quant_type|fa3_[qkv]\..+)", r"blocks.\1.attn2.\2"),
)
_RULES = [
    *((re.compile(rf"{old}\.(?P<suffix>{'|'.join(_SUFFIXES)})"), rf"{new}.\g<suffix>") for old, new in _MODULES),
    *((re.compile(old), new) for old, new in _WHOLE),
]
# A smoothed linear stands one level deeper, its factor beside it.
_WRAPPED = re.compile(r"(.+)\.(?:linear\.(.+)|div\.(mul_scale))")


def diffusers_name(name: str) -> str | None:
    """Return the name of a tensor, or of an entry of the description, in diffusers' words; None if no rule has it."""
    wrapped = _WRAPPED.fullmatch(name)
    if wrapped:
        name = f"{wrapped[1]}.{wrapped[2] or wrapped[3]}"
    for pattern, new in _RULES:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(new)
    return None
