"""Refuse weights whose scales are no numbers before they turn every output into garbage."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from framework.errors import InputError, Problem
from framework.quantization.tensor import QuantTensor

E8M0_NAN = 255


def check_values(weight: QuantTensor, name: str, where: str, dtype: torch.dtype) -> None:
    """Check what codes are multiplied by or added to; of a weight that was dequantized, the values.

    Zero and negative scales are numbers: some tools write them for empty groups and for asymmetric blocks. Costs one
    pass over the scales, a hundredth of the codes.

    Args:
        weight: as decoded.
        name: of its module.
        where: of its checkpoint.
        dtype: of the activations, in which scales must not overflow.

    Raises:
        InputError: `scale-values`, NaN, Inf, beyond `dtype`, or an input scale of 0, which activations are divided by.
    """
    most = torch.finfo(dtype).max
    for role, values in _tables(weight):
        if values.dtype is torch.uint8:
            bad = values == E8M0_NAN
        elif not values.is_floating_point() or (role != "input_scale" and _within(values, most)):
            continue
        else:
            bad = ~(values.abs() <= most)
            if role == "input_scale":
                bad |= values == 0
        if bool(bad.any()):
            found = "nan" if values.dtype is torch.uint8 else f"{float(values[bad][0]):g}"
            raise InputError(
                Problem(
                    "scale-values",
                    f"{name}: {role} is {found} in {int(bad.sum())} of {values.numel()} places",
                    where,
                    f"no output can be right: {str(dtype).removeprefix('torch.')} holds numbers up to {most:.3g}",
                    "quantize the checkpoint again; if the scale is large and finite, runtime.dtype=bfloat16",
                )
            )


def _tables(weight: QuantTensor) -> Iterator[tuple[str, Tensor]]:
    if weight.scale is None:
        yield "value", weight.codes
        return
    for role in ("scale", "zero", "minimum", "outer"):
        if (values := getattr(weight, role)) is not None:
            yield role, values
    for named in (weight.rows, weight.columns, weight.whole):
        yield from named.items()


def _within(values: Tensor, most: float) -> bool:
    """Whether all are numbers up to `most`, in one pass: a NaN is both extremes of its values."""
    if not values.numel():
        return True
    # torch looks through a transposed view several times as slowly
    low, high = (values.t() if values.ndim == 2 and values.t().is_contiguous() else values).aminmax()
    return -most <= low.item() and high.item() <= most
