"""Recipes that are wrong, or ask what a checkpoint, the table, an op or the ranks cannot give: one problem says so."""

import pytest

from tests.checkpoints import DENSE, MOE
from tests.planning.malformed import (
    DOWN,
    LAYER,
    Q,
    copied,
    described,
    drop,
    expect,
    held,
    of,
    put,
    quantization,
    replaced,
)  # fmt: skip

W8, W8_MOE = held("modelslim", "w8a8_dynamic"), held("modelslim", "w8a8_dynamic", MOE)
FLOAT, FLOAT_MOE = held("none", "float"), held("none", "float", MOE)
MXFP8, DUAL = held("modelslim", "mxfp8"), held("modelslim", "mxfp4_dualscale")
GPTQ = held("gptq", "w4a16")
GGUF = "tiny-qwen3/gguf-q4_k_m"
WAN = "diffusion/tiny-wan2.2"


def rules(*pairs):
    """An override: ordered patterns and schemes."""
    layers = ", ".join(f'{{pattern: "{pattern}", scheme: {scheme}}}' for pattern, scheme in pairs)
    return f"quantization.layers=[{layers}]"


ONLINE = "quantization.online=true"
# what makes the checkpoint, overrides, the exit status, the codes, words of the message
ASKED = {
    # patterns
    "a pattern of no module": (
        W8, [rules(("*.ffn.*", "float"))], 1, "pattern-unmatched", ["*.ffn.*", f"for example {Q}"]),
    "a misspelt folder in a pattern": (
        W8, [rules(("*.mpl.*", "float"))], 1, "pattern-unmatched", ["pattern: *.mlp.*"]),
    "a misspelt pattern": (W8, [rules(("*.down_porj", "float"))], 1, "pattern-unmatched", ["down_porj", "down_proj"]),
    "a pattern that never decides": (
        W8, [rules(("*", "auto"), ("*.down_proj", "float"))], 1, "pattern-shadowed", ["*.down_proj", "move it up"]),
    "the same pattern twice": (
        W8, [rules(("*.down_proj", "float"), ("*.down_proj", "w8a16"))], 1, "pattern-shadowed", ["*.down_proj"]),
    "a pattern that splits experts": (
        W8_MOE, [rules(("*.experts.3.*", "float"))], 1, "pattern-experts",
        ["1 of the experts", "and 5 more", "*.experts.3.*"]),
    "an expression that does not compile": (W8, [rules(("re:(", "float"))], 1, "pattern-syntax", ["re:("]),
    "a scheme that the codes cannot serve": (
        W8, [rules(("*.0.*q_proj", "mxfp8"))], 1, "scheme-mismatch", [Q, "mxfp8", "w8a8_dynamic"]),
    "codes asked of a float file": (
        FLOAT, [rules(("*.down_proj", "w8a8_dynamic"))], 1, "scheme-mismatch", [DOWN, "scheme: float"]),
    # quantization at load
    "online on a quantized file": (
        W8, [ONLINE, "capability.allow=[tbd]", rules(("*.mlp.*", "w8a8_dynamic"))], 1,
        "online-quantized", [f"{LAYER}mlp.gate_proj", "quantization.online=false"]),
    "online with auto": (FLOAT, [ONLINE, rules(("*.mlp.*", "auto"))], 1, "online-auto", ["*.mlp.*", "must be named"]),
    "online of the router": (
        FLOAT_MOE, [ONLINE, rules(("*.mlp.gate", "w8a8_dynamic"))], 1, "online-float", ["*.mlp.gate", "mlp.gate"]),
    "online of a scheme without a row": (
        FLOAT, [ONLINE, rules(("*.mlp.*", "w8a8_static"))], 1, "row-unknown",
        ["w8a8_static", "schemes that run on a2"]),
    # the support table
    "a tier that does not run it": (MXFP8, [], 1, "row-unsupported", ["mxfp8", "a2", "hardware=a5"]),
    "a row that nobody has confirmed": (
        held("modelslim", "w8a16"), [], 1, "row-tbd", ["w8a16", "capability.allow=[tbd]"]),
    "a row that is being worked on": (
        held("modelslim", "mxfp8", MOE), ["hardware=a5"], 1, "row-wip", ["mxfp8", "capability.allow=[wip]"]),
    "the other permission": (
        held("modelslim", "w8a16"), ["capability.allow=[wip]"], 1, "row-tbd", ["capability.allow=[wip,tbd]"]),
    "no row for such experts": (
        held("modelslim", "mxfp4_dualscale", MOE), ["hardware=a5", "capability.allow=[tbd]"], 1, "row-unknown",
        ["mxfp4_dualscale", "moe"]),
    "no such table": (W8, ["capability.table=upstream"], 2, "unknown-table", ["upstream", "upstream-0.5.23"]),
    # formats
    "another format than the file's": (
        W8, ["quantization.format=awq"], 1, "format-mismatch", ["awq", "modelslim", "quantization.format=auto"]),
    # ops and ranks
    "K beyond the op's steps": (
        held("modelslim", "w4a4_dynamic", DENSE | {"intermediate_size": 516}), [], 1, "op-limit op-limit",
        ["516", "multiples of 8"]),
    "groups that the op does not take": (
        held("modelslim", "w4a4_dynamic", group_size=64), [], 1, "op-limit", ["groups of 64", "one scale a row"]),
    "more ranks than heads": (W8, ["parallel.tp_size=9"], 1, "tp-heads", ["8 attention heads", "parallel.tp_size=8"]),
    "more ranks than features": (
        held("modelslim", "w8a8_dynamic", DENSE | {"intermediate_size": 4}), ["parallel.tp_size=8"], 1, "tp-size",
        ["4 mlp features", "parallel.tp_size=4"]),
    "blocks of experts that cannot be cut": (
        held("modelslim", "mxfp8", MOE),
        ["hardware=a5", "capability.allow=[wip]", "parallel.tp_size=8", "parallel.ep_size=2"], 1, "tp-align",
        ["experts.*.down_proj", "sizes that split"]),
    "expert groups that do not divide": (
        W8_MOE, ["parallel.tp_size=4", "parallel.ep_size=3"], 1, "ep-size",
        ["8 experts", "parallel.ep_size=1 or 2 or 4"]),
    "expert groups without experts": (
        W8, ["parallel.tp_size=2", "parallel.ep_size=2"], 1, "parallel-unused", ["parallel.ep_size=1"]),
    "copies of the model": (W8, ["parallel.data_size=2"], 1, "parallel-unused", ["parallel.data_size=1"]),
    "a context beyond the model's": (W8, ["runtime.context=4096"], 1, "context", ["4096", "runtime.context=2048"]),
    "float32 on NPUs": (
        W8, ["runtime.dtype=float32", "runtime.device=npu"], 1, "dtype-device", ["runtime.device=cpu"]),
    # kinds of models
    "a pipeline as an llm": (copied(WAN), [], 2, "model-kind", ["model.kind=diffusion"]),
    "an llm as a pipeline": (W8, ["model.kind=diffusion"], 2, "model-kind", ["model.kind=llm"]),
    "a pipeline without a transformer": (
        copied(WAN, lambda f: (f / "model_index.json").write_text('{"_class_name": "W", "vae": ["diffusers", "V"]}')),
        ["model.kind=diffusion"], 2, "model-kind", ["transformer"]),
    "a pipeline of unknown class": (
        copied(WAN, replaced("transformer/config.json", b"WanTransformer3DModel", b"WanTransformer4DModel")),
        ["model.kind=diffusion"], 1, "architecture-unsupported", ["WanTransformer4DModel", "WanTransformer3DModel"]),
    # GGUF
    "a ggml type that is not decoded": (
        copied("tiny-qwen3/gguf-q2_k-1l", replaced("model.gguf", *(
            b"blk.0.ffn_up.weight" + bytes.fromhex("02000000 00010000 00000000 00020000 00000000") + bytes([k, 0, 0, 0])
            for k in (10, 41)))), ["capability.allow=[tbd]"], 1, "gguf-type", ["blk.0.ffn_up.weight",
        "type 41 (Q1_0)"]),
    "a GGUF without a key": (
        copied(GGUF, replaced("model.gguf", b"qwen3.block_count", b"qwen3.block_cound")), [], 2, "gguf-key",
        ["qwen3.block_count"]),
    "a GGUF of another architecture": (
        copied(GGUF, replaced("model.gguf", b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0qwen3",
                              b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0mamba")),
        [], 1, "architecture-unsupported", ["mamba"]),
    "a GGUF whose keys are not its tensors'": (
        copied(GGUF, replaced("model.gguf", b".head_count\x04\0\0\0\x08", b".head_count\x04\0\0\0\x04")),
        [], 1, "config-mismatch", ["blk.0.attn_q.weight", "[256, 256]"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_what_cannot_be_given_is_refused_by_name(case, check):
    make, overrides, status, codes, words = ASKED[case]
    expect(check(make, *overrides), status, codes, words)


SOUND = "model: {path: MODEL}\nhardware: a2\njob: check\n"
ASSUMED = SOUND.replace("MODEL", "/none, assume: {config: MODEL/config.json, format: %s}")
# a recipe file, the codes, words of the message; the exit status is 2
TEXTS = {
    "a misspelt section": (SOUND + "quantisation: {online: true}\n", "unknown-key", ["quantisation", "quantization"]),
    "a misspelt key": (SOUND + "parallel: {tp_sise: 2}\n", "unknown-key", ["tp_sise", "tp_size"]),
    "text for a number": (SOUND + "parallel: {tp_size: two}\n", "wrong-type", ["parallel.tp_size", "two"]),
    "a number below its bound": (SOUND + "parallel: {tp_size: 0}\n", "wrong-type", ["parallel.tp_size", "0"]),
    "a list for a mapping": (SOUND + "parallel: [2]\n", "wrong-type", ["parallel"]),
    "a mapping for a list": (SOUND + "quantization: {layers: {pattern: x}}\n", "wrong-type", ["quantization.layers"]),
    "an unknown scheme": (
        SOUND + "quantization: {layers: [{pattern: '*', scheme: w8a8_dinamic}]}\n", "unknown-value",
        ["w8a8_dinamic", "w8a8_dynamic"]),
    "a rule without its scheme": (
        SOUND + "quantization: {layers: [{pattern: '*'}]}\n", "missing-key", ["quantization.layers[0].scheme"]),
    "an unknown format": (SOUND + "quantization: {format: exl2}\n", "unknown-value", ["exl2"]),
    "an unknown tier": (SOUND.replace("a2", "a4"), "unknown-value", ["a4", "a5"]),
    "a permission for all": (SOUND + "capability: {allow: [unsupported]}\n", "unknown-value", ["unsupported", "wip"]),
    "a key twice": (SOUND + "hardware: a3\n", "duplicate-key", ["hardware", "recipe.yaml"]),
    "Hydra's own keys": (SOUND + "defaults: [x]\n", "recipe-key", ["defaults"]),
    "a bare pattern": (SOUND + "quantization: {layers: [{pattern: *.mlp, scheme: float}]}\n", "yaml-syntax", ["quote"]),
    "a tag": (SOUND + "runtime: {seed: !!python/object:os.system 1}\n", "wrong-type yaml-syntax", ["runtime.seed"]),
    "a bare number for text": (SOUND.replace("MODEL", "123"), "yaml-type", ["model.path", '"123"']),
    "a reference to nothing": (SOUND + "run: {dir: '${nowhere.key}'}\n", "interpolation", ["nowhere.key"]),
    "no path": (SOUND.replace("MODEL", "'???'"), "missing-key", ["model.path"]),
    "assumed groups that leave a rest": (
        ASSUMED % "modelslim, scheme: w4a16, group_size: 96", "format-feature", ["groups of 96", "256"]),
    "an assumed scheme that its tool does not write": (
        ASSUMED % "compressed_tensors, scheme: w4a4_dynamic", "quant-type-unknown", ["w4a4_dynamic", "w4a8_dynamic"]),
    "an unknown job": (SOUND.replace("check", "chek"), "unknown-value", ["chek", "check"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_a_wrong_recipe_is_refused_with_its_line(case, launch):
    text, codes, words = TEXTS[case]
    said = launch(text)
    assert "Traceback" not in said.text
    assert (said.status, said.codes) == (2, codes.split()), said.text
    assert all(word in said.text for word in words), said.text


# fused parts and neighbours may disagree: each runs by itself
ACCEPTED = {
    "fused projections of different schemes": (
        of(W8, described(rf"{LAYER}self_attn\.k_proj\.weight.*", "W8A16")), "w8a16"),
    "a float projection among quantized ones": (
        of(W8, described(rf"{LAYER}self_attn\.k_proj\..*", "FLOAT"), drop(rf"{LAYER}self_attn\.k_proj\.weight_.*"),
           put(f"{LAYER}self_attn.k_proj.weight", "BF16", 128, 256)), "float"),
    "a bias that the config does not know": (of(W8, put(f"{Q}.bias", "F32", 256), described(f"{Q}.bias", "FLOAT")), ""),
    "an empty vision tower": (of(W8, put("visual.patch_embed.weight", "BF16", 4, 4)), ""),
    "a config of 8 bits for some": (
        of(GPTQ, quantization(dynamic={"-:nothing": {}})), "w4a16"),
    "groups that do not divide the input": (of(held("gptq", "w4a16", MOE, group_size=96)), "dequantized at load"),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_unusual_and_right_is_accepted(case, check):
    make, word = ACCEPTED[case]
    said = check(make, "capability.allow=[tbd]")
    assert (said.status, said.codes) == (0, []), said.text
    assert word in said.text
