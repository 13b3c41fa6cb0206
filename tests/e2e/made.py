"""Checkpoints of rows that no golden folder has, made from those that are there, with the logits they must give.

`repacked`: the integers of a golden checkpoint in another format's words, which keeps its logits. `relabelled`: the
same tensors under another type. `quantized` and `online`: round to nearest by literal formulas, with the logits of the
literal forward pass.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests.e2e.literal import forward, integers, mx, mx_values, per_token, read, weight_only, widened

GOLDEN = Path(__file__).parents[1] / "golden"
GPTQ8, AWQ4 = "tiny-qwen3-moe/gptq-w8g64-sym", "tiny-qwen3-moe/awq-w4g64"
# The largest code of weights and of activations (0: float), and the weights' group.
INTEGERS = {"w8a8_dynamic": (127, 127, 0), "w4a8_dynamic": (7, 127, 0), "w4a4_dynamic": (7, 7, 0),
            "w8a16": (127, 0, 0), "w4a16": (7, 0, 128)}  # fmt: skip
# Elements of weights and of activations.
MX = {"mxfp8": ("e4m3", "e4m3"), "mxfp4": ("e2m1", "e2m1"), "w4a8_mxfp": ("e2m1", "e4m3"),
      "mxfp4_dualscale": ("dual", "dual")}  # fmt: skip
PER_TOKEN = {"w8a8_dynamic", "w8a8_mix", "w4a8_dynamic", "w4a4_dynamic"}
ROW_PARALLEL = ("o_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each field of a word of eight holds
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def pack(fields, bits):
    """Fields [..., P] to one int32 each, the first in the lowest bits."""
    shifts = np.arange(fields.shape[-1], dtype=np.uint32) * np.uint32(bits)
    return (fields.astype(np.uint32) << shifts).sum(-1, dtype=np.uint32).view(np.int32)


def unpack(words, bits):
    """int32 [...] to fields [..., 32 / bits]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)


def gptq8(tensors, name):
    """Codes [N, K] 0 .. 255, zeros and scales [N, G] of symmetric GPTQ: words along K, every zero 128."""
    words = tensors[f"{name}.qweight"].numpy()
    codes = unpack(words, 8).transpose(1, 0, 2).reshape(words.shape[1], -1)
    scale = tensors[f"{name}.scales"].numpy().T
    return codes, np.full(scale.shape, 128), scale


def awq4(tensors, name):
    """Codes [N, K] 0 .. 15, zeros and scales [N, G] of AWQ: words along N, eight columns in the tool's order."""
    place = np.argsort(AWQ_ORDER)
    codes, zeros = (
        unpack(tensors[f"{name}.{part}"].numpy(), 4)[..., place].reshape(len(tensors[f"{name}.{part}"]), -1).T
        for part in ("qweight", "qzeros")
    )
    return codes, zeros, tensors[f"{name}.scales"].numpy().T


def signed_pairs(pairs):
    """The low and the high nibble of each byte, as -8 .. 7."""
    return [(nibble ^ 8).astype(np.int8) - np.int8(8) for nibble in (pairs & 15, pairs >> 4 & 15)]


def to_awq8(codes, zero, scale):
    """GPTQModel's 8-bit AWQ: four columns a word, in their own order."""
    words = [pack(np.ascontiguousarray(f.T).reshape(f.shape[1], -1, 4), 8) for f in (codes, zero)]
    return {"qweight": words[0], "qzeros": words[1], "scales": scale.T}


def to_gptq(bits):
    """GPTQ v1: words along K; the zeros' words less one in every field."""

    def made(codes, zero, scale):
        (n, k), per = codes.shape, 32 // bits
        one = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
        zeros = pack(np.ascontiguousarray(zero.T).reshape(zero.shape[1], -1, per), bits)
        weight = pack(codes.reshape(n, -1, per), bits).T
        index = np.arange(k, dtype=np.int32) // (k // scale.shape[1])
        return {"qweight": weight, "qzeros": (zeros.view(np.uint32) - one).view(np.int32), "g_idx": index,
                "scales": scale.T.astype(np.float16)}  # fmt: skip

    return made


def to_auto_round(bits):
    """auto-round's GPTQ words: no g_idx."""
    return lambda *held: {k: v for k, v in to_gptq(bits)(*held).items() if k != "g_idx"}


def to_packed(codes, zero, scale):
    """compressed-tensors pack-quantized, 8 bits: words along K in offset binary."""
    return {"weight_packed": pack(codes.reshape(len(codes), -1, 4), 8), "weight_scale": scale,
            "weight_shape": np.array(codes.shape, np.int64)}  # fmt: skip


def to_w8a16(codes, zero, scale):
    """ModelSlim W8A16: signed codes, one scale a group."""
    return {"weight": (codes.astype(np.int16) - 128).astype(np.int8), "weight_scale": scale.astype(np.float32),
            "weight_offset": (zero - 128).astype(np.float32)}  # fmt: skip


