"""Random weights of every kind that a scheme takes, and their values typed out in float64."""

import numpy as np
import torch

from framework.quantization.tensor import QuantTensor

# by scheme: element, bits of a code, groups that the scheme has to take (0: one scale a row)
KINDS = {
    "float": ("", 0, (0,)),
    "w8a8_static": ("int", 8, (0,)),
    "w8a8_dynamic": ("int", 8, (0,)),
    "w8a8_mix": ("int", 8, (0,)),
    "w4a4_dynamic": ("int", 4, (0,)),
    "w4a8_dynamic": ("int", 4, (0, 64, 256)),
    "w4a16": ("int", 4, (0, 64)),
    "w8a16": ("int", 8, (0, 64)),
    "mxfp8": ("e4m3", 8, (32,)),
    "mxfp4": ("e2m1", 4, (32,)),
    "mxfp4_dualscale": ("e2m1", 4, (32,)),
    "w4a8_mxfp": ("e2m1", 4, (32,)),
}
CASES = [(scheme, group) for scheme, (_, _, groups) in KINDS.items() for group in groups]
WITHOUT_EXPERTS = ("w8a8_static", "w8a8_mix", "mxfp4_dualscale")
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp8_value(code):
    """OCP e4m3: sign, four bits of exponent with bias 7, three of mantissa; no infinities."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


FP8 = np.array([fp8_value(code) for code in range(256)])


def weight(scheme, n, k, group=0, seed=0, zeros=False):
    """A QuantTensor [N, K]; `zeros`: codes of integers have zero points."""
    element, bits, _ = KINDS[scheme]
    rng = np.random.default_rng(seed)
    if not element:
        return QuantTensor(torch.tensor(rng.standard_normal((n, k)), dtype=torch.float32))
    if element == "int":
        half = 1 << (bits - 1)
        codes = torch.tensor(rng.integers(-half, half, (n, k)), dtype=torch.int8)
        groups = k // (group or k)
        scale = torch.tensor(rng.uniform(0.5, 2, (n, groups)) / half, dtype=torch.float32)
        zero = torch.tensor(rng.integers(-3, 4, (n, groups)), dtype=torch.float32) if zeros else None
        whole = {}
        if scheme == "w8a8_static":
            whole = {"input_scale": torch.tensor([0.03]), "input_offset": torch.tensor([-5.0])}
        return QuantTensor(codes, scale, zero, group_size=group or k, bits=bits, whole=whole)
    if element == "e4m3":
        octets = rng.integers(0, 256, (n, k)).astype(np.uint8)
        codes = torch.tensor(np.where(octets & 127 == 127, 0, octets)).view(torch.float8_e4m3fn)
    else:
        codes = torch.tensor(rng.integers(0, 16, (n, k)), dtype=torch.uint8)
    scale = torch.tensor(rng.integers(120, 130, (n, -(-k // 32))), dtype=torch.uint8)
    outer = None
    if scheme == "mxfp4_dualscale":
        outer = torch.tensor(rng.uniform(0.5, 2, (n, -(-k // 512))), dtype=torch.float32)
    return QuantTensor(codes, scale, group_size=32, bits=bits, element=element, outer=outer)


def spread(table, size, k):
    """[N, G] -> [N, K]: what every column has of its group."""
    return np.repeat(table.numpy().astype(np.float64), size, axis=1)[:, :k]


def values(weight):
    """[N, K] in float64, from the definition of each element."""
    k = weight.codes.shape[1]
    if weight.scale is None:
        return weight.codes.double().numpy()
    if weight.element == "int":
        size = k // weight.scale.shape[1]
        codes = weight.codes.numpy().astype(np.float64)
        if weight.zero is not None:
            codes = codes - spread(weight.zero, size, k)
        found = codes * spread(weight.scale, size, k)
        return found if weight.minimum is None else found + spread(weight.minimum, size, k)
    octets = weight.codes.view(torch.uint8).numpy()
    found = (FP8 if weight.element == "e4m3" else FP4)[octets] * 2.0 ** (spread(weight.scale, 32, k) - 127)
    return found if weight.outer is None else found * spread(weight.outer, 512, k)


def clear_of_ties(x, most, cuts):
    """Set what lies near the middle between two codes to 0: there the last bit of a scale decides."""
    for k0, k1 in cuts:
        part = x[:, k0:k1]
        quotient = part * (most / np.abs(part).max(1, keepdims=True))
        part[np.abs(np.abs(quotient) % 1 - 0.5) < 1e-3] = 0
    return x


def by_token(x, most):
    """Activations in float64 after one scale amax / most a token and codes rounded to the nearest."""
    x = x.astype(np.float64)
    scale = np.abs(x).max(1, keepdims=True) / most
    return np.rint(x / np.where(scale == 0, 1, scale)) * scale


def nearest(x, table, ties):
    """The value of `table` (codes in order, both signs alike) nearest to each magnitude, with x's sign."""
    gaps = np.abs(np.abs(x)[..., None] - table)
    best = gaps.min(-1, keepdims=True)
    codes = np.arange(len(table))
    # ties: away from zero, the later code; else the even one
    order = codes if ties == "away" else (1 - codes % 2) * len(codes)
    chosen = np.where(gaps == best, order, -1).argmax(-1)
    return np.sign(x) * table[chosen]


