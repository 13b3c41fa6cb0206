"""The picture of a plan: one file that needs nothing else, and says what plan.json says."""

import re
from collections import Counter
from xml.etree import ElementTree

import pytest

from tests.jobs.plan_documents import page, planned, tiny

DEEPSEEK = "recipe=llm/deepseek-r1-w8a8"
WAN = "recipe=diffusion/wan2.2-t2v-a14b-mxfp4"


def parsed(html):
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>"))


def of_class(root, name):
    return [found for found in root.iter() if name in found.get("class", "").split()]


@pytest.mark.parametrize(
    "given",
    [(DEEPSEEK,), (WAN,), ("recipe=llm/qwen3-32b-w8a8", "parallel.tp_size=64")],
    ids=["671b", "wan", "64 ranks"],
)
def test_large_plans_are_one_small_well_formed_file_with_every_module_once(given):
    plan, status = planned(*given)
    html = page(plan, status)
    assert len(html.encode()) < 300 << 10
    said = Counter(c.find("title").text.split("\n")[0] for row in of_class(parsed(html), "cells") for c in row)
    assert said == Counter(module.name for module in plan.modules)


def test_it_asks_nothing_of_a_network():
    html = page(*planned(WAN))
    assert not re.search(r"https?:|//|\bsrc=|\bhref=|<script|<link|@import", html)
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    ids = {found.get("id") for found in parsed(html).iter()}
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= ids


def test_a_hostile_name_is_text():
    name = "</title><script>alert(1)</script>\"'&{{ 7 * 7 }}"
    html = page(*tiny(), recipe=name, notes=[name])
    root = parsed(html)
    assert "<script" not in html
    assert root.find("head/title").text == f"plan {name}"
    assert root.find("body/header/h1").text == name
    assert name in [item.text for item in root.iter("li")]


@pytest.mark.parametrize("given", [(DEEPSEEK,), ("recipe=llm/qwen3-30b-a3b-w8a8", "parallel.tp_size=3")])
def test_bytes_are_those_of_the_plan(given):
    plan, status = planned(*given)
    root = parsed(page(plan, status))
    rows = [row for row in root.iter("tr") if len(list(row.iter("data"))) == 6]
    shown = [[int(cell.get("value")) for cell in row.iter("data")] for row in rows]
    assert shown == [
        [
            rank.weights_bytes,
            rank.kv_cache_bytes,
            rank.workspace_bytes,
            rank.weights_bytes + rank.kv_cache_bytes + rank.workspace_bytes,
            rank.load_peak_bytes,
            rank.capacity_bytes,
        ]
        for rank in plan.ranks
    ]


def test_bars_are_as_long_as_their_bytes():
    plan, status = planned("recipe=llm/qwen3-30b-a3b-w8a8", "parallel.tp_size=3")
    root = parsed(page(plan, status))
    bars = [bar for bar in of_class(root, "m-weights_bytes") if bar.find("title") is not None]
    limit = next(line for line in of_class(root, "limit") if line.find("title") is not None)
    capacity = float(limit.get("x1")) - float(bars[0].get("x"))
    assert len(bars) == 3
    for bar, rank in zip(bars, plan.ranks, strict=True):
        assert float(bar.get("width")) == pytest.approx(rank.weights_bytes / rank.capacity_bytes * capacity, abs=0.5)


def test_where_little_is_used_the_axis_ends_with_it():
    plan, status = tiny("runtime.context=256", "runtime.max_batch=1")
    root = parsed(page(plan, status))
    assert not [line for line in of_class(root, "limit") if line.find("title") is not None]
    assert "right of this axis" in "".join(root.itertext())


def test_what_a_token_reads_is_in_proportion_to_the_weights():
    # all float in bf16: bytes are as N times K; embedding rows are looked up and not counted
    plan, status = tiny()
    root = parsed(page(plan, status))
    bars = {}
    for svg in root.iter("svg"):
        if svg.findtext("title") == "Bytes of weights that a token reads":
            bars = {bar.findtext("title").split()[0]: float(bar.get("width")) for bar in svg.iter("rect")}
    weights = Counter()
    for module in plan.modules:
        part = re.sub(r"^model\.(layers\.\d+\.)?", "", module.name)
        weights[part] += module.module.shape[0] * module.module.shape[1]
    assert "embed_tokens" not in bars
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        assert bars[part] / bars["mlp.up_proj"] == pytest.approx(weights[part] / weights["mlp.up_proj"], rel=0.01)


def test_equal_ranks_beyond_32_are_one_bar_a_node():
    plan, status = planned("recipe=llm/qwen3-32b-w8a8", "parallel.tp_size=64")
    bars = [b for b in of_class(parsed(page(plan, status)), "m-weights_bytes") if b.find("title") is not None]
    assert len(bars) == len({rank.node for rank in plan.ranks}) == 8


def test_unconfirmed_rows_are_marked():
    given = ["quantization.layers=[{pattern: '*.o_proj', scheme: float},{pattern: '*', scheme: auto}]"]
    plan, status = tiny(*given)
    marked = {found.text for found in of_class(parsed(page(plan, dict.fromkeys(status, "tbd"))), "warn")}
    assert marked == {"tbd"}
    assert not of_class(parsed(page(plan, dict.fromkeys(status, "supported"))), "warn")
