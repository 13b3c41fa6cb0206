"""Load a synthetic W4A16 mixture of experts (1 GB, Qwen3-MoE) rank by rank, against reading and unpacking it plainly.

The floor of a rank is measured in its own process on its own threads, around the load: reading its share of the
checkpoint's bytes once, and unpacking the nibbles of its share to int8 once with one torch expression a tensor.
Printed: the load against that floor, both by the clock and in processor time, which a shared machine disturbs less.
That floor uses one buffer again and again, and a load cannot do without new memory. So there are beside it the load
against a floor that reads the bytes into new memory and keeps them, as many as the rank holds, in a process like the
rank's; and the time of writing one byte to every page of as much new memory as the rank holds. Last the peak of memory
over what the process had before, against what the rank holds. Ratios of one run mean something, seconds do not: the
page cache serves the file, and the machine has the memory at hand. Of a virtual machine that is not so by itself: its
host may take back what is free, and give it again for several times the price of a load. `--cold` measures that.

    python benchmarks/load.py --format awq --threads 1
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing as mp
import os
import resource
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FORMATS = {"awq": "awq", "gptq": "gptq", "ct": "compressed_tensors", "modelslim": "modelslim"}
CODES = ("I32", "I8")  # containers of nibbles
READ_BYTES = 16 << 20


def write(folder: Path, format_name: str) -> None:
    """Write random codes, small positive scales and a config that its layout reads back as w4a16."""
    import numpy as np

    from framework.checkpoint.safetensors import DTYPE_BYTES
    from framework.checkpoint.write import CheckpointWriter
    from framework.families.base import modules
    from framework.families.config import describe
    from framework.formats.registry import LAYOUTS

    options = {"group_size": 128, "symmetric": format_name != "awq"}
    made = LAYOUTS[FORMATS[format_name]].stand_in(tuple(modules(describe(CONFIG))), "w4a16", options)
    documents = {**made.documents, "config.json": CONFIG | made.config}
    rng = np.random.default_rng(0)
    numbers = {"F16": np.float16(0.01).tobytes(), "BF16": b"\x24\x3c", "F32": np.float32(0.01).tobytes()}
    with CheckpointWriter(folder, made.tensors, documents) as writer:
        for name, dtype, shape in made.tensors:
            count = prod(shape)
            if dtype in numbers:
                data = b"\0\0\0\0"[: DTYPE_BYTES[dtype]] if "offset" in name else numbers[dtype]
                writer.put(name, data * count)
            elif name.endswith("qzeros"):
                # of GPTQ v1, symmetric: 8 less one
                word = b"\x77" * 4 if format_name == "gptq" else b"\x78" * 4
                writer.put(name, word * count)
            elif name.endswith("g_idx"):
                writer.put(name, (np.arange(count, dtype=np.int32) // 128).tobytes())
            elif name.endswith("weight_shape"):
                stem = name.removesuffix("weight_shape")
                packed = next(shape for key, _, shape in made.tensors if key == f"{stem}weight_packed")
                writer.put(name, np.array([packed[0], packed[1] * 8], np.int64).tobytes())
            else:
                writer.put(name, rng.bytes(count * DTYPE_BYTES[dtype]))


class Stopwatch:
    """Seconds by the clock, and of the processors."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Return both since the start."""
        return time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def floor(path: Path, share: int, keep: bool = False) -> tuple[float, float]:
    """Read 1 / share of a checkpoint's bytes, and unpack as much of its nibbles; return both times.

    `keep`: the bytes stay in memory of their own.
    """
    import torch

    from framework.checkpoint.open import open_index

    index, buffers = open_index(path), [torch.empty(READ_BYTES, dtype=torch.uint8)]
    watch = Stopwatch()
    for file in index.files:
        descriptor, left = os.open(file, os.O_RDONLY), file.stat().st_size // share
        while left > 0:
            if keep:
                buffers.append(torch.empty(READ_BYTES, dtype=torch.uint8))
            left -= os.readv(descriptor, [buffers[-1].numpy()[: min(left, READ_BYTES)]])
        os.close(descriptor)
    read = watch.read()
    sizes = [info.nbytes // share for info in index.tensors.values() if info.dtype in CODES]
    raw = torch.randint(0, 256, (max(sizes),), dtype=torch.uint8)
    watch = Stopwatch()
    for size in sizes:
        part = raw[:size]
        torch.stack((part & 15, part >> 4), dim=-1).view(torch.int8).sub_(8)
    unpack = watch.read()
    return read[0] + unpack[0], read[1] + unpack[1]


def have_at_hand(size: int) -> None:
    """Let the machine have free memory: another process takes it and gives it back."""
    if size:
        flags = "mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE"
        subprocess.run([sys.executable, "-c", f"import mmap; mmap.mmap(-1, {size}, {flags})"], check=True)


def touch(size: int) -> tuple[float, float]:
    """Write to every page of new memory; return both times."""
    watch = Stopwatch()
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for page in range(0, size, resource.getpagesize()):
            memory[page] = 1
        return watch.read()


class Rank:
    """A rank whose collectives are not called."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def measure_kept(path: Path, size: int, threads: int, free: int, results: Any) -> None:  # noqa: ANN401
    """Child process: the floor of one rank that keeps what it reads."""
    import torch

    torch.set_num_threads(threads)
    floor(path, size)
    floor(path, size)
    have_at_hand(free)
    results.put(floor(path, size, keep=True))


def measure(path: Path, rank: int, size: int, threads: int, free: int, dtype: str, results: Any) -> None:  # noqa: ANN401
    """Child process: one rank's floor and load."""
    import torch

    from framework import ops
    from framework.checkpoint.open import open_index
    from framework.jobs.common import read_capability
    from framework.loading.load import load
    from framework.planning.check import check
    from framework.planning.make import make_plan
    from framework.recipe.compose import compose

    torch.set_num_threads(threads)
    overrides = [f'model.path="{path}"', f"parallel.tp_size={size}", f"runtime.dtype={dtype}", "job=generate",
                 "runtime.context=256", "runtime.max_batch=1", "capability.allow=[tbd,wip]"]  # fmt: skip
    recipe = compose(["recipe=llm/local", *overrides])
    plan = make_plan(check(recipe, {"": open_index(path)}, read_capability(recipe)), "cpu")
    ops.npu_rms_norm(torch.ones(1, 8), torch.ones(8))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    floor(path, size)  # warms the page cache and the allocator
    floors = [floor(path, size)]
    have_at_hand(free)
    watch = Stopwatch()
    model = load(plan, Rank(rank, size), lambda done, total: None)  # type: ignore[arg-type]
    took = watch.read()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    floors.append(floor(path, size))
    mean = [sum(each) / len(floors) for each in zip(*floors, strict=True)]
    held = model.bytes_held()
    results.put((took, mean, touch(held), peak, held))


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=FORMATS, default="awq")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="take memory as the machine has it")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, or use the one that is there")
    given = parser.parse_args()
    # memory that is given back stays with its process: temporaries cost no fault again
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
    os.environ |= {"OMP_NUM_THREADS": str(given.threads), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    with tempfile.TemporaryDirectory() as temporary:
        path = (given.folder or Path(temporary)) / given.format
        if not path.exists():
            write(path, given.format)
        total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        kind = json.loads((path / "config.json").read_text()).get("quantization_config", {}).get("quant_method", "")
        free = 0 if given.cold else 2 * total // given.tp
        print(f"{given.format} {kind} {total / 1e9:.2f} GB, tp {given.tp}, {given.threads} threads, {given.dtype}")
        context, results = mp.get_context("spawn"), mp.get_context("spawn").Queue()
        for rank in range(given.tp):
            for target, arguments in (
                (measure, (path, rank, given.tp, given.threads, free, given.dtype, results)),
                (measure_kept, (path, given.tp, given.threads, free, results)),
            ):
                process = context.Process(target=target, args=arguments)
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit(process.exitcode)
            took, base, new, peak, held = results.get()
            kept = results.get()
            print(
                f"  rank {rank}: load {took[0]:6.2f} s ({took[1]:.2f} of processors), floor {base[0]:5.2f} s "
                f"({base[1]:.2f}), ratio {took[0] / base[0]:5.2f} ({took[1] / base[1]:.2f}), to the kept floor "
                f"{took[0] / kept[0]:5.2f} ({took[1] / kept[1]:.2f}); new memory {new[0]:5.2f} s; "
                f"peak {peak / 2**20:5.0f} MiB, held {held / 2**20:5.0f} MiB, over it {(peak - held) / 2**20:4.0f} MiB"
            )


if __name__ == "__main__":
    main()
