"""Bytes that each scheme holds of a weight on the device: what memory plans and rooflines count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Storage:
    """`bits` a code (0: the activations' dtype); per scale block `scale_bytes`, or `scale_values` of that dtype.

    `block` is the number of input features that share a scale where the scheme itself says so; 0: the file's groups.
    `row_bytes` is what an output feature has besides (corrections, merged scales).
    """

    bits: int
    scale_bytes: int = 0
    scale_values: int = 0
    block: int = 0
    row_bytes: int = 0

    def of(self, n: int, k: int, group: int, width: int, bits: int = 0) -> int:
        """Bytes of a shard [n, k] with file groups of `group` (0: one a row), activations of `width` bytes.

        `bits`: of a code, where it is held wider than the scheme's own form.
        """
        if not self.bits:
            return n * k * width
        step = self.block or group
        blocks = -(-k // step) if step else 1
        codes = -(-k * (bits or self.bits) // 8)
        return n * (codes + blocks * (self.scale_bytes + self.scale_values * width) + self.row_bytes)


STORAGE = {
    "float": Storage(0),
    "w8a8_static": Storage(8, row_bytes=8),  # deq_scale, quant_bias
    "w8a8_dynamic": Storage(8, scale_bytes=4),
    "w8a8_mix": Storage(8, scale_bytes=4),
    "w4a4_dynamic": Storage(4, scale_bytes=4),
    "w4a8_dynamic": Storage(4, scale_bytes=8, row_bytes=4),  # scales as int64, the correction for x - 8
    "w4a16": Storage(4, scale_values=2),  # scale and offset
    "w8a16": Storage(8, scale_values=2),
    "mxfp8": Storage(8, scale_bytes=1, block=32),
    "mxfp4": Storage(4, scale_bytes=1, block=32),
    "mxfp4_dualscale": Storage(4, scale_bytes=1, block=32),
    "w4a8_mxfp": Storage(4, scale_bytes=1, block=32),
}
WEIGHT_ONLY = frozenset({"w4a16", "w8a16"})
