"""What the server says greedily is what job=generate says: alone, and among many at once; whole and streamed."""

import asyncio
import json
import subprocess
import sys

import pytest

from tests.serving.running import ROOT, TINY, serving

pytestmark = pytest.mark.slow
COUNT = 32
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards box with quartz and vex my daft jockey "
PROMPTS = [(TEXT * 3)[7 * i : 7 * i + 3 + 29 * i % 201].strip() for i in range(COUNT)]
MOST = 32
SETTINGS = ("runtime.dtype=float32", "runtime.context=512")


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The results of job=generate, by prompt."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    given = [f"job.prompt_file={folder / 'prompts.txt'}", "job.chat=false", f"job.max_new_tokens={MOST}"]
    command = [sys.executable, str(ROOT / "launch.py"), "recipe=llm/local", f"model.path={TINY}", *SETTINGS, *given]
    subprocess.run([*command, f"run.dir={folder / 'run'}", "job.temperature=0"], check=True, capture_output=True)
    return [json.loads(line) for line in (folder / "run" / "results.jsonl").read_text().splitlines()]


def test_greedy_text_is_that_of_generate(generated):
    with serving(*SETTINGS, f"runtime.max_batch={COUNT}") as server:
        options = {"model": "local", "temperature": 0, "max_tokens": MOST, "logprobs": 0}

        async def whole(client, i):
            choice = (await client.completions.create(**options, prompt=PROMPTS[i])).choices[0]
            return choice.text, choice.logprobs.tokens, choice.finish_reason

        async def streamed(client, i):
            text, tokens, reason = "", [], None
            async for chunk in await client.completions.create(**options, prompt=PROMPTS[i], stream=True):
                choice = chunk.choices[0]
                text, reason = text + choice.text, choice.finish_reason or reason
                tokens += choice.logprobs.tokens if choice.logprobs else []
            return text, tokens, reason

        async def work():
            async with server.async_client() as client:
                alone = [await whole(client, i) for i in range(0, COUNT, 8)]
                together = await asyncio.gather(*[(whole, streamed)[i % 2](client, i) for i in range(COUNT)])
            return alone, together

        alone, together = asyncio.run(work())
    assert alone == together[::8]
    assert len(generated) == COUNT
    for (text, tokens, reason), expected in zip(together, generated, strict=True):
        assert (text, reason) == (expected["text"], expected["finish_reason"])
        assert len(tokens) == len(expected["token_ids"])
