"""Wan transformers written as msModelSlim writes them, and their forward with its arithmetic, literally.

For types of which the golden files hold no checkpoint. Formulas: MSL's weight quantizers and the operators' documents.
"""

import json
import re

import torch
from safetensors.torch import save_file
from torch import nn

# diffusers' names to Wan's own, as the released checkpoints have them; norm2 and norm3 change places
TO_WAN = [
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"proj_out", "head.head"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"scale_shift_table", "head.modulation"),
    (r"attn1\.to_([qkv])\b", r"self_attn.\1"),
    (r"attn1\.to_out\.0", "self_attn.o"),
    (r"attn1\.", "self_attn."),
    (r"attn2\.to_([qkv])\b", r"cross_attn.\1"),
    (r"attn2\.to_out\.0", "cross_attn.o"),
    (r"attn2\.", "cross_attn."),
    (r"norm2\.", "norm3."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def wan_name(name):
    for pattern, new in TO_WAN:
        name = re.sub(pattern, new, name)
    return name


def write(folder, model, kinds, scale_of=None):
    """Write a transformer with the linears of `kinds` (diffusers' names to types) quantized; return {name: weight}.

    `scale_of`: smoothing factors of some linears; their inputs are multiplied by them, their weights were divided.
    """
    folder.mkdir(parents=True)
    tensors, described, exact = {}, {}, {}
    for name, values in model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        kind = kinds.get(module) if suffix == "weight" else None
        smooth = (scale_of or {}).get(module)
        deeper = ".linear" if smooth is not None else ""
        if kind is None:
            tensors[
                wan_name(module) + (deeper if suffix == "bias" else "") + "." + suffix if module else wan_name(name)
            ] = values
            continue
        weight = values.float() if smooth is None else values.float() / smooth
        made, exact[module] = quantize(weight, kind)
        tensors |= {f"{wan_name(module)}{deeper}.{part}": tensor for part, tensor in made.items()}
        described |= {f"{wan_name(module)}{deeper}.{part}": kind for part in made}
        if smooth is not None:
            tensors[f"{wan_name(module)}.div.mul_scale"] = smooth
    described = {name: described.get(name, "FLOAT") for name in tensors}
    last = list(kinds.values())[-1]
    described["model_quant_type"] = last
    (folder / f"quant_model_description_{last.lower()}.json").write_text(json.dumps(described))
    tensors = {name: values.contiguous() for name, values in tensors.items()}
    save_file(tensors, folder / f"quant_model_weight_{last.lower()}.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel"}))
    return exact


def quantize(weight, kind):
    """Return the tensors of a linear's weight [N, K] in fp32, and what they stand for."""
    if kind in ("W8A8_DYNAMIC", "W4A4_DYNAMIC"):
        most = {"W8A8_DYNAMIC": 127, "W4A4_DYNAMIC": 7}[kind]
        scale = weight.abs().amax(1, keepdim=True) / most
        codes = torch.round(weight / scale).clamp(-most - 1, most)
        made = {"weight": codes.to(torch.int8), "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
        return made, codes * scale
    if kind == "W8A8_MXFP8":
        codes, powers = mx(weight, lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn), 8)
        made = {"weight": codes, "weight_scale": (powers + 127).to(torch.uint8)}
        return made, (codes.float().unflatten(1, (-1, 32)) * 2.0 ** powers[..., None]).flatten(1)
    coarse = torch.ones(weight.shape[0], 1)
    made = {}
    if kind == "W4A4_MXFP4_DUALSCALE":
        # a scale per 512 columns, so that the largest value of each is E2M1's
        coarse = weight.unflatten(1, (-1, 512)).abs().amax(2) / 6
        made["weight_dual_scale"] = coarse[..., None]
        coarse = coarse.repeat_interleave(512, 1)
    codes, powers = mx(weight / coarse, e2m1, 2)
    values = (codes.unflatten(1, (-1, 32)) * 2.0 ** powers[..., None]).flatten(1) * coarse
    nibbles = (codes.abs()[..., None] == E2M1).int().argmax(-1) + 8 * (codes < 0)
    packed = (nibbles[:, 0::2] + 16 * nibbles[:, 1::2]).to(torch.uint8)
    return {"weight": packed, "weight_scale": (powers + 127).to(torch.uint8)} | made, values


def mx(x, cast, largest):
    """Return codes and exponents of blocks of 32 along the last dimension."""
    blocks = x.unflatten(-1, (-1, 32))
    powers = torch.floor(torch.log2(blocks.abs().amax(-1).clamp(min=1e-30))) - largest
    return cast(blocks / 2.0 ** powers[..., None]).flatten(-2), powers


def e2m1(x):
    """Round to E2M1, half away from zero, saturating at 6."""
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    return E2M1[(x.abs()[..., None] >= middles).sum(-1)] * x.sign()


def even(x):
    """Round to E2M1, half to the even code, saturating at 6."""
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    above, reached = (x.abs()[..., None] > middles).sum(-1), (x.abs()[..., None] >= middles).sum(-1)
    return E2M1[torch.where(above % 2 == 0, above, reached)] * x.sign()


class Simulated(nn.Module):
    """A linear whose input is quantized as its type says, and whose weight is what the codes stand for."""

    def __init__(self, weight, bias, kind, smooth=None):
        super().__init__()
        self.weight, self.bias, self.kind, self.smooth = weight, bias, kind, smooth

    def forward(self, x):
        x = x if self.smooth is None else x * self.smooth
        match self.kind:
            case "W8A8_DYNAMIC" | "W4A4_DYNAMIC":
                most = {"W8A8_DYNAMIC": 127, "W4A4_DYNAMIC": 7}[self.kind]
                scale = x.abs().amax(-1, keepdim=True) / most
                x = torch.round(x / scale).clamp(-most - 1, most) * scale
            case "W8A8_MXFP8":
                codes, powers = mx(x, lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).float(), 8)
                x = (codes.unflatten(-1, (-1, 32)) * 2.0 ** powers[..., None]).flatten(-2)
            case "W4A4_MXFP4_DUALSCALE":
                coarse = (x.unflatten(-1, (-1, 512)).abs().amax(-1) / 6).clamp(min=1e-30).repeat_interleave(512, -1)
                codes, powers = mx(x / coarse, even, 2)
                x = (codes.unflatten(-1, (-1, 32)) * 2.0 ** powers[..., None]).flatten(-2) * coarse
            case "W4A4_MXFP4":
                codes, powers = mx(x, e2m1, 2)
                x = (codes.unflatten(-1, (-1, 32)) * 2.0 ** powers[..., None]).flatten(-2)
        return nn.functional.linear(x, self.weight, self.bias)


def simulate(model, exact, kinds, scale_of=None):
    """Replace the quantized linears of a transformer by literal ones."""
    for name, weight in exact.items():
        old = model.get_submodule(name)
        smooth = (scale_of or {}).get(name)
        model.set_submodule(name, Simulated(weight, old.bias.float(), kinds[name], smooth))
    return model
