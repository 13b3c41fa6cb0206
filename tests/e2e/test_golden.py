"""Checkpoints of the real quantizers, whole models: logits against the recorded fp32 forward pass."""

from pathlib import Path

import numpy as np
import pytest

from framework.loading.load import load
from tests.plans import checked_for, plan_for
from tests.threads import on_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-qwen3"
FOLDERS = [*sorted(GOLDEN.glob("gguf-*")), GOLDEN / "base"]


def model_path(folder):
    return next(iter(sorted(folder.glob("*.gguf"))), folder)


def scores(plan, prompts):
    def work(group):
        model = load(plan, group, lambda done, total: None)
        return [model.score(ids) for ids in prompts]

    return on_ranks(plan.tp_size, work)[0]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_logits_are_those_of_the_dequantized_weights_at_every_size(folder, tp_size):
    with np.load(folder / "reference.npz") as reference:
        key = "logits_dequant_fp32" if "prompt0.logits_dequant_fp32" in reference.files else "logits"
        prompts = [reference[f"prompt{k}.input_ids"].tolist() for k in (0, 1)]
        expected = [reference[f"prompt{k}.{key}"] for k in (0, 1)]
    ours = scores(plan_for(model_path(folder), tp_size=tp_size, dtype="float32"), prompts)
    for logits, right in zip(ours, expected, strict=True):
        # golden README: summation order only, typical 5e-6
        assert np.abs(logits - right).max() <= 1e-3


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_check_accounts_for_every_tensor(folder):
    checked = checked_for(model_path(folder))
    assert checked.ok, checked.problems
    assert len(checked.ledger.consumed) == len(checked.index.tensors)
    gguf = folder.name.startswith("gguf")
    assert {use.row for use in checked.rows} == {"gguf.all.linear" if gguf else "none.float.linear"}


def test_blocks_of_32_kept_packed_give_the_same_logits():
    folder = GOLDEN / "gguf-q4_0-split-1l"
    with np.load(folder / "reference.npz") as reference:
        ids, expected = reference["prompt0.input_ids"].tolist(), reference["prompt0.logits_dequant_fp32"]
    packed = ['quantization.layers=[{pattern: "*.mlp.*", scheme: w4a16}]', "capability.allow=[tbd]"]
    for tp_size in (1, 2, 3):
        plan = plan_for(model_path(folder), *packed, tp_size=tp_size, dtype="float32")
        assert {m.scheme for m in plan.modules if ".mlp." in m.module.name} == {"w4a16"}
        assert np.abs(scores(plan, [ids])[0] - expected).max() <= 1e-3


def test_in_bf16_the_packed_weights_stay_close():
    folder = GOLDEN / "gguf-q4_0-split-1l"
    with np.load(folder / "reference.npz") as reference:
        ids, expected = reference["prompt0.input_ids"].tolist(), reference["prompt0.logits_dequant_fp32"]
    packed = ['quantization.layers=[{pattern: "*.mlp.*", scheme: w4a16}]', "capability.allow=[tbd]"]
    ours = scores(plan_for(model_path(folder), *packed, tp_size=2, dtype="bfloat16"), [ids])[0]
    # bf16 keeps 8 bits: a few thousandths of the largest logit per layer
    assert np.abs(ours - expected).max() <= 0.02 * np.abs(expected).max()