def to_w4a16(codes, zero, scale):
    """ModelSlim W4A16 by groups: signed codes, two rows a byte, the even row low."""
    signed = codes.astype(np.int16) - 8
    return {"weight": ((signed[::2] & 15) | (signed[1::2] << 4)).astype(np.int8),
            "weight_scale": scale.astype(np.float32),
            "weight_offset": zero.astype(np.float32) - 8}  # fmt: skip


def to_float(codes, zero, scale):
    """The values themselves."""
    return {"weight": widened(codes, scale, zero)}


ROUTER_FLOAT = {f"model.layers.{i}.mlp.gate": {"bits": 16, "data_type": "float"} for i in (0, 1)}
WORDS = {"bits": 4, "group_size": 64, "sym": False, "desc_act": False}
PACKED = {"targets": ["Linear"], "input_activations": None, "output_activations": None,
          "weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True,
                      "dynamic": False}}  # fmt: skip
AWQ8_CONFIG = {"quant_method": "awq", "bits": 8, "group_size": 64, "version": "gemm", "zero_point": True,
               "modules_to_not_convert": ["mlp.gate"], "meta": {"quantizer": ["gptqmodel:7.7.0"]}}  # fmt: skip
AUTO8_CONFIG = {"quant_method": "auto-round", "bits": 8, "group_size": 64, "sym": True, "data_type": "int",
                "packing_format": "auto_round:auto_gptq", "extra_config": ROUTER_FLOAT}  # fmt: skip
INT4_CONFIG = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
               "ignore": ["lm_head"],
               "config_groups": {"group_0": {
                   "targets": ["Linear"],
                   "weights": {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True,
                               "dynamic": False},
                   "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True,
                                         "dynamic": True}}}}  # fmt: skip
PACKED_CONFIG = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": PACKED},
                 "quantization_status": "compressed", "ignore": ["re:.*mlp.gate", "lm_head"]}  # fmt: skip


def repacked(source, decode, encode, config=None, label=None):
    """A maker of the source's integers in another format, with the source's logits."""

    def make(folder):
        tensors, base = read(GOLDEN / source)
        names = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
        made = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in names}
        for name in names:
            made |= {f"{name}.{k}": v for k, v in arrays(encode(*decode(tensors, name))).items()}
        write(folder, made, base, config, dict.fromkeys(names, label) if label else None)
        shutil.copy(GOLDEN / source / "reference.npz", folder)

    return make


def relabelled(source, old, new, more):
    """A maker of a ModelSlim checkpoint whose linears of one type get another, and `more(n)` tensors each."""

    def make(folder):
        tensors, base = read(GOLDEN / source)
        types = json.loads((GOLDEN / source / "quant_model_description.json").read_text())
        labels = {name.removesuffix(".weight"): label for name, label in types.items() if name.endswith(".weight")}
        changed = [name for name, label in labels.items() if label == old]
        for name in changed:
            tensors |= {f"{name}.{k}": v for k, v in arrays(more(len(tensors[f"{name}.weight"]))).items()}
        write(folder, tensors, base, None, labels | dict.fromkeys(changed, new))
        shutil.copy(GOLDEN / source / "reference.npz", folder)

    return make


def declared_int8(source):
    """A maker of a compressed-tensors checkpoint whose 4-bit codes, one a byte, are declared to be of 8 bits."""

    def make(folder):
        tensors, base = read(GOLDEN / source)
        for group in base["quantization_config"]["config_groups"].values():
            group["weights"]["num_bits"] = 8
        write(folder, tensors, base, base["quantization_config"])
        shutil.copy(GOLDEN / source / "reference.npz", folder)

    return make


def static_tensors(n):
    """What W8A8_MIX has besides W8A8_DYNAMIC, with values that would show if they were used."""
    return {"input_scale": np.full(1, 9, np.float32), "input_offset": np.full(1, 5, np.float32),
            "quant_bias": np.full(n, 777, np.int32), "deq_scale": np.full(n, 3, np.float32)}  # fmt: skip


def rounded(scheme, weight):
    """A float weight as a scheme multiplies it: its linear, by the ranks that share its input; ModelSlim's tensors."""
    if scheme in INTEGERS:
        most, entering, group = INTEGERS[scheme]
        codes, scale = integers(weight, most, group)
        held = widened(codes, scale)
        tensors = {"weight": codes, "weight_scale": scale, "weight_offset": np.zeros_like(scale)}
        return lambda parts: per_token(held, entering, parts) if entering else weight_only(held), tensors
    element, entering = MX[scheme]
    held, exponent, outer = mx_values(weight, element)
    spread = np.ldexp(np.repeat(outer, 16, axis=1)[:, : exponent.shape[1]], exponent)
    units = held / np.repeat(spread, 32, axis=1)
    scales = {"weight_scale": (exponent + 127).astype(np.uint8)}
    if element == "e4m3":
        return lambda parts: mx(held, entering), {"weight": torch.tensor(units).to(torch.float8_e4m3fn)} | scales
    codes = np.abs(np.abs(units)[..., None] - E2M1).argmin(-1) | (np.signbit(units) << 3)
    codes = (codes[:, ::2] | (codes[:, 1::2] << 4)).astype(np.uint8)
    dual = {"weight_dual_scale": outer[..., None]} if element == "dual" else {}
    return lambda parts: mx(held, entering), {"weight": codes} | scales | dual


