"""The README's main command, against transformers running the same dequantized weights."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from framework.engine.request import Finished, Request, SamplingParams
from framework.loading.load import load
from framework.planning.make import make_plan
from tests.plans import checked_for
from tests.threads import on_ranks

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.network, pytest.mark.slow]
CHAT = "Explain in two sentences why the sky is blue."
PLAIN = "The three primary colours are"
PACKED = [
    'quantization.layers=[{pattern: lm_head, scheme: w8a16}, {pattern: "model.layers.*", scheme: w4a16}]',
    "capability.allow=[tbd]",
]  # fmt: skip


@pytest.fixture(scope="module")
def reference(quickstart_model):
    """Prompt ids and greedy continuations of transformers, fp32, weights dequantized by its own reader."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from framework.checkpoint.open import open_index
    from framework.text.chat import render_chat
    from framework.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(open_index(quickstart_model))
    text = render_chat(
        tokenizer.chat_template, [{"role": "user", "content": CHAT}],
        bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
    )  # fmt: skip
    prompts = [tokenizer.encode(text, add_special=False), tokenizer.encode(PLAIN, add_special=True)]
    # its reader of GGUF by hand: from_pretrained takes it with accelerate alone
    config = AutoConfig.for_model(**load_gguf_checkpoint(str(quickstart_model))["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    read = load_gguf_checkpoint(str(quickstart_model), return_tensors=True, model_to_load=model)
    assert set(model.state_dict()) - {"lm_head.weight"} <= set(read["tensors"])
    model.load_state_dict({name: tensor.float() for name, tensor in read["tensors"].items()}, strict=False)
    found = []
    with torch.no_grad():
        for ids in prompts:
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=[0, 2], pad_token_id=2
            )  # fmt: skip
            found.append((ids, out[0, len(ids) :].tolist(), model(torch.tensor([ids])).logits[0].numpy()))
    return found


def generate(plan, prompts):
    def work(group):
        model = load(plan, group, lambda done, total: None)
        requests = [Request(i, ids, SamplingParams(max_new_tokens=64)) for i, ids in enumerate(prompts)]
        events = [event for step in model.generate(requests) for event in step]
        finished = {e.index: e.token_ids for e in events if isinstance(e, Finished)}
        return [finished[i] for i in range(len(prompts))] if group.rank == 0 else None

    return on_ranks(plan.tp_size, work)[0]


@pytest.mark.parametrize("rules", [[], PACKED], ids=["auto", "kept packed"])
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_greedy_tokens_in_fp32_are_those_of_transformers(quickstart_model, reference, tp_size, rules):
    size = [
        f"parallel.tp_size={tp_size}",
        "runtime.dtype=float32",
        "runtime.context=256",
        "runtime.max_batch=2",
    ]
    plan = make_plan(checked_for(quickstart_model, *size, *rules), "cpu")
    ours = generate(plan, [ids for ids, _, _ in reference])
    assert ours == [tokens for _, tokens, _ in reference]


def test_four_bits_in_bf16_stay_within_a_hundredth_of_a_nat(quickstart_model, reference):
    size = ["parallel.tp_size=2", "runtime.context=256", "runtime.max_batch=2"]
    plan = make_plan(checked_for(quickstart_model, *size, *PACKED), "cpu")

    def work(group):
        model = load(plan, group, lambda done, total: None)
        return [model.score(ids) for ids, _, _ in reference]

    for ours, (_, _, logits) in zip(on_ranks(2, work)[0], reference, strict=True):
        right = torch.log_softmax(torch.from_numpy(logits), -1)
        kl = (right.exp() * (right - torch.log_softmax(torch.from_numpy(np.array(ours)), -1))).sum(-1).mean()
        assert float(kl) < 1e-2


@pytest.mark.ray
def test_the_main_command_streams_an_answer_and_leaves_a_complete_run_directory(quickstart_model, tmp_path):
    command = [sys.executable, str(ROOT / "launch.py"), "recipe=quickstart", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "results.jsonl").read_text())
    assert list(result) == [
        "index", "prompt", "text", "token_ids", "finish_reason", "prompt_tokens", "ttft_s", "tok_s"
    ]  # fmt: skip
    assert done.stdout.strip() == result["text"].strip()  # piped: the text alone
    assert "Paris" in result["text"]
    for name in ("recipe.yaml", "overrides.txt", "plan.json", "log.txt", "versions.json", "metrics.json"):
        assert (tmp_path / "run" / name).is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    for noise in ("WARNING", "Traceback", "ray", "NPU type"):
        assert noise not in done.stderr
    assert "exact, not speed" in done.stderr
