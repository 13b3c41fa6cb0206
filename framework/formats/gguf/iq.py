"""The i-quants: codes that index lattice grids. The grids are gguf's own tables, loaded on first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from framework.formats.gguf.fp16 import half

_KVALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _words(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Little-endian words as int64 (unsigned)."""
    size = torch.tensor([], dtype=dtype).element_size()
    values = raw.clone(memory_format=torch.contiguous_format).view(dtype).long()  # a slice may lie unaligned
    return values & ((1 << 8 * size) - 1)


@cache
def _grid(kind: str) -> Tensor:
    """The grid of a type as fp32 [entries, values]."""
    from gguf import quants

    table = getattr(quants, kind)
    table.init_grid()
    return torch.from_numpy(table.grid.reshape(table.grid.shape[-2:]).copy()).float()


@cache
def _sign_bytes() -> Tensor:
    """The 128 seven-bit sign codes with their parity in bit 7."""
    codes = torch.arange(128)
    parity = sum((codes >> i) & 1 for i in range(7)) & 1
    return codes | (parity << 7)


def _signs(raw: Tensor) -> Tensor:
    """int64 [..] sign bytes -> fp32 [.., 8] of +-1."""
    return 1.0 - 2.0 * ((raw.unsqueeze(-1) >> torch.arange(8)) & 1).float()


def _nibble_pairs(raw: Tensor) -> Tensor:
    """uint8 [B, n] -> [B, 2n], low and high nibble of each byte side by side."""
    return torch.stack((raw & 15, raw >> 4), dim=2).flatten(1)


def _kvalues(codes: Tensor) -> Tensor:
    return torch.tensor(_KVALUES, dtype=torch.float32)[codes.int()]


def _iq4_nl(raw: Tensor) -> Tensor:
    packed = raw[:, 2:]
    return half(raw[:, :2]) * _kvalues(torch.cat((packed & 15, packed >> 4), dim=1))


def _iq4_xs(raw: Tensor) -> Tensor:
    high = _words(raw[:, 2:4], torch.int16)
    low = _nibble_pairs(raw[:, 4:8]).long()
    scales = (low | (((high >> (2 * torch.arange(8))) & 3) << 4)) - 32
    packed = raw[:, 8:].view(-1, 8, 16)
    values = _kvalues(torch.cat((packed & 15, packed >> 4), dim=2))
    return ((half(raw[:, :2]) * scales.float()).unsqueeze(2) * values).flatten(1)


def _iq2_xxs(raw: Tensor) -> Tensor:
    words = _words(raw[:, 2:], torch.int32).view(-1, 8, 2)
    index = (words[:, :, :1] >> (8 * torch.arange(4))) & 255
    scale = half(raw[:, :2]) * (0.5 + (words[:, :, 1] >> 28).float()) * 0.25
    signs = _signs(_sign_bytes()[(words[:, :, 1:] >> (7 * torch.arange(4))) & 127])
    return (scale.view(-1, 8, 1, 1) * _grid("IQ2_XXS")[index] * signs).flatten(1)


def _iq2_xs(raw: Tensor) -> Tensor:
    codes = _words(raw[:, 2:66], torch.int16)
    scale = half(raw[:, :2]) * (0.5 + _nibble_pairs(raw[:, 66:74]).float()) * 0.25
    values = _grid("IQ2_XS")[codes & 511] * _signs(_sign_bytes()[codes >> 9])
    return (scale.view(-1, 16, 1, 1) * values.view(-1, 16, 2, 8)).flatten(1)


def _iq2_s(raw: Tensor) -> Tensor:
    high = (raw[:, 66:74].long().unsqueeze(2) >> (2 * torch.arange(4))) & 3
    index = raw[:, 2:34].long() | (high.flatten(1) << 8)
    scale = half(raw[:, :2]) * (0.5 + _nibble_pairs(raw[:, 74:82]).float()) * 0.25
    values = _grid("IQ2_S")[index] * _signs(raw[:, 34:66].long())
    return (scale.view(-1, 16, 1, 1) * values.view(-1, 16, 2, 8)).flatten(1)


def _iq3_xxs(raw: Tensor) -> Tensor:
    words = _words(raw[:, 66:98], torch.int32)
    scale = half(raw[:, :2]) * (0.5 + (words >> 28).float()) * 0.5
    signs = _signs(_sign_bytes()[(words.unsqueeze(2) >> (7 * torch.arange(4))) & 127])
    values = _grid("IQ3_XXS")[raw[:, 2:66].long()].view(-1, 8, 4, 8)
    return (scale.view(-1, 8, 1, 1) * values * signs).flatten(1)


def _iq3_s(raw: Tensor) -> Tensor:
    high = (raw[:, 66:74].long().unsqueeze(2) >> torch.arange(8)) & 1
    index = raw[:, 2:66].long() | (high.flatten(1) << 8)
    scale = half(raw[:, :2]) * (1 + 2 * _nibble_pairs(raw[:, 106:110]).float())
    values = _grid("IQ3_S")[index].view(-1, 8, 4, 8) * _signs(raw[:, 74:106].long()).view(-1, 8, 4, 8)
    return (scale.view(-1, 8, 1, 1) * values).flatten(1)


def _iq1_s(raw: Tensor) -> Tensor:
    high = _words(raw[:, 34:50], torch.int16)
    index = raw[:, 2:34].long().view(-1, 8, 4) | (((high.unsqueeze(2) >> (3 * torch.arange(4))) & 7) << 8)
    scale = half(raw[:, :2]) * (2 * ((high >> 12) & 7).float() + 1)
    delta = torch.where(high & 0x8000 != 0, -0.125, 0.125)
    return (scale.view(-1, 8, 1, 1) * (_grid("IQ1_S")[index] + delta.view(-1, 8, 1, 1))).flatten(1)


def _iq1_m(raw: Tensor) -> Tensor:
    words = _words(raw[:, 48:56], torch.int16)
    bits = (words[:, 0] >> 12) | ((words[:, 1] >> 8) & 0xF0) | ((words[:, 2] >> 4) & 0xF00) | (words[:, 3] & 0xF000)
    d = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.float16).float()
    scales = ((words.unsqueeze(2) >> (3 * torch.arange(4))) & 7).flatten(1).float()
    high = _nibble_pairs(raw[:, 32:48]).long()
    index = raw[:, :32].long() | ((high & 7) << 8)
    delta = torch.where(high & 8 != 0, -0.125, 0.125)
    scale = d.view(-1, 1) * (2 * scales + 1)
    values = (_grid("IQ1_M")[index] + delta.unsqueeze(2)).view(-1, 16, 2, 8)
    return (scale.view(-1, 16, 1, 1) * values).flatten(1)


DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs, "IQ3_S": _iq3_s, "IQ1_S": _iq1_s, "IQ1_M": _iq1_m,
}  # fmt: skip
