"""The vocabulary that every room shares: modules, rectangles, shards. No torch, no files.

Weights are `[N, K]`: N output features (rows), K input features (columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What a module computes; decides its layer type and which tensors it may have."""

    LINEAR = "linear"
    EXPERTS = "experts"  # the same linear of every routed expert of a layer
    EMBEDDING = "embedding"
    NORM = "norm"
    PARAMETER = "parameter"  # a tensor that is no linear's: a table, a bias of a router, a convolution


class Role(StrEnum):
    """Linears and parameters that rules treat apart."""

    NONE = ""
    ROUTER = "router"  # scores of experts; stays float in online modes
    HEAD = "head"


class Split(StrEnum):
    """How tensor parallelism divides a module."""

    COLUMN = "column"  # rows of the weight; each rank makes its own output features
    ROW = "row"  # columns of the weight; partial sums are added over the ranks
    VOCAB = "vocab"  # rows of an embedding or a head
    EXPERT = "expert"
    REPLICATED = "replicated"
    ROWS_GATHER = "rows+gather"  # a module whose columns are on ranks, but cannot be cut: rows are, inputs gathered


@dataclass(frozen=True, slots=True)
class Rect:
    """Half-open rectangle of a logical weight: rows n0..n1, columns k0..k1."""

    n0: int
    n1: int
    k0: int
    k1: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.n1 - self.n0, self.k1 - self.k0

    @property
    def size(self) -> int:
        """Number of weights."""
        return (self.n1 - self.n0) * (self.k1 - self.k0)


class Module(NamedTuple):
    """One weight of a model, as its family describes it, before any file or rank is known.

    `name` is the canonical Hugging Face module name (`model.layers.0.self_attn.q_proj`).
    `shape` is [N, K]; a norm of H features is [H, 1].
    `axis` names the dimension of the model that is dealt to ranks (`q_heads`, `kv_heads`, `mlp`, `vocab`);
    every module on one axis is cut at the same places. `unit` is the number of rows (column and vocab splits)
    or columns (row split) that one element of the axis spans.
    `tied_to` names the module whose weight this one shares.
    `experts` is the number of routed experts of an EXPERTS module; its name has `*` where their number stands
    (`model.layers.0.mlp.experts.*.gate_proj`), its shape is that of one expert.
    `absorbed`: the model multiplies the weight into others, so it runs as float whatever the file holds.
    `dims` is the shape in the file of a PARAMETER, whose tensor has the module's name; its `shape` is [values, 1].
    `packed`: of a module described as ROWS_GATHER, which has no axis of its own: the (axis, unit) of the ranges that
    its input features are made of, in order.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    split: Split
    axis: str = ""
    unit: int = 1
    bias: bool = False
    tied_to: str = ""
    experts: int = 0
    role: Role = Role.NONE
    dims: tuple[int, ...] = ()
    absorbed: bool = False
    packed: tuple[tuple[str, int], ...] = ()

    @property
    def layer_type(self) -> str:
        """The support table's word: `moe` for routed experts, else `linear`."""
        return "moe" if self.kind is Kind.EXPERTS else "linear"

    @property
    def quantizable(self) -> bool:
        """Whether the module is a matrix product, which rows of the support table are about."""
        return self.kind in (Kind.LINEAR, Kind.EXPERTS)

    @property
    def linears(self) -> int:
        """Linears that this module stands for."""
        return self.experts or 1

    def names(self) -> list[str]:
        """Return the names of its linears: one, or one an expert."""
        if not self.experts:
            return [self.name]
        before, after = self.name.split(".*.")
        return [f"{before}.{e}.{after}" for e in range(self.experts)]

    def expert(self, number: int) -> Module:
        """Return one expert's linear."""
        name = self.name.replace("*", str(number), 1)
        # a plain call: _replace takes twice as long, and there can be 45,000
        return Module(name, Kind.LINEAR, self.shape, self.split, self.axis, self.unit, self.bias, role=self.role)

    @property
    def full(self) -> Rect:
        """The whole weight."""
        return Rect(0, self.shape[0], 0, self.shape[1])


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Half-open ranges of query and KV heads that one rank holds."""

    q0: int
    q1: int
    kv0: int
    kv1: int
