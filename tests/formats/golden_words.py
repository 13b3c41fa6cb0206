"""What the golden READMEs say of each folder of AWQ, GPTQ and auto-round."""

FORMATS = {"awq": "awq", "gptq": "gptq", "ar": "auto_round"}
OPTIONS = {"tiny-qwen3/awq-w8g128-interleaved": {"awq_byte_order": "interleaved"}}
G32, G64, G128 = (4, 32, True), (4, 64, True), (4, 128, True)
# of each folder of the golden README: bits, group (0: a row) and symmetry of the modules that a part of a name
# selects, first match (None: float); all others are float
EXPECTED = {
    "tiny-qwen3/awq-w4-channel": {"_proj": (4, 0, False)},
    "tiny-qwen3/awq-w4g128": {"_proj": (4, 128, False)},
    "tiny-qwen3/awq-w4g64-skip": {"o_proj": None, "_proj": (4, 64, False)},
    "tiny-qwen3/awq-w8g128": {"_proj": (8, 128, False)},
    "tiny-qwen3/awq-w8g128-interleaved": {"_proj": (8, 128, False)},
    "tiny-qwen3-moe/awq-w4g64": {"_proj": (4, 64, False)},
    "tiny-qwen3-moe-wide/awq-w4g128": {"_proj": (4, 128, False)},
    "tiny-qwen3/gptq-w4g128-sym": {"_proj": G128},
    "tiny-qwen3/gptq-w4g32-asym-descact": {"_proj": (4, 32, False)},
    "tiny-qwen3/gptq-v2-w4g64-asym": {"_proj": (4, 64, False)},
    "tiny-qwen3/gptq-w4g64-asym-zero0": {"_proj": (4, 64, False)},
    "tiny-qwen3/gptq-w4-channel-sym": {"_proj": (4, 0, True)},
    "tiny-qwen3/gptq-w8g128-sym": {"_proj": (8, 128, True)},
    "tiny-qwen3/gptq-w4g128-lmhead": {"lm_head": (8, 32, True), "_proj": G128},
    "tiny-qwen3/gptq-dynamic": {
        "0.self_attn.k_proj": None, "0.self_attn.v_proj": None, "1.mlp": (8, 64, True), "1.self_attn.o_proj": G32,
        "_proj": G128},
    "tiny-qwen3-moe/gptq-w4g64-sym": {"_proj": G64},
    "tiny-qwen3-moe/gptq-w8g64-sym": {"_proj": (8, 64, True)},
    "tiny-qwen3-moe-wide/gptq-w4g128-asym": {"_proj": (4, 128, False)},
    "tiny-qwen3/ar-w4g128-gptq": {"_proj": G128},
    "tiny-qwen3/ar-w8g128-gptq": {"_proj": (8, 128, True)},
    "tiny-qwen3/ar-w4g128-awq-asym": {"_proj": (4, 128, False)},
    "tiny-qwen3/ar-w4g64-awq-sym": {"_proj": G64},
    "tiny-qwen3/ar-w4g64-gptq-asym": {"_proj": (4, 64, False)},
    "tiny-qwen3/ar-mixed": {
        "0.self_attn.o": G128, "0.self_attn": None, "1.mlp.down": (8, 64, True), "lm_head": (8, 128, True),
        "_proj": G128},
    "tiny-qwen3-moe/ar-w4g64-gptq": {"_proj": G64},
    "tiny-qwen3-moe/ar-w8g64-gptq": {"_proj": (8, 64, True)},
    "tiny-qwen3-moe-wide/ar-w4g128-awq-asym": {"_proj": (4, 128, False)},
}  # fmt: skip


def format_of(folder):
    return FORMATS[folder.split("/")[1].split("-")[0]]
