"""Decode and prefill of one GGUF through this project, transformers and (if installed) llama-cpp-python, in one run.

Every engine is loaded once, in a process of its own; rounds of `--tokens` greedy tokens run on each engine in turn,
the starting order rotating. Printed: the median over rounds of each engine's tok/s, and our ratio to the others
within the same rounds (median, lowest, highest). Only ratios of one run mean anything.

    python benchmarks/compare.py MODEL.gguf --threads 1 --rounds 5
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Run = Callable[[list[int], int], tuple[float, float]]  # (ids, tokens) -> seconds to the first, median s a token

PROMPT = [
    1,
    4093,
    198,
    2683,
    359,
    253,
    5356,
    5646,
    11173,
    3365,
    3511,
    308,
    34519,
    28,
    7018,
    411,
    407,
    19712,
    8182,
    2,
]
PREFILL_TOKENS = 512


def load_ours(path: str, threads: int) -> Any:  # noqa: ANN401
    """Load the quickstart's schemes (w4a16 layers, w8a16 head), bf16 activations, one rank."""
    import torch

    from framework.checkpoint.open import open_index
    from framework.jobs.common import read_capability
    from framework.layers.group import Alone
    from framework.loading.load import load
    from framework.planning.check import check
    from framework.planning.make import make_plan
    from framework.recipe.compose import compose

    torch.set_num_threads(threads)
    overrides = [
        "recipe=quickstart",
        f'model.path="{path}"',
        "model.sha256=null",
        "parallel.tp_size=1",
        "runtime.context=2048",
        "runtime.max_batch=1",
        f"runtime.threads={threads}",
    ]
    recipe = compose(overrides)
    checked = check(recipe, {"": open_index(Path(path))}, read_capability(recipe))
    return load(make_plan(checked, "cpu"), Alone(), lambda done, total: None)


def ours(path: str, threads: int) -> Run:
    """This project."""
    from framework.engine.request import Finished, Request, SamplingParams

    model = load_ours(path, threads)
    gc.collect()
    gc.freeze()  # as a rank does

    def run(ids: list[int], tokens: int) -> tuple[float, float]:
        sampling = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        stamps = []
        start = time.perf_counter()
        for events in model.generate([Request(0, ids, sampling)]):
            stamps += [time.perf_counter() for event in events if not isinstance(event, Finished)]
        return stamps[0] - start, _median_step(stamps)

    return run


def floor(path: str, threads: int) -> Run:
    """This project's matrix products alone, each layer's once a token in order: no attention, no norms, no loop."""
    import torch

    from framework.layers.linear import ParallelLinear

    model = load_ours(path, threads)
    columns = {m.module.name: m.module.shape[1] for m in model.plan.modules}
    layers = [layer for layer in model.model.modules() if isinstance(layer, ParallelLinear)]
    inputs = {k: torch.randn(1, k, dtype=torch.bfloat16) for k in columns.values()}

    @torch.inference_mode()
    def token() -> None:
        for layer in layers:
            layer(inputs[columns[layer.names[0]]])

    def run(ids: list[int], tokens: int) -> tuple[float, float]:
        stamps = [time.perf_counter()]
        for _ in range(tokens):
            token()
            stamps.append(time.perf_counter())
        return stamps[1] - stamps[0], _median_step(stamps)

    return run


def hf(path: str, threads: int) -> Run:
    """Transformers, the GGUF dequantized at load, bf16 eager."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    folder, name = str(Path(path).parent), Path(path).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16).eval()

    def run(ids: list[int], tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        stamps = [time.perf_counter()]
        for _ in range(tokens - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            stamps.append(time.perf_counter())
        return stamps[0] - start, _median_step(stamps)

    return run


def llama_cpp(path: str, threads: int) -> Run:
    """llama.cpp through llama-cpp-python."""
    import numpy as np
    from llama_cpp import Llama, llama_get_logits_ith

    model = Llama(path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)

    def greedy() -> int:
        return int(np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).argmax())

    def run(ids: list[int], tokens: int) -> tuple[float, float]:
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        stamps = [time.perf_counter()]
        for _ in range(tokens - 1):
            model.eval([greedy()])
            stamps.append(time.perf_counter())
        return stamps[0] - start, _median_step(stamps)

    return run


ENGINES = {"ours": ours, "our matmuls": floor, "transformers": hf, "llama.cpp": llama_cpp}


def _median_step(stamps: list[float]) -> float:
    steps = [b - a for a, b in pairwise(stamps)]
    return statistics.median(steps) if steps else 0.0


def serve(name: str, path: str, threads: int, pipe: Connection) -> None:
    """Child process: load one engine, then answer (ids, tokens) with (seconds to first token, seconds a token)."""
    try:
        run = ENGINES[name](path, threads)
    except ImportError as error:
        pipe.send(f"not installed: {error}")
        return
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        pipe.send(run(*job))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(given.threads), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    context = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in given.engines:
        here, there = context.Pipe()
        context.Process(target=serve, args=(name, given.gguf, given.threads, there), daemon=True).start()
        there.close()  # else the end of a process that failed would be waited for
        try:
            said = here.recv()
        except EOFError:
            said = "failed, see above"
        if said == "ready":
            pipes[name] = here
        else:
            print(f"{name}: {said}")
    long_prompt = [(104729 + 7919 * i) % 40000 + 3 for i in range(PREFILL_TOKENS)]
    decode: dict[str, list[float]] = {name: [] for name in pipes}
    prefill: dict[str, list[float]] = {name: [] for name in pipes}
    names = list(pipes)
    for turn in range(given.rounds + 1):  # the first round warms up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            pipes[name].send((PROMPT, given.tokens))
            step_s = pipes[name].recv()[1]
            if turn:
                decode[name].append(1 / step_s)
            if name == "our matmuls":
                continue
            pipes[name].send((long_prompt, 1))
            first_s = pipes[name].recv()[0]
            if turn:
                prefill[name].append(PREFILL_TOKENS / first_s)
    for what, figures in (("decode", decode), (f"prefill {PREFILL_TOKENS}", prefill)):
        print(f"\n{what}, {given.threads} threads, {given.rounds} rounds, context {len(PROMPT)}")
        for name, speeds in figures.items():
            if not speeds:
                continue
            ratios = [a / b for a, b in zip(figures.get("ours", speeds), speeds, strict=True)]
            print(
                f"  {name:<14}{statistics.median(speeds):8.1f} tok/s   ours / it {statistics.median(ratios):5.2f} "
                f"[{min(ratios):.2f}-{max(ratios):.2f}]"
            )
    for pipe in pipes.values():
        pipe.send(None)


if __name__ == "__main__":
    main()
