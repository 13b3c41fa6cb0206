"""auto-round's tensors to QuantTensors: by their packing, those of GPTQ or AWQ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from framework.checkpoint.index import Index
from framework.checkpoint.reader import Reader
from framework.formats.auto_round.layout import AutoRoundLayout, packing_of, width_of
from framework.formats.base import alone
from framework.formats.word_codes import bias_of, decode_words
from framework.geometry import Module, Rect
from framework.quantization.tensor import QuantTensor

LAYOUT = AutoRoundLayout()
bias = bias_of


def decode_experts(
    modules: Sequence[Module],
    rect: Rect,
    scheme: str,
    index: Index,
    reader: Reader,
    *,
    dtype: torch.dtype = torch.float32,
) -> Iterator[QuantTensor]:
    """Yield a rectangle of the weight of each module, all held alike; values in `dtype` where the scheme is float."""
    held = LAYOUT.held(modules[0], index)
    packing = packing_of(index, width_of(modules[0], index))
    return decode_words(modules, rect, scheme, index, reader, held, packing, dtype=dtype)


decode = alone(decode_experts)
