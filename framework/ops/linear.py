"""Plain float matmul: torch's own on an NPU, the fastest exact form on the CPU."""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

_linear = functional.linear
_FLOAT32 = torch.float32

# Up to so many rows reading the weight once in its own dtype is no slower.
_NARROW_ROWS = 2
# The most tokens that a prompt's chunk and a batch of answers make together (planning.draft: CHUNK_TOKENS, AUTO_BATCH).
_CHUNK_ROWS = 640
# From this many rows on fp32 is faster on Intel's processors without AMX, whose bf16 instruction uses one of the two
# units that fp32 has (a Xeon of 2023: 85 GFLOP/s a core against 160).
_INTEL_ROWS = 32
# Weights widened at a time: 1 MB of fp32, which the matmul then reads from the cache.
_CHUNK_WEIGHTS = 1 << 18


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight^T + bias with fp32 accumulation. x [M, K], weight [N, K], bias [N] -> [M, N], of one dtype.

    On a CPU without fast bf16 instructions (and for fp16 on any) torch's matmul of several rows is up to ten times
    slower than in fp32, so the operands are widened first; the result is the same up to the order of the sum.
    """
    dtype, rows = x.dtype, x.shape[0]
    if dtype is _FLOAT32 or x.device.type != "cpu":
        return _linear(x, weight, bias)
    if dtype is torch.bfloat16 and rows <= bfloat16_rows():
        if rows != 1:
            return _linear(of_few_heights(x), weight, bias)[:rows]
        row = torch.mv(weight, x[0]).unsqueeze(0)  # 0.5 to 0.9 of linear's time for one row
        return row if bias is None else row + bias
    if rows <= _NARROW_ROWS:
        return _linear(x, weight, bias)
    y = _linear_widened(x, weight)
    return y if bias is None else y + bias


def of_few_heights(x: Tensor) -> Tensor:
    """Return x [M, K] with rows of zeros below, so that M has at most three significant bits.

    oneDNN, which multiplies bf16 on the CPU, compiles a kernel for every M and weight and keeps a thousand of them, of
    0.6 MB each: a server that meets prompts of all lengths would grow by as much. More rows than a chunk of a prompt
    are the tokens of pictures, whose heights are few by themselves.
    """
    rows = x.shape[0]
    if rows > _CHUNK_ROWS:
        return x
    step = 1 << max(0, rows.bit_length() - 3)
    missing = -rows % step
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


@cache
def bfloat16_rows() -> int:
    """Return up to how many rows this processor multiplies bf16 by instructions of its own, faster than fp32."""
    is_native = torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
        not torch.cpu._is_avx2_supported()
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )
    if not is_native:
        return 0
    has_one_unit = (
        "Intel" in torch.cpu.get_capabilities().get("cpu_name", "") and not torch.cpu._is_amx_tile_supported()
    )
    return _INTEL_ROWS - 1 if has_one_unit else sys.maxsize


def _linear_widened(x: Tensor, weight: Tensor) -> Tensor:
    n, k = weight.shape
    wide = x.float()
    step = max(_CHUNK_WEIGHTS // k, 1)
    if step >= n:
        return _linear(wide, weight.float()).to(x.dtype)
    y = x.new_empty((x.shape[0], n))
    for first in range(0, n, step):
        y[:, first : first + step] = _linear(wide, weight[first : first + step].float())
    return y
