"""Checkpoints that are wrong in one thing end in one problem that names it and a way out, never in a traceback."""

import pytest

from tests.checkpoints import DESCRIPTION, MOE
from tests.planning.malformed import (
    DOWN,
    LAYER,
    Q,
    config,
    cut,
    damaged,
    described,
    document,
    drop,
    expect,
    group,
    held,
    indexed,
    of,
    put,
    quantization,
    rename,
    replaced,
    retype,
    tools,
    twice,
    weights,
    without,
)  # fmt: skip

W8, W8_MOE = held("modelslim", "w8a8_dynamic"), held("modelslim", "w8a8_dynamic", MOE)
FLOAT, FLOAT_MOE = held("none", "float"), held("none", "float", MOE)
AWQ, GPTQ, AUTO = held("awq", "w4a16"), held("gptq", "w4a16"), held("auto_round", "w4a16")
AWQ_MOE, GPTQ_MOE = held("awq", "w4a16", MOE), held("gptq", "w4a16", MOE)
CT = held("compressed_tensors", "w8a8_dynamic")
EXPERT3 = rf"{LAYER}mlp.experts.3.gate_proj"
TBD = "capability.allow=[tbd]"
SHARDS = {"shard_bytes": 400_000}
SECOND = "model-00002-of-"

# what makes the checkpoint, the exit status, the codes, words of the message, overrides
CASES = {
    # the description of ModelSlim
    "no entry for codes": (of(W8, described(f"{Q}.weight", None)), 1, "description-missing",
        [f"{Q}.weight", "no entry"]),
    "codes that are said to be float": (
        of(W8, described(f"{Q}.weight", "FLOAT")), 1, "description-missing", [f"{Q}.weight", "FLOAT", "I8"]),
    "float that is said to be codes": (
        of(W8, put(f"{Q}.weight", "BF16", 256, 256)), 1, "description-missing", [f"{Q}.weight", "BF16"]),
    "an unknown quant_type": (
        of(W8, described(f"{Q}.*", "W8A8_DYNAMICS")), 1, "quant-type-unknown", [Q, "is W8A8_DYNAMIC meant?"]),
    "a quant_type that is refused": (
        of(W8, described(f"{Q}.*", "W4A4_FLATQUANT_DYNAMIC")), 1, "quant-type-unknown", [Q, "FlatQuant"]),
    "a quant_type that is a number": (of(W8, described(f"{Q}.weight", 8)), 1, "file-malformed", [f"{Q}.weight", "8"]),
    "a quant_type that is null": (of(W8, quantization(**{f"{Q}.weight": None})), 1, "file-malformed", [f"{Q}.weight"]),
    "an embedding that is quantized": (
        of(W8, described(r"model\.embed_tokens\.weight", "W8A8_DYNAMIC"),
           put("model.embed_tokens.weight", "I8", 512, 256)), 1,
        "embedding-quantized tensor-dtype", ["model.embed_tokens"]),
    "half a scale": (of(W8, drop(rf"{Q}\.weight_offset")), 1, "tensor-missing", [f"{Q}.weight_offset"]),
    "half of the fused projections": (
        of(W8, drop(rf"{LAYER}self_attn\.k_proj\.weight_scale")), 1, "tensor-missing", ["k_proj.weight_scale"]),
    "a description of another model": (
        of(W8, quantization(**{"model.layers.9.mlp.up_proj.weight": "W8A8"})), 1, "description-missing",
        ["model.layers.9.mlp.up_proj.weight"]),
    "expert 3 unlike expert 0": (
        of(W8_MOE, described(rf"{EXPERT3}\..*", "FLOAT"), put(f"{EXPERT3}.weight", "BF16", 128, 256),
           drop(rf"{EXPERT3}\.weight_(scale|offset)")), 1, "experts-differ", ["expert 3", "expert 0"]),
    "a missing expert": (
        of(W8_MOE, drop(rf"{LAYER}mlp\.experts\.3\..*"), described(rf"{LAYER}mlp\.experts\.3\..*", None)), 1,
        "tensor-missing " * 3, ["experts.3"]),
    "two descriptions": (
        of(W8, document("quant_model_description_w4a4.json", {}), lambda c: c.documents.update(
            {"quant_model_description_w8a8.json": c.documents.pop(DESCRIPTION)})), 1, "format-conflict",
        ["quant_model_description_w4a4.json", "quant_model_description_w8a8.json"]),
    "a second description that disagrees": (
        of(W8, document("quant_model_description_old.json", {f"{Q}.weight": "W4A4_DYNAMIC"})), 1, "format-conflict",
        ["quant_model_description_old.json", DESCRIPTION]),
    "no description": (
        of(W8, lambda c: c.documents.clear()), 2, "description-absent", [DESCRIPTION, ".weight_offset"]),
    "description and quantization_config that disagree": (
        of(W8, config(quantization_config={"quant_method": "awq", "bits": 4})), 1, "format-conflict",
        ["modelslim", "awq", "quantization.format=modelslim"]),
    "a description that is a list": (of(W8, document(DESCRIPTION, ["W8A8"])), 2, "file-malformed", [DESCRIPTION]),
    "online rotations": (of(W8, put(f"{Q}.heads_rotation", "F32", 8, 8)), 1, "format-feature tensor-unexpected",
                         ["rotated", f"{Q}.heads_rotation"]),
    # the container
    "wrong shard in the index": (
        damaged(FLOAT, indexed(lambda m: m.update({"model.norm.weight": min(m.values())})), **SHARDS), 2, "weight-map",
        ["model.norm.weight"]),
    "a tensor that no shard has": (
        damaged(FLOAT, indexed(lambda m: m.update({"model.extra.weight": min(m.values())})), **SHARDS), 2, "weight-map",
        ["model.extra.weight", "no file has it"]),
    "an index that leaves the folder": (
        damaged(FLOAT, indexed(lambda m: m.update({"model.norm.weight": "../x.safetensors"})), **SHARDS),
        2, "weight-map",
        ["../x.safetensors"]),
    "an index of numbers": (
        damaged(FLOAT, indexed(lambda m: m.update({"model.norm.weight": 1})), **SHARDS), 2, "file-malformed",
        ["weight_map"]),
    "a missing shard": (
        damaged(FLOAT, lambda f: next(f.glob(f"{SECOND}*")).unlink(), **SHARDS), 2, "file-missing", [SECOND]),
    "a header that ends early": (damaged(FLOAT, cut("model.safetensors", 100)), 2, "file-truncated",
        ["model.safetensors"]),
    "data that end early": (damaged(FLOAT, cut("model.safetensors", 100_000)), 2, "file-truncated",
        ["model.safetensors"]),
    "an empty file": (damaged(FLOAT, cut("model.safetensors", 0)), 2, "file-truncated", ["model.safetensors"]),
    "a header that is no JSON": (
        damaged(FLOAT, replaced("model.safetensors", b'{"__metadata__"', b'{"__metadata__,')), 2, "file-malformed",
        ["JSON"]),
    "a tensor twice in one file": (
        damaged(FLOAT, replaced("model.safetensors", b'"model.layers.1.input_', b'"model.layers.0.input_')), 2,
        "file-malformed", ["twice"]),
    "a tensor in two files": (damaged(FLOAT, twice), 2, "file-malformed", ["model.norm.weight", "model.safetensors"]),
    "an unknown dtype": (
        damaged(FLOAT, replaced("model.safetensors", b'"BF16"', b'"BF17"')), 2, "file-malformed", ["BF17"]),
    "no weights": (damaged(FLOAT, lambda f: (f / "model.safetensors").unlink()), 2, "file-missing", ["no weights"]),
    "pickled weights": (
        damaged(FLOAT, lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")), 2, "pickle-refused",
        ["pytorch_model.bin"]),
    # tensors and config
    "a wrong dtype": (of(FLOAT, retype(f"{Q}.weight", "F64")), 1, "tensor-dtype", [f"{Q}.weight", "F64"]),
    "a shape that is wrong by one": (
        of(FLOAT, put(f"{DOWN}.weight", "F16", 256, 511)), 1, "tensor-shape",
        [f"{DOWN}.weight", "[256, 511]", "[256, 512]"]),
    "a scale that is wrong by one": (
        of(W8, put(f"{Q}.weight_scale", "F32", 255, 1)), 1, "tensor-shape", [f"{Q}.weight_scale", "[255, 1]"]),
    "a tensor of no module": (of(FLOAT, put(f"{LAYER}mlp.spare.weight", "F16", 4)), 1, "tensor-unexpected",
        ["mlp.spare"]),
    "a misspelt tensor": (
        of(FLOAT, rename("model.norm.weight", "model.nrom.weight")), 1, "tensor-missing tensor-unexpected",
        ["model.nrom.weight"]),
    "an unknown architecture": (
        of(FLOAT, config(architectures=["Qwen4ForCausalLM"])), 1, "architecture-unsupported", ["Qwen3ForCausalLM"]),
    "no config": (damaged(FLOAT, lambda f: (f / "config.json").unlink()), 2, "config-missing", ["config.json"]),
    "a config that is a list": (
        damaged(FLOAT, lambda f: (f / "config.json").write_text("[]")), 2, "file-malformed", ["config.json"]),
    "a config without a size": (of(FLOAT, without("num_attention_heads")), 2, "config-key", ["num_attention_heads"]),
    "a size that is text": (of(FLOAT, config(hidden_size="wide")), 2, "config-value", ["wide"]),
    "heads that do not divide": (of(FLOAT, config(num_key_value_heads=3)), 2, "config-value",
        ["8 query heads", "3 KV"]),
    "rotary embeddings of another kind": (
        of(FLOAT, config(rope_scaling={"rope_type": "longrope"})), 1, "rope-unsupported", ["longrope"]),
    "an unknown activation": (of(FLOAT, config(hidden_act="relu")), 1, "architecture-unsupported", ["relu"]),
    "more experts than the file has": (
        of(FLOAT_MOE, config(num_experts=9)), 1, "tensor-missing " * 3 + "tensor-shape",
        ["experts.8"]),
    "fewer experts than the file has": (
        of(FLOAT_MOE, config(num_experts=7)), 1, "tensor-unexpected " * 3 + "tensor-shape",
        ["experts.*.gate_proj", "[7, 256]"]),
    "more experts a token than there are": (of(FLOAT_MOE, config(num_experts_per_tok=9)), 2, "config-value", ["9"]),
    # AWQ, GPTQ, auto-round
    "8 bits of AWQ and no byte order": (
        of(tools("tiny-qwen3/awq-w8g128-interleaved")), 1, "awq-byte-order", ["interleaved"]),
    "AWQ of another version": (of(AWQ, quantization(version="gemv_fast")), 1, "format-feature", ["gemv_fast"]),
    "AWQ of 3 bits": (of(AWQ, quantization(bits=3)), 1, "format-feature", ["3 bits"]),
    "a group size that is text": (of(AWQ, quantization(group_size="big")), 1, "file-malformed",
        ["group_size", "'big'"]),
    "a group size below -1": (
        of(GPTQ, quantization(group_size=-2)), 1, "file-malformed " + "tensor-shape " * 13, ["group_size", "-2"]),
    "another group size than the scales": (
        of(GPTQ, quantization(group_size=64)), 1, "tensor-shape " * 13, ["q_proj.scales", "q_proj.qzeros"]),
    "a rule that is no expression": (of(GPTQ, quantization(dynamic={"+:(": {"bits": 8}})), 1, "file-malformed",
        ["'+:('"]),
    "GPTQ for Marlin": (of(GPTQ, quantization(checkpoint_format="marlin")), 1, "format-feature", ["marlin"]),
    "auto-round of another packing": (
        of(AUTO, quantization(packing_format="auto_round:hpu")), 1, "format-feature", ["hpu"]),
    "auto-round with quantized activations": (of(AUTO, quantization(act_bits=8)), 1, "format-feature", ["8 bits"]),
    "a method that nobody reads": (
        of(FLOAT, config(quantization_config={"quant_method": "bitsandbytes"})), 1, "format-unsupported",
        ["bitsandbytes"]),
    "codes of one expert that are missing": (
        of(AWQ_MOE, drop(rf"{LAYER}mlp\.experts\.3\.up_proj\.qweight")), 1, "tensor-missing",
        ["experts.3.up_proj.qweight"]),
    "one expert of other bits": (
        of(GPTQ_MOE, quantization(dynamic={r"+:.*layers\.0\.mlp\.experts\.3\.gate_proj": {"bits": 8}})), 1,
        "experts-differ tensor-shape tensor-shape", ["expert 3", "8 bits"]),
    # compressed-tensors
    "groups that are a list": (of(CT, quantization(config_groups=[])), 1, "description-missing file-malformed",
        ["config_groups"]),
    "a width that is text": (of(CT, weights(num_bits="8")), 1, "file-malformed", ["num_bits", "'8'"]),
    "a strategy that nobody knows": (of(CT, weights(strategy="diagonal")), 1, "quant-type-unknown", ["diagonal"]),
    "a sparse checkpoint": (
        of(CT, quantization(sparsity_config={"format": "sparse-24-bitmask"})), 1, "format-feature",
        ["sparsity_config"]),
    "a target that is no expression": (of(CT, group(targets=["re:(", "Linear"])), 1, "file-malformed", ["re:("]),
    "a group that no module belongs to": (
        of(CT, group(targets=["Conv2d"])), 1, "description-missing", ["no group"]),
    "saved without compression": (
        of(FLOAT, config(quantization_config=CT().declared)), 1, "description-missing", ["float in the file"]),
    "fp8 of compressed-tensors": (of(CT, weights(type="float")), 1, "format-feature", ["8-bit float"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_checkpoint_is_refused_for_what_is_wrong(case, check):
    make, status, codes, words, *overrides = CASES[case]
    expect(check(make, *(overrides or [TBD])), status, codes, words)
