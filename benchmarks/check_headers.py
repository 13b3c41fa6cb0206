"""Check and plan models of 671 B parameters from headers alone, each command in a process of its own.

Two checkpoints are written as header-only files: DeepSeek-R1 with the experts' down projections at MXFP8 (60,000
tensors in 160 files) and with every expert at W8A8 (136,000 tensors). Printed: wall time, CPU time and peak memory of
the best of the rounds, against their bars, and the size of the plan. Wall time means something on an idle machine only.

    python benchmarks/check_headers.py --rounds 5
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes" / "assets" / "configs" / "DeepSeek-R1" / "config.json"
PLAN_BYTES = 10_000_000


@dataclass(frozen=True)
class Headers:
    """A header-only checkpoint: how `model.assume` describes it, in how many files, what the recipe must add."""

    name: str
    layers: tuple[tuple[str, str], ...]
    files: int
    overrides: tuple[str, ...]
    bar_s: float
    bar_mb: float


SETS = (
    Headers("mixed", (("*.mlp.experts.*.down_proj", "mxfp8"), ("*", "float")), 160,
            ("hardware=a5", "capability.allow=[wip]"), 2.0, 400.0),
    Headers("w8a8", (("*.kv_b_proj", "float"), ("*.self_attn.*", "w8a8_static"), ("*", "w8a8_dynamic")), 160,
            ("hardware=a3",), 4.0, 400.0),
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What one command took."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def write(headers: Headers, folder: Path) -> int:
    """Write the files of a set into an existing folder; return the number of tensors."""
    from framework.checkpoint.write import write_headers
    from framework.planning.assume import assumed_indexes
    from framework.recipe.schema import Assume, LayerRule

    rules = tuple(LayerRule(pattern, scheme) for pattern, scheme in headers.layers)
    (index,) = assumed_indexes(Assume(str(CONFIG), "modelslim", layers=rules), "llm").values()
    tensors = [(info.name, info.dtype, info.shape) for info in index.tensors.values()]
    documents = {"config.json": index.config, **index.documents}
    write_headers(folder, tensors, documents, shard_bytes=index.total_bytes // headers.files)
    return len(tensors)


def run(*overrides: str) -> Cost:
    """Run the command line once, as a user does."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / "launch.py"), *overrides], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(overrides)} ended with {process.returncode}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def main() -> None:
    """Write, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        runs: list[tuple[str, list[str], float, float]] = []
        for headers in SETS:
            folder = Path(scratch) / headers.name
            folder.mkdir()
            with multiprocessing.get_context("spawn").Pool(1) as apart:  # a child's peak memory begins at its parent's
                count = apart.apply(write, (headers, folder))
            print(f"{headers.name}: {count} tensors in {len(list(folder.glob('*.safetensors')))} files")
            local = ["recipe=llm/local", f"model.path={folder}", "parallel.tp_size=32", *headers.overrides]
            runs.append((f"check {headers.name}", [*local, "job=check"], headers.bar_s, headers.bar_mb))
        shipped = "recipe=llm/deepseek-r1-w8a8"
        plan = Path(scratch) / "run"
        runs.append(("check from the config", [shipped, "job=check"], 2.0, 400.0))
        runs.append(("plan from the config", [shipped, "job=plan", f"run.dir={plan}"], 2.0, 400.0))
        for name, overrides, bar_s, bar_mb in runs:
            best = min((run(*overrides) for _ in range(rounds)), key=lambda cost: cost.wall_s)
            print(
                f"{name:24}{best.wall_s:6.2f} s wall (bar {bar_s:.0f}){best.cpu_s:6.2f} s CPU"
                f"{best.peak_mb:7.0f} MB (bar {bar_mb:.0f})"
            )
        size = (plan / "plan.json").stat().st_size
        print(f"plan.json: {size / 1e6:.2f} MB (bar {PLAN_BYTES / 1e6:.0f})")


if __name__ == "__main__":
    main()
