"""What job=plan writes on a terminal."""

import copy

import pytest

from framework.report.fold import after, fold, ranges
from framework.report.plan import plan_text
from tests.jobs.plan_documents import planned, tiny

RECIPES = ("quickstart-like", "llm/deepseek-r1-w8a8", "llm/qwen3-30b-a3b-q4_k_m", "diffusion/wan2.2-t2v-a14b-w8a8")


def document_of(recipe):
    plan, status = tiny("parallel.tp_size=3") if recipe == "quickstart-like" else planned(f"recipe={recipe}")
    return plan.to_json(), {"seconds": 1.0, "path": "runs/plan.json", "drawn": None, "status": status}


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_line_is_wider_than_the_terminal(recipe, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = plan_text(*document_of(recipe))
    assert max(map(len, text.split("\n"))) <= columns
    assert not any(line != line.rstrip() for line in text.split("\n"))


@pytest.mark.parametrize("columns", ["80", "120"])
def test_layers_with_different_schemes_are_different_lines(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    document, facts = document_of("llm/deepseek-r1-w8a8")
    document = copy.deepcopy(document)
    for entry in document["modules"]:
        if entry["name"].endswith("o_proj") and int(entry["name"].split(".")[2]) >= 28:
            entry |= {"scheme": "float", "row": "none.float.linear", "op": "matmul"}
    lines = plan_text(document, facts).split("\n")
    found = [line.split() for line in lines if "o_proj " in line]
    assert [words[1] for words in found] == ["0-27", "28-60"]


def test_every_kind_of_module_says_how_it_runs(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    document, facts = document_of("llm/deepseek-r1-w8a8")
    text = plan_text(document, facts)
    lines = [" ".join(line.split()) for line in text.split("\n")]
    title = "w8a8_dynamic modelslim.w8a8_dynamic.moe, supported npu_dynamic_quant + npu_grouped_matmul"
    at = lines.index(title)
    # 2048 expert features over 16 ranks: 128 each
    assert lines[at + 1 : at + 3] == [
        "mlp.experts.*.gate_proj, up_proj 3-60 256 x [2048, 7168] W8A8_DYNAMIC [0:128, :] column",
        "mlp.experts.*.down_proj 3-60 256 x [7168, 2048] W8A8_DYNAMIC [:, 0:128] row + all-reduce",
    ]
    rank = document["ranks"][0]
    figures = [rank["weights_bytes"], rank["kv_cache_bytes"], rank["workspace_bytes"]]
    figures += [sum(figures), rank["load_peak_bytes"], rank["capacity_bytes"]]
    assert f"ranks 0-15 {' '.join(f'{figure / 2**30:.2f} GiB' for figure in figures)} 8/8 of 128/128 fits" in lines
    assert "every rank holds the whole latent cache" in text


def test_what_is_not_known_is_unknown(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    document, facts = document_of("quickstart-like")
    none = ("decode_s_at_best", "decode_tok_s_at_best", "prefill_tok_s_at_best", "bandwidth_tb_s", "peak_tflops_bf16")
    document["roofline"] |= dict.fromkeys(none)
    for rank in document["ranks"]:
        rank["capacity_bytes"] = 0
    text = plan_text(document, facts)
    assert "the bandwidth of a2 is unknown, so no time is given" in text
    assert "prefill: the bf16 peak of a2 is unknown" in text
    assert sum("unknown  " in line and "rank " in line for line in text.split("\n")) == 3
    assert all(f" {line}" in text for line in ("batch 1, empty context", "prefill as if every matrix product"))


def test_ranges():
    assert ranges([*range(28), 30]) == "0-27, 30"
    assert ranges([]) == ""
    assert ranges(range(0, 48, 2)) == "24 of 0-46"


def test_what_follows_a_split():
    document, _ = document_of("quickstart-like")
    follows = {kind.part: after(kind.entry) for kind in fold(document["modules"])}
    # a looked-up row is zeros elsewhere and is added; logits are put side by side
    assert follows["model.embed_tokens"] == follows["self_attn.o_proj"] == "all-reduce"
    assert follows["lm_head"] == "gather"
    assert follows["self_attn.q_proj"] == follows["model.norm"] == ""
    alone = tiny("parallel.tp_size=1")[0].to_json()
    assert not any(after(entry) for entry in alone["modules"])
