"""Load on a server: how much more it answers to many than to one, how soon, and whether it holds on to anything.

`speed`: clients that each send one request after the other, one of them and several in turns. Printed: tokens a
second together, time to the first token and between pieces of text (median and 99th percentile), and the median ratio.
`soak`: many requests of mixed length, some of them given up midway. It fails where a request fails, where pages of the
cache are held at the end, or where the resident memory of the driver or of a rank has grown by more than 5 % since
the hundredth request.

    python benchmarks/serve.py speed
    python benchmarks/serve.py soak --requests 1000 --clients 16 runtime.max_batch=16
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from framework.cluster.processes import descendants

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("the", "of", "river", "seven", "green", "letters", "because", "machine", "under", "yellow", "house", "was")
LATE = 1.05  # memory at the end over memory at the hundredth request
CANCELLED_SHARE = 0.05


@dataclass
class Answer:
    """When each piece of text came, in seconds from the request; `done` with its end, `given_up` by us."""

    pieces_s: list[float] = field(default_factory=list)
    tokens: int = 0
    done: bool = False
    given_up: bool = False
    error: str = ""


@contextmanager
def served(overrides: list[str]) -> Iterator[tuple[str, str, int]]:
    """Run the server; yield its URL, the model's id and the driver's pid."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "launch.py"), "job=serve", "job.port=0", f"run.dir={folder}/run"]
        process = subprocess.Popen([*command, *overrides], stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stderr is not None
        said = ""
        while not (ready := re.search(r"serving +(\S+/v1) +model id (\S+)", said)):
            if not (line := process.stderr.readline()):
                sys.exit(f"the server did not start:\n{said}")
            said += line
        try:
            yield ready[1], ready[2], process.pid
        finally:
            process.send_signal(signal.SIGINT)
            said += process.communicate()[1]
            if process.returncode:
                sys.exit(f"the server ended with {process.returncode}:\n{said}")


async def ask(http: aiohttp.ClientSession, url: str, body: dict[str, object], give_up_at: int = 0) -> Answer:
    """Stream one answer; leave it after so many pieces, if that is not 0."""
    answer, begin = Answer(), time.perf_counter()
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with http.post(f"{url}/completions", json=asked) as response:
            if response.status != 200:
                answer.error = await response.text()
                return answer
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        answer.error = event["error"]["message"]
                        return answer
                    if event["usage"]:
                        answer.tokens = event["usage"]["completion_tokens"]
                    elif event["choices"][0]["text"]:
                        answer.pieces_s.append(time.perf_counter() - begin)
                answer.done = answer.done or line.startswith(b"data: [DONE]")
                if give_up_at and len(answer.pieces_s) >= give_up_at:
                    answer.given_up = True
                    return answer
    except aiohttp.ClientError as error:
        answer.error = repr(error)
    return answer


def prompt(number: int, words: int) -> str:
    """Return a text that no other number has."""
    source = random.Random(number)
    return " ".join(source.choice(WORDS) for _ in range(words))


def percentile(values: list[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def rounds(url: str, model: str, clients: int, each: int, tokens: int) -> float:
    """Let clients send requests one after the other; print what came, return tokens a second."""
    body = {"model": model, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    async with aiohttp.ClientSession() as http:

        async def client(number: int) -> list[Answer]:
            return [await ask(http, url, {**body, "prompt": prompt(number * each + i, 40)}) for i in range(each)]

        begin = time.perf_counter()
        answers = [a for found in await asyncio.gather(*map(client, range(clients))) for a in found]
        seconds = time.perf_counter() - begin
    if errors := [answer.error or "it broke off" for answer in answers if not answer.done]:
        sys.exit(f"{len(errors)} requests failed: {errors[0]}")
    first = [answer.pieces_s[0] for answer in answers]
    gaps = [b - a for answer in answers for a, b in zip(answer.pieces_s, answer.pieces_s[1:], strict=False)]
    speed = sum(answer.tokens for answer in answers) / seconds
    print(
        f"{clients:3d} clients  {speed:7.1f} tok/s   first token p50 {percentile(first, 0.5):.3f} s  "
        f"p99 {percentile(first, 0.99):.3f} s   between pieces p50 {statistics.median(gaps) * 1e3:.1f} ms  "
        f"p99 {percentile(gaps, 0.99) * 1e3:.1f} ms"
    )
    return speed


async def speed(url: str, model: str, given: argparse.Namespace) -> None:
    """One client and several take turns: a machine that others use too changes meanwhile."""
    await rounds(url, model, given.clients, 1, 8)
    ratios = []
    for _ in range(given.rounds):
        alone = await rounds(url, model, 1, given.each, given.tokens)
        ratios.append(await rounds(url, model, given.clients, given.each, given.tokens) / alone)
    found = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
    print(f"{given.clients} clients get {found} times the tokens of one")


def resident(driver: int) -> dict[str, float]:
    """Return MiB held by the driver and by each rank."""
    found = {"driver": _resident(driver)}
    ranks = [p.pid for p in descendants(driver) if Path(f"/proc/{p.pid}/cmdline").read_bytes().startswith(b"ray::Rank")]
    return found | {f"rank {i}": _resident(pid) for i, pid in enumerate(sorted(ranks))}


def _resident(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


async def soak(url: str, model: str, driver: int, given: argparse.Namespace) -> None:
    """Send many requests; exit with 1 if anything was lost or kept."""
    source, left, failed, given_up, tokens = random.Random(0), iter(range(given.requests)), [], 0, 0
    plan = [
        (source.randint(2, 120), source.randint(2, 2 * given.tokens), source.random() < CANCELLED_SHARE)
        for _ in range(given.requests)
    ]
    levels: list[tuple[int, dict[str, float]]] = []
    begin, ended = time.perf_counter(), 0
    async with aiohttp.ClientSession() as http:

        async def client() -> None:
            nonlocal given_up, tokens, ended
            for number in left:
                words, count, leave = plan[number]
                body = {"model": model, "temperature": 0, "max_tokens": count, "ignore_eos": True}
                answer = await ask(http, url, {**body, "prompt": prompt(number, words)}, count // 2 if leave else 0)
                tokens, given_up, ended = (
                    tokens + (answer.tokens or len(answer.pieces_s)),
                    given_up + answer.given_up,
                    ended + 1,
                )
                if not (answer.done or answer.given_up):
                    failed.append(answer.error or "it broke off")
                if ended % 100 == 0:
                    levels.append((ended, resident(driver)))
                    held = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in levels[-1][1].items())
                    print(f"{ended:5d} requests  {time.perf_counter() - begin:6.1f} s  {held}", flush=True)

        await asyncio.gather(*(client() for _ in range(given.clients)))
        deadline = time.monotonic() + 5
        while (pages := await used(http, url)) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
    growth = {name: mib / levels[0][1][name] for name, mib in levels[-1][1].items()}
    print(
        f"{given.requests} requests, {given_up} given up midway, {len(failed)} failed, {tokens} tokens, "
        f"{pages:.0f} pages held; memory since request {levels[0][0]}: "
        + ", ".join(f"{name} {value - 1:+.1%}" for name, value in growth.items())
    )
    if failed or pages or max(growth.values()) > LATE:
        sys.exit(failed[0] if failed else 1)


async def used(http: aiohttp.ClientSession, url: str) -> float:
    """Return the cache's pages that answers hold."""
    async with http.get(url.removesuffix("/v1") + "/metrics") as response:
        return sum(
            float(value) for value in re.findall(r"^kv_cache_pages_used\{.*\} (\S+)", await response.text(), re.M)
        )


def main() -> None:
    """Serve, send, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("speed", "soak"))
    parser.add_argument("--requests", type=int, default=1000, help="of soak")
    parser.add_argument("--clients", type=int, help="at once: 8 of speed, 16 of soak")
    parser.add_argument("--rounds", type=int, default=3, help="turns of speed")
    parser.add_argument("--each", type=int, default=2, help="requests of a client in a turn")
    parser.add_argument("--tokens", type=int, help="of an answer: 64 of speed, on average 12 of soak")
    parser.add_argument("overrides", nargs="*", help="of the recipe, quickstart if none is named")
    given = parser.parse_intermixed_args()
    given.clients = given.clients or {"speed": 8, "soak": 16}[given.what]
    given.tokens = given.tokens or {"speed": 64, "soak": 12}[given.what]
    recipe = [] if any(text.startswith("recipe=") for text in given.overrides) else ["recipe=quickstart"]
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    with served([*recipe, *given.overrides]) as (url, model, driver):
        asyncio.run(speed(url, model, given) if given.what == "speed" else soak(url, model, driver, given))


if __name__ == "__main__":
    main()
