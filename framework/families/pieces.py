"""Weights that diffusers classes are made of, under the names that diffusers gives them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from framework.geometry import Kind, Module, Split


def copied(name: str, rows: int, columns: int) -> Module:
    """Return a linear with bias that every rank holds whole."""
    return Module(name, Kind.LINEAR, (int(rows), int(columns)), Split.REPLICATED, bias=True)


def column(name: str, rows: int, columns: int, axis: str, unit: int = 1, *, bias: bool = True) -> Module:
    """Return a linear whose output features are dealt."""
    return Module(name, Kind.LINEAR, (int(rows), int(columns)), Split.COLUMN, axis, unit, bias)


def row(name: str, rows: int, columns: int, axis: str, unit: int = 1) -> Module:
    """Return a linear with bias whose input features are dealt."""
    return Module(name, Kind.LINEAR, (int(rows), int(columns)), Split.ROW, axis, unit, bias=True)


def packed(name: str, rows: int, columns: int, *ranges: tuple[str, int]) -> Module:
    """Return a linear with bias over several features side by side, each dealt along its own (axis, unit)."""
    shape = (int(rows), int(columns))
    return Module(name, Kind.LINEAR, shape, Split.ROWS_GATHER, bias=True, packed=ranges)


def norm(name: str, size: int, *, bias: bool = False) -> Module:
    """Return the weight vector of a norm."""
    return Module(name, Kind.NORM, (int(size), 1), Split.REPLICATED, bias=bias)


def parameter(name: str, *dims: int) -> Module:
    """Return a tensor of any shape, by its full name."""
    sizes = tuple(map(int, dims))
    return Module(name, Kind.PARAMETER, (prod(sizes), 1), Split.REPLICATED, dims=sizes)


def patch(name: str, out_channels: int, in_channels: int, *kernel: int) -> Iterator[Module]:
    """Yield the weight [out, in, *kernel] and bias of the convolution that makes patches."""
    yield parameter(f"{name}.weight", out_channels, in_channels, *kernel)
    yield parameter(f"{name}.bias", out_channels)


def embedder(name: str, features: int, hidden: int) -> Iterator[Module]:
    """Yield the two linears that embed a timestep, guidance or text."""
    yield copied(f"{name}.linear_1", hidden, features)
    yield copied(f"{name}.linear_2", hidden, hidden)


def feed_forward(name: str, hidden: int, width: int) -> Iterator[Module]:
    """Yield a feed-forward net without gate."""
    yield column(f"{name}.net.0.proj", width, hidden, "ffn")
    yield row(f"{name}.net.2", hidden, width, "ffn")


def attention(
    name: str, heads: int, head_dim: int, *, norm_size: int = 0, bias: bool = True, out: bool = True,
    added: bool = False, added_out: bool = True,
) -> Iterator[Module]:  # fmt: skip
    """Yield an attention over `heads` heads, of width heads x head_dim throughout.

    `norm_size`: features of the norms of queries and keys, a head's or all (0: no norms). `bias`: of query, key and
    value; outputs always have one. `out`: it has an output projection. `added`: a second stream has projections of
    its own, with an output one if `added_out`.
    """
    width = heads * head_dim
    streams = [("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0" if out else "")]
    if added:
        last = "to_add_out" if added_out else ""
        streams.append(("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", last))
    for query, key, value, query_norm, key_norm, output in streams:
        for projection in (query, key, value):
            yield column(f"{name}.{projection}", width, width, "heads", head_dim, bias=bias)
        if norm_size:
            yield norm(f"{name}.{query_norm}", norm_size)
            yield norm(f"{name}.{key_norm}", norm_size)
        if output:
            yield row(f"{name}.{output}", width, width, "heads", head_dim)
