"""The schemes by name."""

from __future__ import annotations

from framework.quantization.schemes import float_, w4a16, w8a16
from framework.quantization.schemes.base import Operands, Scheme

__all__ = ["SCHEMES", "Operands", "Scheme"]

SCHEMES: dict[str, Scheme] = {
    "float": Scheme("float", float_.prepare, float_.linear),
    "w4a16": Scheme("w4a16", w4a16.prepare, w4a16.linear),
    "w8a16": Scheme("w8a16", w8a16.prepare, w8a16.linear),
}
