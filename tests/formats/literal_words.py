"""AWQ's and GPTQ's words by the formulas of their formats, element by element."""

import json

import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st

from framework.checkpoint.open import open_index
from framework.geometry import Kind, Module, Rect, Split

NAME = "model.layers.0.mlp.down_proj"
# nibble or byte of a word in which AWQ holds column c of those that share it
NIBBLE = [0, 4, 1, 5, 2, 6, 3, 7]
BYTE = {"natural": [0, 1, 2, 3], "interleaved": [0, 2, 1, 3]}


def unsigned(tensor):
    return tensor.numpy().view(np.uint32).astype(np.int64)


def group_of(k, group, g_idx=None):
    return np.arange(k) // (group or k) if g_idx is None else g_idx.numpy()


def gptq(tensors, bits, group, *, v1):
    """The weight fp32 [N, K]: codes along K, zero points along N, minus one in v1."""
    per_word, mask = 32 // bits, (1 << bits) - 1
    codes, fields, scales = unsigned(tensors["qweight"]), unsigned(tensors["qzeros"]), tensors["scales"].float().numpy()
    k, n = codes.shape[0] * per_word, codes.shape[1]
    if v1:
        fields = (fields + {4: 0x11111111, 8: 0x01010101}[bits]) % (1 << 32)
    groups = group_of(k, group, tensors.get("g_idx"))
    out = np.empty((n, k), np.float32)
    rows = np.arange(n)
    for column in range(k):
        code = (codes[column // per_word] >> (bits * (column % per_word))) & mask
        zero = (fields[groups[column], rows // per_word] >> (bits * (rows % per_word))) & mask
        out[:, column] = scales[groups[column]] * (code - zero).astype(np.float32)
    return out


def awq(tensors, bits, group, *, order="natural"):
    """The weight fp32 [N, K]: codes and zero points along N, columns of a word in AWQ's order."""
    per_word, mask = 32 // bits, (1 << bits) - 1
    place = np.array(NIBBLE if bits == 4 else BYTE[order])
    codes, fields, scales = unsigned(tensors["qweight"]), unsigned(tensors["qzeros"]), tensors["scales"].float().numpy()
    k, n = codes.shape[0], codes.shape[1] * per_word
    groups = group_of(k, group)
    out = np.empty((n, k), np.float32)
    for row in range(n):
        shift = bits * int(place[row % per_word])
        code = (codes[:, row // per_word] >> shift) & mask
        zero = (fields[groups, row // per_word] >> shift) & mask
        out[row] = scales[groups, row] * (code - zero).astype(np.float32)
    return out


def zero_word(bits, zero):
    """A word all of whose fields are `zero`, as a torch int32."""
    word = sum(zero << bits * field for field in range(32 // bits))
    return word - (1 << 32) if word >> 31 else word


def random_words(rng, *shape):
    return torch.from_numpy(rng.integers(-(2**31), 2**31, shape).astype(np.int32))


def made(rng, along, n, k, bits, group, *, zero=None, order=False, scales=torch.float16):
    """Tensors of a linear whose codes are random, and zero points too unless `zero` says what they are."""
    per_word, groups = 32 // bits, -(-k // group) if group else 1
    qweight = random_words(rng, k // per_word, n) if along == "gptq" else random_words(rng, k, n // per_word)
    qzeros = random_words(rng, groups, -(-n // per_word))
    tensors = {
        "qweight": qweight,
        "qzeros": qzeros if zero is None else torch.full_like(qzeros, zero_word(bits, zero)),
        "scales": torch.from_numpy(rng.uniform(-1, 1, (groups, n))).to(scales),
    }
    if order:
        tensors["g_idx"] = torch.from_numpy(rng.permutation(np.arange(k) // group).astype(np.int32))
    return tensors


def written(folder, tensors, config, *, name=NAME):
    """The index of a file with one linear."""
    return written_together(folder, {name: tensors}, config)


def written_together(folder, linears, config):
    """The index of a file with linears: their tensors by role."""
    named = {f"{name}.{role}": tensor.contiguous() for name, held in linears.items() for role, tensor in held.items()}
    safetensors.torch.save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return open_index(folder)


def linear(n, k, name=NAME, **more):
    return Module(name, Kind.LINEAR, (n, k), Split.COLUMN, **more)


def rectangle(draw, n, k, grain=(1, 1)):
    """Any rectangle between multiples of the grain; the last one may be cut short by the weight's end."""

    def ends(size, step):
        first = draw(st.integers(0, -(-size // step) - 1))
        return first * step, min(draw(st.integers(first + 1, -(-size // step))) * step, size)

    return Rect(*ends(n, grain[0]), *ends(k, grain[1]))


def same(a, b):
    """Two QuantTensors of words, bit for bit."""

    def equal(x, y):
        return x is y if x is None or y is None else x.dtype == y.dtype and torch.equal(x, y)

    parts = ("codes", "scale", "zero", "order")
    return all(equal(getattr(a, part), getattr(b, part)) for part in parts) and (
        (a.group_size, a.bits, a.element) == (b.group_size, b.bits, b.element)
    )
