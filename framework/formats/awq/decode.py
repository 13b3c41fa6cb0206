"""AWQ tensors to QuantTensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from framework.checkpoint.index import Index
from framework.checkpoint.reader import Reader
from framework.formats.awq.layout import AwqLayout
from framework.formats.base import alone
from framework.formats.word_codes import bias_of, decode_words
from framework.formats.words import Packing
from framework.geometry import Module, Rect
from framework.quantization.tensor import QuantTensor

LAYOUT = AwqLayout()
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
    return decode_words(modules, rect, scheme, index, reader, held, Packing("awq", held.variant), dtype=dtype)


decode = alone(decode_experts)
