"""Qwen3 and Qwen3-MoE in fp32, and the arithmetic of every scheme, typed out: what rows without a golden are held to.

A linear is a function of activations [T, K] to [T, N]; `forward` asks for them by name.
"""

import json

import numpy as np
import torch
from safetensors.torch import load_file


def read(folder):
    """Tensors of all safetensors files of a folder by name, and its config."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors, json.loads((folder / "config.json").read_text())


def forward(tensors, config, linears, ids):
    """Logits [T, vocab] of token ids; `linears` by module name, every other weight from `tensors`."""
    heads, kv_heads, width = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    steps, half = len(ids), width // 2
    theta = config["rope_parameters"]["rope_theta"]
    angles = np.arange(steps)[:, None] * (theta ** (-np.arange(half) * 2.0 / width))[None]
    cos, sin = (torch.tensor(f(angles), dtype=torch.float32)[:, None] for f in (np.cos, np.sin))

    def value(name):
        return tensors[f"{name}.weight"].float()

    def linear(name, x):
        return linears[name](x) if name in linears else x @ value(name).T

    def norm(name, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * value(name)

    def rotated(x):
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def mlp(name, x):
        gate = linear(f"{name}.gate_proj", x)
        return linear(f"{name}.down_proj", gate * torch.sigmoid(gate) * linear(f"{name}.up_proj", x))

    def experts(name, x):
        chances = torch.softmax(linear(f"{name}.gate", x), -1)
        best, chosen = chances.topk(config["num_experts_per_tok"], -1)
        best = best / best.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            rows, place = (chosen == e).nonzero(as_tuple=True)
            out[rows] += best[rows, place, None] * mlp(f"{name}.experts.{e}", x[rows])
        return out

    x = value("model.embed_tokens")[torch.tensor(ids)]
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        h = norm(f"{base}.input_layernorm", x)
        q, k, v = (
            linear(f"{base}.self_attn.{p}_proj", h).view(steps, n, width)
            for p, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotated(norm(f"{base}.self_attn.q_norm", q)), rotated(norm(f"{base}.self_attn.k_norm", k))
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        scores = scores.masked_fill(torch.ones(steps, steps).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(steps, -1)
        x = x + linear(f"{base}.self_attn.o_proj", mixed)
        h = norm(f"{base}.post_attention_layernorm", x)
        x = x + (experts if f"{base}.mlp.gate.weight" in tensors else mlp)(f"{base}.mlp", h)
    return linear("lm_head", norm("model.norm", x)).numpy()


def weight_only(weight):
    """x W^T of a dequantized weight [N, K]."""
    held = torch.tensor(weight)
    return lambda x: x @ held.T


def per_token(weight, most, parts=1):
    """Activations in integers -most - 1 .. most with one scale a token; the sum of integers is exact.

    `parts`: ranks that each have a share of the input features, and scales of their own.
    """
    shares = torch.tensor(weight).double().chunk(parts, 1)

    def linear(x):
        total = 0
        for share, held in zip(x.chunk(parts, -1), shares, strict=True):
            scale = share.abs().amax(-1, keepdim=True) / most
            scale = torch.where(scale == 0, 1.0, scale)
            codes = torch.round(share / scale).clamp(-most - 1, most)
            total = total + (scale.double() * (codes.double() @ held.T)).float()
        return total

    return linear


def mx(weight, element):
    """Activations in MX blocks of 32; fp4 with ties away from zero, under an outer scale (`dual`) to even."""
    held = torch.tensor(weight)
    return lambda x: torch.tensor(mx_values(x.numpy(), element)[0]) @ held.T


def integers(weight, most, group=0):
    """[N, K] to codes int8 -most - 1 .. most and fp32 scales [N, G] = amax / most, round half to even."""
    n, k = weight.shape
    blocks = weight.astype(np.float32).reshape(n, -1, group or k)
    largest = np.abs(blocks).max(-1, keepdims=True)
    scale = np.where(largest == 0, np.float32(1), largest / np.float32(most)).astype(np.float32)
    codes = np.clip(np.rint(blocks / scale), -most - 1, most)
    return codes.reshape(n, k).astype(np.int8), scale[..., 0]


def widened(codes, scale, zero=0):
    """scale * (code - zero) with scales and zeros [N, G]."""
    n, k = codes.shape
    blocks = codes.astype(np.float32).reshape(n, scale.shape[1], -1)
    offset = np.broadcast_to(np.asarray(zero, np.float32), scale.shape)
    return ((blocks - offset[..., None]) * scale.astype(np.float32)[..., None]).reshape(n, k)


def mx_values(values, element):
    """[R, K] to what OCP MX holds of it, the exponents [R, K / 32]: floor(log2 amax) - emax, and the outer scales.

    `element`: e4m3, e2m1, or dual: e2m1 of values divided by amax / 6 of their 512.
    """
    blocks = values.astype(np.float32).reshape(len(values), -1, 32)
    outer = np.ones((*blocks.shape[:2], 1), np.float32)
    if element == "dual":
        each = [np.abs(values[:, k : k + 512]).max(1) for k in range(0, values.shape[1], 512)]
        outer = np.repeat(np.stack(each, 1) / np.float32(6), 16, axis=1)[:, : blocks.shape[1], None].astype(np.float32)
        blocks = blocks / np.where(outer == 0, 1, outer)
    largest = np.abs(blocks).max(-1, keepdims=True)
    emax, least, mantissa, most = (8, -6, 3, 448.0) if element == "e4m3" else (2, 0, 1, 6.0)
    exponent = np.frexp(np.where(largest == 0, 1, largest))[1] - 1 - emax
    exponent = np.where(largest == 0, -127, exponent).clip(-127, 127)
    scaled = np.ldexp(np.abs(blocks), -exponent)
    step = np.ldexp(np.float32(1), np.maximum(np.frexp(scaled)[1] - 1, least) - mantissa)
    steps = np.floor(scaled / step + 0.5) if element == "e2m1" else np.rint(scaled / step)
    held = np.sign(blocks) * np.minimum(steps * step, most) * np.ldexp(np.float32(1), exponent)
    return (held * outer).reshape(values.shape).astype(np.float32), exponent[..., 0], outer[:, ::16, 0]
