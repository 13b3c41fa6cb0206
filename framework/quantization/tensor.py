"""QuantTensor: the one type in which formats and schemes meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from framework.ops.nibbles import Nibbles, join

MX_BLOCK = 32  # elements that share an e8m0 scale
MX_OUTER_BLOCK = 512  # elements that share an outer scale, in two-level MX
# Values of the sixteen e2m1 codes (OCP Microscaling Formats 1.0).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class QuantTensor:
    """A logical weight [N, K], quantized or plain, on the CPU.

    Attributes:
        stored: the codes, or 4-bit ones as their file packs them, in which form only some schemes take them.
        codes: [N, K]. A float weight when `scale` is None (then nothing else is set); else by `element`: `int`
            integer codes (int8, or uint8 of 8 bits), `e4m3` torch.float8_e4m3fn, `e2m1` codes 0..15 as uint8.
        scale: integers: [N, G] float with G = K / group_size (one group: per channel). MX elements: e8m0 bytes
            uint8 [N, ceil(K / 32)], value 2^(byte - 127).
        zero: [N, G], float or integer; value = scale * (code - zero).
        minimum: [N, G]; value = scale * code + minimum. At most one of zero and minimum.
        group_size: input features that share a scale.
        bits: width of a code: 4 or 8.
        element: `int`, `e4m3` or `e2m1`.
        outer: two-level MX: fp32 [N, ceil(K / 512)], which multiplies the value.
        order: [K] int64, the input feature that column k multiplies; None: k. (GPTQ's activation order: groups are
            contiguous in `codes`, not in the input.)
        rows: tensors [N, ...] that follow the output features (`quant_bias`, `deq_scale`).
        columns: tensors [K] that follow the input features (`mul_scale`).
        whole: tensors of the weight as a whole (`input_scale`, `input_offset`).
    """

    stored: Tensor | Nibbles
    scale: Tensor | None = None
    zero: Tensor | None = None
    minimum: Tensor | None = None
    group_size: int = 0
    bits: int = 0
    element: str = "int"
    outer: Tensor | None = None
    order: Tensor | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def codes(self) -> Tensor:
        """One element a code: packed ones are unpacked at every access."""
        return self.stored.unpack() if isinstance(self.stored, Nibbles) else self.stored

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        return tuple(self.stored.shape)  # type: ignore[return-value]

    @property
    def is_float(self) -> bool:
        """True for a plain weight."""
        return self.scale is None

    def slice(self, n0: int, n1: int, k0: int, k1: int) -> QuantTensor:
        """Return rows n0..n1, columns k0..k1; columns must respect groups and blocks.

        Raises:
            ValueError: the cut goes through a group, or through an order of the columns.
        """
        k = self.shape[1]
        if self.scale is None:
            return QuantTensor(self.codes[n0:n1, k0:k1])
        if self.order is not None and (k0, k1) != (0, k):
            raise ValueError("columns in activation order cannot be cut")

        def groups(value: Tensor | None, size: int) -> Tensor | None:
            if value is None:
                return None
            if value.shape[1] == 1:
                return value[n0:n1]
            if k0 % size or (k1 % size and k1 != k):
                raise ValueError(f"columns {k0}..{k1} cut a group of {size}")
            return value[n0:n1, k0 // size : -(-k1 // size)]

        per_channel = self.scale.shape[1] == 1
        return replace(
            self,
            stored=self.codes[n0:n1, k0:k1],
            scale=groups(self.scale, self.group_size),
            zero=groups(self.zero, self.group_size),
            minimum=groups(self.minimum, self.group_size),
            group_size=k1 - k0 if per_channel else self.group_size,
            outer=groups(self.outer, MX_OUTER_BLOCK),
            rows={name: value[n0:n1] for name, value in self.rows.items()},
            columns={name: value[k0:k1] for name, value in self.columns.items()},
        )

    def dequantize(self) -> Tensor:
        """Return the weight [N, K] in fp32, columns in the order of the input features."""
        if self.scale is None:
            return self.codes.float()
        values = self._integers() if self.element == "int" else self._mx()
        if self.order is None:
            return values
        ordered = torch.empty_like(values)
        ordered[:, self.order] = values
        return ordered

    def _integers(self) -> Tensor:
        assert self.scale is not None
        codes = self.codes.float().unflatten(1, (-1, self.group_size))
        scale = self.scale.float().unsqueeze(2)
        if self.minimum is not None:
            values = codes * scale + self.minimum.float().unsqueeze(2)
        elif self.zero is not None:
            values = (codes - self.zero.float().unsqueeze(2)) * scale
        else:
            values = codes * scale
        return values.flatten(1)

    def _mx(self) -> Tensor:
        assert self.scale is not None
        k = self.codes.shape[1]
        values = self.codes.float() if self.element == "e4m3" else torch.tensor(E2M1)[self.codes.long()]
        exponents = self.scale.int() - 127
        values = torch.ldexp(values, exponents.repeat_interleave(MX_BLOCK, dim=1)[:, :k])
        if self.outer is not None:
            values = values * self.outer.repeat_interleave(MX_OUTER_BLOCK, dim=1)[:, :k]
        return values


def concat(parts: list[QuantTensor]) -> QuantTensor:
    """Stack weights of equal K and equal kind along N (fused q/k/v, gate/up); see `fusable`.

    Raises:
        ValueError: they are not of one kind, but that some have zero points and others need none.
    """
    if len(parts) == 1:
        return parts[0]
    if any(part.zero is not None for part in parts):
        parts = [part if part.zero is not None else replace(part, zero=_zeros(part)) for part in parts]
    first = parts[0]
    if not all(fusable(first, part) for part in parts[1:]):
        raise ValueError("weights of different kinds cannot be joined")

    def stack(name: str) -> Tensor | Nibbles | None:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        if name == "stored" and (joined := join(values)) is not None:
            return joined
        values = [value.unpack() if isinstance(value, Nibbles) else value for value in values]
        if all(value.t().is_contiguous() for value in values):
            return torch.cat([value.t() for value in values], 1).t()  # what stands as [K, N] or [G, N] stays so
        return torch.cat(values)

    stacked = {name: stack(name) for name in ("stored", "scale", "zero", "minimum", "outer")}
    rows = {name: torch.cat([part.rows[name] for part in parts]) for name in first.rows}
    return replace(first, **stacked, rows=rows)


def _zeros(weight: QuantTensor) -> Tensor | None:
    return None if weight.scale is None else torch.zeros_like(weight.scale)


def fusable(a: QuantTensor, b: QuantTensor) -> bool:
    """Whether `concat` of two weights over one input is one weight of the same kind."""

    def alike(name: str) -> bool:
        mine, other = getattr(a, name), getattr(b, name)
        if name == "stored":
            return True  # packed or not
        if isinstance(mine, Mapping):
            return bool(mine.keys() == other.keys()) and (
                name == "rows" or all(torch.equal(value, other[key]) for key, value in mine.items())
            )
        if name == "order" and mine is not None and other is not None:
            return torch.equal(mine, other)
        if isinstance(mine, Tensor) or isinstance(other, Tensor):
            return (mine is None) == (other is None)
        return bool(mine == other)

    return all(alike(name) for name in _FIELDS)


_FIELDS = [f.name for f in fields(QuantTensor)]
