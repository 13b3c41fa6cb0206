"""One step's input to a model: tokens of several sequences, packed."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.engine.cache import PAGE_TOKENS


@dataclass(slots=True)
class Batch:
    """T tokens of B sequences, a sequence's tokens side by side and in order.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, within the sequence.
        slots: [T] int32, where keys and values go: page * 128 + offset.
        query_lengths: tokens of each sequence in this step; their sum is T.
        context_lengths: tokens of each sequence in the cache once this step's are written.
        block_table: [B, P] int32, pages of each sequence, padded with 0.
        logit_rows: [S] int64, ascending, the rows of T whose logits are wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_lengths: list[int]
    context_lengths: list[int]
    block_table: Tensor
    logit_rows: Tensor
    is_decode: bool = False  # every sequence has one token


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, end) of a sequence, its pages, and which of the tokens' logits are wanted."""

    token_ids: Seq[int]
    pages: Seq[int]
    start: int
    end: int
    logits: str = "last"  # "none" | "last" | "all"


class BatchBuilder:
    """Packs pieces. Keeps the tensors that seldom change between steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._table_key: list[tuple[int, int]] = []
        self._table = torch.zeros(0, 0, dtype=torch.int32)
        self._all_rows: dict[int, Tensor] = {}

    def build(self, pieces: list[Piece]) -> Batch:
        """Return the packed batch of all pieces, in their order."""
        if all(piece.end - piece.start == 1 and piece.logits != "none" for piece in pieces):
            return self._decode(pieces)
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        for piece in pieces:
            tokens += piece.token_ids[piece.start : piece.end]
            positions += range(piece.start, piece.end)
            slots += _slots(piece)
            if piece.logits == "all":
                rows += range(len(tokens) - (piece.end - piece.start), len(tokens))
            elif piece.logits == "last":
                rows.append(len(tokens) - 1)
        return Batch(
            self._tensor(tokens, torch.int64),
            self._tensor(positions, torch.int64),
            self._tensor(slots, torch.int32),
            [piece.end - piece.start for piece in pieces],
            [piece.end for piece in pieces],
            self._block_table(pieces),
            self._tensor(rows, torch.int64),
            all(piece.end - piece.start == 1 for piece in pieces),
        )

    def _decode(self, pieces: list[Piece]) -> Batch:
        starts = [piece.start for piece in pieces]
        slots = [p.pages[p.start // PAGE_TOKENS] * PAGE_TOKENS + p.start % PAGE_TOKENS for p in pieces]
        count = len(pieces)
        if count not in self._all_rows:
            self._all_rows[count] = torch.arange(count, device=self._device)
        return Batch(
            self._tensor([piece.token_ids[piece.start] for piece in pieces], torch.int64),
            self._tensor(starts, torch.int64),
            self._tensor(slots, torch.int32),
            [1] * count,
            [start + 1 for start in starts],
            self._block_table(pieces),
            self._all_rows[count],
            True,
        )

    def _block_table(self, pieces: list[Piece]) -> Tensor:
        # a page list only grows while it lives, so its identity and length tell whether it is the one we know
        key = [(id(piece.pages), len(piece.pages)) for piece in pieces]
        if key != self._table_key:
            widest = max(len(piece.pages) for piece in pieces)
            self._table = self._tensor(
                [[*piece.pages, *[0] * (widest - len(piece.pages))] for piece in pieces], torch.int32
            )
            self._table_key = key
        return self._table

    def forget(self) -> None:
        """Drop the kept block table: page lists were given back."""
        self._table_key = []

    def _tensor(self, values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _slots(piece: Piece) -> list[int]:
    slots: list[int] = []
    position = piece.start
    while position < piece.end:
        offset = position % PAGE_TOKENS
        count = min(PAGE_TOKENS - offset, piece.end - position)
        first = piece.pages[position // PAGE_TOKENS] * PAGE_TOKENS + offset
        slots += range(first, first + count)
        position += count
    return slots
