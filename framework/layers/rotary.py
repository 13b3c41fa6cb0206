"""Rotary position tables: inverse frequencies per kind, and the cos and sin rows that a step needs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from framework.families.base import Rope


def inverse_frequencies(rope: Rope, dim: int, divisors: Tensor | None = None) -> tuple[Tensor, float]:
    """Return (inverse frequencies [dim/2] fp32, factor on cos and sin).

    Formulas: transformers' modeling_rope_utils (linear, llama3, yarn). `divisors` [dim/2] replace the scaling
    (a GGUF's rope_freqs tensor).
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    base = 1.0 / rope.theta**exponents
    if divisors is not None:
        return base / divisors.float(), 1.0
    if rope.kind == "linear":
        return base / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(base, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(base, rope, dim), _yarn_factor(rope)
    return base, 1.0


def _llama3(base: Tensor, rope: Rope) -> Tensor:
    wavelength = 2 * math.pi / base
    low, high = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * base / rope.factor + smooth * base
    scaled = torch.where(wavelength > low, base / rope.factor, base)
    return torch.where((wavelength <= low) & (wavelength >= high), between, scaled)


def _yarn(base: Tensor, rope: Rope, dim: int) -> Tensor:
    def dimension_of(rotations: float) -> float:
        return dim * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return base / rope.factor * (1 - keep) + base * keep


def _yarn_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


class RotaryTable:
    """cos and sin for every position up to `context`, half-split layout, in `dtype`."""

    def __init__(
        self,
        rope: Rope,
        dim: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        divisors: Tensor | None,
    ) -> None:
        frequencies, factor = inverse_frequencies(rope, dim, divisors)
        angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=1)
        self.cos = (angles.cos() * factor).to(dtype).to(device)
        self.sin = (angles.sin() * factor).to(dtype).to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[T] int64 -> cos, sin [1, T, 1, D]."""
        shape = (1, positions.shape[0], 1, -1)
        return self.cos.index_select(0, positions).view(shape), self.sin.index_select(0, positions).view(shape)
