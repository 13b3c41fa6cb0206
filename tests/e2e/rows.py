"""Which checkpoint runs each row of the support table that judges language models, typed by hand.

A checkpoint is a golden folder (written by the row's real tool) or a maker of `made.py`. One that holds several rows is
loaded once for all of them.
"""

from dataclasses import dataclass

from tests.e2e.made import (
    AUTO8_CONFIG,
    AWQ4,
    AWQ8_CONFIG,
    GPTQ8,
    INT4_CONFIG,
    PACKED_CONFIG,
    WORDS,
    awq4,
    declared_int8,
    gptq8,
    online,
    quantized,
    relabelled,
    repacked,
    static_tensors,
    to_auto_round,
    to_awq8,
    to_float,
    to_gptq,
    to_packed,
    to_w4a16,
    to_w8a16,
    with_ranks,
)


@dataclass(frozen=True)
class Run:
    """A golden folder or a maker, and what the recipe says besides."""

    source: object
    overrides: tuple[str, ...] = ()


def asking(pattern, scheme, *more):
    """The recipe's rule that gives modules a scheme."""
    return (f'quantization.layers=[{{pattern: "{pattern}", scheme: {scheme}}}]', *more)


DENSE, MOE = "tiny-qwen3/", "tiny-qwen3-moe/"
BASE = "tiny-qwen3/base"


def at_load(source, scheme):
    """A float checkpoint quantized at load."""
    return Run(online(source, scheme), asking("*_proj", scheme, "quantization.online=true"))


FIVE_TYPES = Run(DENSE + "modelslim-mixed")
TWO_STAGE = Run(with_ranks(MOE + "modelslim-w4a8-dynamic-g64", 127))
MX = Run(MOE + "modelslim-mxfp4")
GPTQ_8 = Run(GPTQ8)
GPTQ_4 = Run(repacked(AWQ4, awq4, to_gptq(4), {"quant_method": "gptq", "checkpoint_format": "gptq"} | WORDS))
AWQ_4 = Run(AWQ4)
AWQ_8 = Run(repacked(GPTQ8, gptq8, to_awq8, AWQ8_CONFIG))
AUTO_4 = Run(repacked(AWQ4, awq4, to_auto_round(4), AUTO8_CONFIG | WORDS))
AUTO_8 = Run(repacked(GPTQ8, gptq8, to_auto_round(8), AUTO8_CONFIG))
INT8_GROUPS = Run(repacked(GPTQ8, gptq8, to_w8a16, label="W8A16"))
THREE_GROUPS = Run(DENSE + "ct-mixed")
INT8 = Run(quantized("experts", "w8a8_dynamic", "W8A8_DYNAMIC"))
AT_LOAD = {scheme: at_load("experts", scheme) for scheme in ("w8a8_dynamic", "w4a16", "w8a16", "mxfp8")}

ROWS = {
    "modelslim.w4a4_dynamic.linear": Run(with_ranks(DENSE + "modelslim-w4a4-dynamic-packed", 7)),
    "modelslim.w8a8_static.linear": Run(DENSE + "modelslim-w8a8-smooth-asym"),
    "modelslim.w8a8_dynamic.linear": FIVE_TYPES,
    "modelslim.mxfp8.linear": MX,
    "modelslim.mxfp4.linear": Run(quantized(BASE, "mxfp4", "W4A4_MXFP4")),
    "modelslim.w4a4_dynamic.moe": Run(quantized("experts", "w4a4_dynamic", "W4A4_DYNAMIC")),
    "modelslim.w4a8_dynamic.moe": TWO_STAGE,
    "modelslim.w8a8_dynamic.moe": INT8,
    "modelslim.mxfp8.moe": Run(quantized("experts", "mxfp8", "W8A8_MXFP8")),
    "modelslim.w8a16.linear": INT8_GROUPS,
    "modelslim.w8a16.moe": INT8_GROUPS,
    "modelslim.w4a16.linear": Run(DENSE + "modelslim-w4a16-g64"),
    "modelslim.w4a16.moe": Run(repacked(AWQ4, awq4, to_w4a16, label="W4A16")),
    "modelslim.w4a8_dynamic.linear": TWO_STAGE,
    "modelslim.w8a8_mix.linear": Run(relabelled(DENSE + "modelslim-mixed", "W8A8_DYNAMIC", "W8A8_MIX", static_tensors)),
    "modelslim.w4a8_mxfp.linear": Run(quantized(BASE, "w4a8_mxfp", "W4A8_MXFP")),
    "modelslim.w4a8_mxfp.moe": Run(quantized("experts", "w4a8_mxfp", "W4A8_MXFP")),
    "modelslim.mxfp4.moe": MX,
    "modelslim.mxfp4_dualscale.linear": Run(quantized(BASE, "mxfp4_dualscale", "W4A4_MXFP4_DUALSCALE")),
    "awq.w4a16.linear": AWQ_4,
    "awq.w8a16.linear": AWQ_8,
    "awq.w4a16.moe": AWQ_4,
    "awq.w8a16.moe": AWQ_8,
    "gptq.w4a16.linear": GPTQ_4,
    "gptq.w8a16.linear": GPTQ_8,
    "gptq.w4a16.moe": GPTQ_4,
    "gptq.w8a16.moe": GPTQ_8,
    "auto_round.w4a16.linear": AUTO_4,
    "auto_round.w8a16.linear": AUTO_8,
    "auto_round.w4a16.moe": AUTO_4,
    "auto_round.w8a16.moe": AUTO_8,
    "compressed_tensors.w8a8_dynamic.linear": THREE_GROUPS,
    "compressed_tensors.w8a8_static.linear": Run(DENSE + "ct-w8a8-static-1l"),
    "compressed_tensors.w4a8_dynamic.linear": Run(quantized(BASE, "w4a8_dynamic", config=INT4_CONFIG)),
    "compressed_tensors.w4a8_dynamic.moe": Run(MOE + "ct-w4a8-channel-1l"),
    "compressed_tensors.w8a8_dynamic.moe": Run(declared_int8(MOE + "ct-w4a8-channel-1l")),
    "compressed_tensors.w4a16.linear": THREE_GROUPS,
    "compressed_tensors.w4a16.moe": Run(MOE + "ct-w4a16-g128-1l"),
    "compressed_tensors.w8a16.linear": THREE_GROUPS,
    "compressed_tensors.w8a16.moe": Run(repacked(GPTQ8, gptq8, to_packed, PACKED_CONFIG)),
    "gguf.all.linear": Run(DENSE + "gguf-q4_k_m"),
    "gguf.all.moe": Run(MOE + "gguf-q4_k_m-1l"),
    "gguf.w4a16.linear": Run(DENSE + "gguf-q4_0-split-1l", asking("*_proj", "w4a16")),
    "gguf.w8a16.linear": Run(MOE + "gguf-mxfp4_moe-1l", asking("*.self_attn.*", "w8a16")),
    "none.float.linear": Run(BASE),
    "none.float.moe": Run(repacked(GPTQ8, gptq8, to_float)),
    "online.mxfp4.linear": at_load(BASE, "mxfp4"),
} | {f"online.{scheme}.{layers}": run for scheme, run in AT_LOAD.items() for layers in ("linear", "moe")}