def by_blocks(x, element, ties="even"):
    """Activations in float64 after OCP MX: blocks of 32 under 2^(floor(log2 amax) - emax), saturated."""
    table, emax = (FP8[:127], 8) if element == "e4m3" else (FP4[:8], 2)
    blocks = x.astype(np.float64).reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    exponent = np.floor(np.log2(np.where(largest == 0, 1, largest))) - emax
    return (nearest(blocks / 2.0**exponent, table, ties) * 2.0**exponent).reshape(x.shape)


def by_two_levels(x):
    """Activations in float64 after an outer fp32 scale amax / 6 of every 512, then e2m1 blocks, ties to even."""
    parts = []
    for k in range(0, x.shape[1], 512):
        part = x[:, k : k + 512].astype(np.float32)
        outer = np.abs(part).max(1, keepdims=True) / np.float32(6)
        outer = np.where(outer == 0, np.float32(1), outer)
        parts.append(by_blocks(part / outer, "e2m1") * outer)
    return np.concatenate(parts, 1)


def activations(scheme, x):
    """What a scheme makes of x [T, K], in float64; w8a8_static as `weight` gives its scale."""
    match scheme:
        case "w8a8_static":
            codes = np.rint(x.astype(np.float64) / np.float64(np.float32(0.03)) - 5)
            return (np.clip(codes, -128, 127) + 5) * np.float64(np.float32(0.03))
        case "w8a8_dynamic" | "w8a8_mix" | "w4a8_dynamic":
            return by_token(x, 127)
        case "w4a4_dynamic":
            return by_token(x, 7)
        case "mxfp8" | "w4a8_mxfp":
            return by_blocks(x, "e4m3")
        case "mxfp4":
            return by_blocks(x, "e2m1", "away")
        case "mxfp4_dualscale":
            return by_two_levels(x)
    return x.astype(np.float64)


def inputs(scheme, rows, k, cuts=(), seed=9):
    """fp32 [T, K] of rows of different size, one of zeros, away from what the last bit of a scale decides."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, k)) * np.exp2(rng.integers(-3, 3, (rows, 1)))).astype(np.float32)
    x[rows // 2] = 0
    most = {"w4a4_dynamic": 7, "w8a8_dynamic": 127, "w8a8_mix": 127, "w4a8_dynamic": 127}.get(scheme)
    if most:
        filled = np.delete(x, rows // 2, 0)
        x[np.arange(rows) != rows // 2] = clear_of_ties(filled, most, cuts or [(0, k)])
    if scheme == "w8a8_static":
        x[np.abs(np.abs(x / 0.03) % 1 - 0.5) < 1e-3] = 0
    return x
