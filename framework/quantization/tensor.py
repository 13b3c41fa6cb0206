"""QuantTensor: the one type in which formats and schemes meet."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantTensor:
    """A logical weight [N, K], quantized or plain, on the CPU.

    `codes` [N, K]: a float tensor when `scale` is None (then nothing else is set), else integer codes (int8).
    `scale` [N, G] float with G = K / group_size (one group: per channel).
    Value = scale * (code - zero), or scale * code + minimum where a format stores a float minimum.
    `zero` and `minimum` [N, G]; at most one of them. `bits` is the width of a code (4 or 8).
    """

    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    minimum: Tensor | None = None
    group_size: int = 0
    bits: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        return tuple(self.codes.shape)  # type: ignore[return-value]

    @property
    def is_float(self) -> bool:
        """True for a plain weight."""
        return self.scale is None

    def slice(self, n0: int, n1: int, k0: int, k1: int) -> QuantTensor:
        """Return rows n0..n1, columns k0..k1; columns must respect the group size."""
        codes = self.codes[n0:n1, k0:k1]
        if self.scale is None:
            return QuantTensor(codes)
        size = self.group_size
        if k0 % size or (k1 % size and k1 != self.codes.shape[1]):
            raise ValueError(f"columns {k0}..{k1} cut a group of {size}")
        groups = slice(k0 // size, -(-k1 // size))
        part = {
            name: None if value is None else value[n0:n1, groups]
            for name, value in (("scale", self.scale), ("zero", self.zero), ("minimum", self.minimum))
        }
        return replace(self, codes=codes, **part)

    def dequantize(self) -> Tensor:
        """Return the weight [N, K] in fp32."""
        if self.scale is None:
            return self.codes.float()
        codes = self.codes.float().unflatten(1, (-1, self.group_size))
        scale = self.scale.float().unsqueeze(2)
        if self.minimum is not None:
            values = codes * scale + self.minimum.float().unsqueeze(2)
        elif self.zero is not None:
            values = (codes - self.zero.float().unsqueeze(2)) * scale
        else:
            values = codes * scale
        return values.flatten(1)


def concat(parts: list[QuantTensor]) -> QuantTensor:
    """Stack weights of equal K and equal kind along N (fused q/k/v, gate/up)."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def stack(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return replace(first, **{name: stack(name) for name in ("codes", "scale", "zero", "minimum")})
