"""One forward pass of every scheme on meta tensors: which operators ran, and the dtypes and shapes they returned.

    python -m tests.ops.scheme_calls ours | torch_npu

A process of its own: torch_npu registers the operators that framework.ops would define, and cannot be loaded after it.
Prints JSON: calls by case, or `absent` and why torch_npu cannot be loaded.
"""

import json
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framework import ops
from framework.ops import meta, register
from framework.ops.schema import OPERATORS
from framework.quantization.registry import SCHEMES
from tests.quantization.weights import CASES, WITHOUT_EXPERTS, weight

META = torch.device("meta")
ROWS, N, K, EXPERTS = 5, 64, 1024, 3
# torch_npu 2.13 has no Meta kernels of these: the shapes are ours on both sides
WITHOUT_META = ("npu_format_cast", "npu_convert_weight_to_int4pack", "npu_dual_level_quant_matmul")


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "npu":
            self.calls.append([function.name(), [described(t) for t in tree_leaves(out)]])
        return out


def described(tensor):
    return [str(tensor.dtype), list(tensor.shape)]


def cases():
    """Name to scheme, group, whether of experts, dtype of the activations."""
    return {
        f"{scheme} {group} {'experts' if grouped else 'linear'} {str(dtype).removeprefix('torch.')}":
        (scheme, group, grouped, dtype)
        for scheme, group in CASES
        for grouped in (False, True)
        for dtype in (torch.bfloat16, torch.float16)
        if not (grouped and scheme in WITHOUT_EXPERTS)
    }  # fmt: skip


def forward(name, group, grouped, dtype):
    scheme, x = SCHEMES[name], torch.empty((ROWS, K), dtype=dtype, device=META)
    if not grouped:
        return scheme.linear(x, scheme.prepare(weight(name, N, K, group), dtype=dtype, device=META))
    weights = [weight(name, N, K, group, seed) for seed in range(EXPERTS)]
    counts = torch.empty(EXPERTS, dtype=torch.int64, device=META)
    return scheme.grouped(x, counts, scheme.prepare_experts(weights, dtype=dtype, device=META))


def record(case):
    with Recorder() as recorder:
        try:
            y = forward(*case)
        except (RuntimeError, TypeError, ValueError) as error:
            return {"calls": recorder.calls, "refused": f"{type(error).__name__}: {error}"[:600]}
    return {"calls": recorder.calls, "y": described(y)}


def bind(which):
    """Make framework.ops call through the dispatcher; return what keeps the registrations alive."""
    if which == "ours":
        register.ensure_registered("cpu")
        names = [name for name, namespace in OPERATORS.items() if namespace == "npu"]
        vars(ops).update({name: getattr(torch.ops.npu, name) for name in names})
        return None
    import torch_npu  # noqa: F401

    library = torch.library.Library("npu", "IMPL")
    for name in WITHOUT_META:
        library.impl(name, meta.KERNELS[f"npu::{name}"], "Meta")
    return library


def main():
    try:
        kept = bind(sys.argv[1])
    except (ImportError, OSError) as error:
        print(json.dumps({"absent": str(error)}))
        return
    print(json.dumps({name: record(case) for name, case in cases().items()}))
    del kept


if __name__ == "__main__":
    main()
