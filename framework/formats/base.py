"""The two halves of a format: `Layout` (names and shapes, no torch) and `Decoder` (bytes to QuantTensor)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from framework.checkpoint.index import Index
from framework.geometry import Module, Rect

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from framework.checkpoint.reader import Reader
    from framework.quantization.tensor import QuantTensor


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a module must have in the file: its role (`weight`, `bias`, ...), name, dtypes, shape.

    `dtypes` are the acceptable container dtypes; empty means any the format can decode.
    """

    role: str
    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = ()


class Layout(Protocol):
    """Where a format keeps a module's tensors. Headers only."""

    name: str

    def detect(self, index: Index) -> str | None:
        """Say why this index is of this format (one phrase, shown by check), or None."""
        ...

    def schemes_of(self, module: Module, index: Index) -> tuple[str, ...]:
        """Return the schemes that the file's bytes can serve, the file's own (`scheme: auto`) first."""
        ...

    def tensors_of(self, module: Module, index: Index) -> list[TensorSpec]:
        """Return the tensors that this module must have in the file."""
        ...

    def extras(self, index: Index) -> dict[str, list[TensorSpec]]:
        """Return tensors that belong to no weight, by the name of what uses them."""
        ...

    def ignorable(self, name: str) -> str | None:
        """Say why a tensor that no module uses may be left out, or None."""
        ...

    def grain(self, module: Module, scheme: str, index: Index) -> tuple[int, int]:
        """Rows and columns that a cut must be a multiple of when the module keeps `scheme`."""
        ...


class Decoder(Protocol):
    """Bytes to a QuantTensor, for any rectangle that respects the layout's grain."""

    def decode(
        self, module: Module, rect: Rect, scheme: str, index: Index, reader: Reader, *, dtype: torch.dtype
    ) -> QuantTensor:
        """Return the rectangle of the module's weight in the form that `scheme` prepares from.

        Float weights come in `dtype`, norms in fp32.
        """
        ...

    def bias(self, module: Module, rect: Rect, index: Index, reader: Reader) -> Tensor:
        """Return rows n0..n1 of the module's bias as an fp32 tensor."""
        ...
