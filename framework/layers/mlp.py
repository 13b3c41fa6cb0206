"""The gated MLP of a decoder layer."""

from __future__ import annotations

from torch import Tensor

from framework import ops
from framework.layers.linear import ParallelLinear
from framework.layers.submodules import LeanModule, find_submodules_directly


class GatedMLP(LeanModule):
    """down(act(gate(x)) * up(x)); act is silu or gelu_tanh."""

    def __init__(self, gate_up: ParallelLinear, down: ParallelLinear, activation: str) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up, down
        self.activation = activation
        find_submodules_directly(self)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        gate_up = self.gate_up_proj(x)
        if self.activation == "silu":
            return self.down_proj(ops.npu_swiglu(gate_up))
        tanh, gate_first = 1, True
        return self.down_proj(ops.npu_geglu(gate_up, -1, tanh, gate_first)[0])