def quantized(source, scheme, label=None, config=None):
    """A maker of a checkpoint, ModelSlim's if it has a label: every projection of a float model rounded to nearest."""

    def make(folder):
        tensors, base, original = float_source(source, folder)
        linears, made = {}, dict(tensors)
        for name in projections(tensors):
            linears[name], held = rounded(scheme, made.pop(f"{name}.weight").float().numpy())
            made |= {f"{name}.{k}": v for k, v in arrays(held).items() if label or k != "weight_offset"}
        write(folder, made, base, config, dict.fromkeys(linears, label) if label else None)
        simulate(folder, original, tensors, base, linears, by_rank=scheme in PER_TOKEN)

    return make


def online(source, scheme):
    """A maker of the float checkpoint that a scheme is asked of at load, with the logits of that scheme."""

    def make(folder):
        tensors, base, original = float_source(source, folder)
        linears = {n: rounded(scheme, tensors[f"{n}.weight"].float().numpy())[0] for n in projections(tensors)}
        write(folder, tensors, base)
        simulate(folder, original, tensors, base, linears, by_rank=scheme in PER_TOKEN)

    return make


def with_ranks(source, most):
    """A maker of a golden checkpoint of ModelSlim's int4 pairs as it is, with the logits of 2 and 4 ranks besides.

    `most`: the activations' largest code. Where a second scale says groups, a rank's share is whole groups.
    """

    def make(folder):
        shutil.copytree(GOLDEN / source, folder, dirs_exist_ok=True)
        tensors, base = read(folder)
        linears = {}
        for name in projections(tensors):
            pairs = tensors[f"{name}.weight"].numpy()
            codes = np.stack(signed_pairs(pairs), 1).reshape(-1, pairs.shape[1])
            scale = tensors[f"{name}.weight_scale"].numpy()
            groups = pairs.shape[1]
            if f"{name}.weight_scale_second" in tensors:
                scale = scale * tensors[f"{name}.weight_scale_second"].numpy()
                groups = scale.shape[1]
            held = widened(codes, scale)
            linears[name] = lambda parts, held=held, groups=groups: per_token(held, most, min(parts, groups))
        simulate(folder, GOLDEN / source, tensors, base, linears, by_rank=True)
        with np.load(folder / "reference.npz") as ours, np.load(GOLDEN / source / "reference.npz") as tools:
            found = dict(ours) | {name: tools[name] for name in tools.files if name.endswith("logits_sim")}
        np.savez(folder / "reference.npz", **found)

    return make


def float_source(source, folder):
    """Tensors and config of a float model: a golden one, or the values of the golden experts of 8 bits."""
    if source == "tiny-qwen3/base":
        return (*read(GOLDEN / source), GOLDEN / source)
    values = folder.with_name(f"{folder.name}-values")
    values.mkdir()
    repacked(GPTQ8, gptq8, to_float)(values)
    return (*read(values), values)


def projections(tensors):
    """Names of the linears of attention and MLP."""
    return [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]


def arrays(held):
    """Numpy arrays as the tensors that are written."""
    return {k: v if isinstance(v, torch.Tensor) else torch.tensor(np.ascontiguousarray(v)) for k, v in held.items()}


def write(folder, tensors, config, quantization=None, labels=None):
    """Write a checkpoint; `labels`: ModelSlim's types by linear."""
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    if labels is not None:
        types = {name: labels.get(name.rpartition(".")[0], "FLOAT") for name in tensors}
        text = json.dumps({"version": "1.0.0", "model_quant_type": "FLOAT"} | types)
        (folder / "quant_model_description.json").write_text(text)


def simulate(folder, source, tensors, config, linears, *, by_rank):
    """Write reference.npz: the literal forward pass over the source's prompts; `by_rank`: on 2 and 4 ranks too."""
    with np.load(source / "reference.npz") as given:
        prompts = {k: given[f"prompt{k}.input_ids"] for k in (0, 1)}
    found = {f"prompt{k}.input_ids": ids for k, ids in prompts.items()}
    for size in (1, 2, 4) if by_rank else (1,):
        cut = {name: made(size if name.endswith(ROW_PARALLEL) else 1) for name, made in linears.items()}
        found |= {f"prompt{k}.{key(size)}": forward(tensors, config, cut, ids.tolist()) for k, ids in prompts.items()}
    np.savez(folder / "reference.npz", **found)


def key(size):
    """The reference's array of a tensor-parallel size: a rank scales its own share of a token."""
    return "logits_sim" if size == 1 else f"logits_sim_tp{size}"
