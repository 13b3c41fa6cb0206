"""The two halves of a format: `Layout` (names and shapes, no torch) and `Decoder` (bytes to QuantTensor)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from framework.checkpoint.index import Index
from framework.errors import Problem
from framework.geometry import Module, Rect

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from framework.checkpoint.reader import Reader
    from framework.quantization.tensor import QuantTensor

FLOATS = ("BF16", "F16", "F32")


class TensorSpec(NamedTuple):
    """A tensor that a module must have in the file: its role (`weight`, `bias`, ...), name, shape, dtypes.

    `dtypes` are the acceptable container dtypes; empty means any the format can decode.
    """

    role: str
    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = ()


class Held(NamedTuple):
    """What the file holds of one module.

    Attributes:
        scheme: the file's own scheme, what `scheme: auto` takes.
        tensors: all that the module must have in the file.
        label: the file's own word for it (`W8A8_DYNAMIC`, `Q4_K`, `4 bits, groups of 128`).
        group: input features that share a scale; 0: all of a row.
        serves: further schemes that the same bytes serve. A quantized weight always serves `float` by
            dequantization at load, which need not be listed.
        grain: rows and columns that a cut must be a multiple of while the bytes stay as they are.
        symmetric: codes have no zero point or offset.
        variant: what the decoder or the support table must know beyond the scheme (`dual`, `mix`, ...).
    """

    scheme: str
    tensors: tuple[TensorSpec, ...]
    label: str = ""
    group: int = 0
    serves: tuple[str, ...] = ()
    grain: tuple[int, int] = (1, 1)
    symmetric: bool = True
    variant: str = ""

    @property
    def schemes(self) -> tuple[str, ...]:
        """Every scheme that can be served, the file's own first."""
        return tuple(dict.fromkeys((self.scheme, *self.serves, "float")))


class Layout(Protocol):
    """Where a format keeps a module's tensors. Headers only.

    Layouts see one linear at a time: planning asks for each expert of an EXPERTS module by itself, unless
    `stacked` says that one tensor holds them all.
    """

    name: str

    def detect(self, index: Index) -> str | None:
        """Say what in this index is of this format (one phrase, shown by check), or None."""
        ...

    def held(self, module: Module, index: Index) -> Held:
        """Return what the file holds of a module: of every kind, not of linears only."""
        ...

    def stacked(self, module: Module, index: Index) -> bool:
        """Whether one tensor [E, N, K] holds all experts of this module."""
        ...

    def extras(self, index: Index) -> dict[str, list[TensorSpec]]:
        """Return tensors that belong to no weight, by the name of what uses them."""
        ...

    def ignorable(self, name: str, index: Index) -> str | None:
        """Say why a tensor that no module uses may be left out, or None."""
        ...

    def faults(self, modules: Sequence[Module], index: Index) -> list[Problem]:
        """Return what is wrong with the description as a whole, whatever the recipe says."""
        ...

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return the headers that a checkpoint of this format would have (`model.assume`).

        It reads them back as `scheme` for every quantizable module but routers and heads. Options are `group_size`,
        `symmetric`, `mix` and `layers`: ordered {pattern, scheme} for modules that are held otherwise.
        """
        ...


@dataclass(frozen=True, slots=True)
class Assumed:
    """Headers made from a config: (name, dtype, shape) of each tensor, documents beside them, keys for config.json."""

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    documents: dict[str, Any]
    config: dict[str, Any]


class Decoder(Protocol):
    """Bytes to a QuantTensor, for any rectangle that respects the layout's grain."""

    def decode(
        self, module: Module, rect: Rect, scheme: str, index: Index, reader: Reader, *, dtype: torch.dtype
    ) -> QuantTensor:
        """Return the rectangle of the module's weight in the form that `scheme` prepares from.

        Float weights come in `dtype`, norms in fp32.
        """
        ...

    def decode_experts(
        self, modules: Sequence[Module], rect: Rect, scheme: str, index: Index, reader: Reader, *, dtype: torch.dtype
    ) -> Iterator[QuantTensor]:
        """Yield the rectangle of each of some experts' modules, which the file holds alike."""
        ...

    def bias(self, module: Module, rect: Rect, index: Index, reader: Reader) -> Tensor:
        """Return rows n0..n1 of the module's bias as an fp32 tensor."""
        ...


def alone(decode_experts: Callable[..., Iterator[QuantTensor]]) -> Callable[..., QuantTensor]:
    """Return the `decode` of a format that decodes a single module as it does several."""

    def decode(module: Module, *given: Any, **named: Any) -> QuantTensor:  # noqa: ANN401
        return next(decode_experts((module,), *given, **named))

    return decode


def one_by_one(decode: Callable[..., QuantTensor]) -> Callable[..., Iterator[QuantTensor]]:
    """Return the `decode_experts` of a format that gains nothing by decoding several at a time."""

    def decode_experts(modules: Sequence[Module], *given: Any, **named: Any) -> Iterator[QuantTensor]:  # noqa: ANN401
        return (decode(module, *given, **named) for module in modules)

    return decode_experts
