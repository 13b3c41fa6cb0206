"""Text from tokens as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"  # what a decode shows for an incomplete or invalid UTF-8 sequence
_MAX_PENDING_TOKENS = 8  # a character has at most 4 bytes: tokens beyond this are invalid bytes, not a part of one
_CONTEXT_TOKENS = 4


class Decoder(Protocol):
    """What a stream needs of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of ids."""
        ...


class TextStream:
    """Turns token ids into text, one by one.

    Every decode sees the tokens not yet shown and those of the last piece (a sentencepiece token's leading
    space depends on what stands before it), so a push costs the same at any length.
    """

    def __init__(self, tokenizer: Decoder, context_ids: Sequence[int] = ()) -> None:
        """Start a stream; `context_ids` are tokens before the first one (the prompt's tail), never shown."""
        self._tokenizer = tokenizer
        self._shown: list[int] = list(context_ids[-_CONTEXT_TOKENS:])
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is now certain ("" while a character is incomplete)."""
        self._pending.append(token_id)
        piece = self._piece()
        if piece.endswith(_REPLACEMENT) and len(self._pending) < _MAX_PENDING_TOKENS:
            return ""
        if piece:
            self._shown, self._pending = self._pending, []
        else:
            # a special token: forget it, the tokens before stay the context
            self._pending = []
        return piece

    def flush(self) -> str:
        """Return what was held back; an incomplete character shows as U+FFFD."""
        piece = self._piece() if self._pending else ""
        self._shown, self._pending = self._pending, []
        return piece

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._shown)
        both = self._tokenizer.decode([*self._shown, *self._pending])
        if both.startswith(before):
            return both[len(before) :]
        # byte tokens that are invalid together change the text before them, which is already shown
        return self._tokenizer.decode(self._pending)


class StopMatcher:
    """Finds stop strings in streamed text and holds back what may be the beginning of one.

    Empty stop strings never match.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take a piece of text; return (text to show, whether a stop string was reached).

        The text ends before the stop string. After a hit all further text is dropped.
        """
        if self._hit:
            return "", True
        text = self._held + text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self._held, self._hit = "", True
            return text[: min(starts)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
