"""Every shipped recipe checks and plans without its model: format, rows and modules as typed here, for all 31 rows."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml

from framework import cli
from framework.checkpoint.write import write_gguf_headers, write_headers
from framework.families.config import describe
from framework.jobs.check import facts
from framework.jobs.common import open_checked, read_capability
from framework.planning.assume import assumed_indexes
from framework.planning.check import check
from framework.planning.make import make_plan
from framework.planning.parts import open_indexes
from framework.planning.plan import Plan
from framework.recipe.compose import compose
from framework.recipe.schema import Assume
from framework.report.check import check_text
from framework.report.plan import plan_text
from tests.capability.support import PUBLISHED, typed

ROOT = Path(__file__).parents[2]
PATHS = {str(p.relative_to(ROOT / "recipes").with_suffix("")): p for p in sorted((ROOT / "recipes").rglob("*.yaml"))}
# they name no published config: a model that is shipped, one that is fetched, one that the user names
WITHOUT_CONFIG = {"diffusion/digits", "diffusion/local", "quickstart", "llm/local"}

# Linears of a layer: 4 of attention (5 with latent attention), 3 of a dense feed-forward net, 3 an expert, a router.
QWEN8, QWEN14, QWEN32, QWEN25, LLAMA70 = 36 * 7, 40 * 7, 64 * 7, 28 * 7, 80 * 7
ATTENTION, ROUTERS, HEAD, EXPERTS = 48 * 4, 48, 1, 48 * 128 * 3  # Qwen3-30B-A3B
WAN, WAN_TOP = 2 * 40 * 10, 2 * 6  # two transformers: 8 linears of attention, 2 of the net; 5 of embedders, the output
FLOAT = "none.float.linear"


def words(name, bits):
    """Qwen3-30B-A3B in words of 4 or 8 bits; routers and head are float."""
    return {f"{name}.w{bits}a16.linear": ATTENTION, f"{name}.w{bits}a16.moe": EXPERTS, FLOAT: ROUTERS + HEAD}


# recipe: format, tier, ranks, modules by row; rows are supported but for those that say otherwise
TABLE = {
    # 28 blocks of 4 + 2 linears, a modulation and 2 of an embedder each; 2 at the end
    "diffusion/dit-xl-2-256": ("none", "a2", 2, {FLOAT: 28 * 9 + 2}),
    # 19 blocks of 8 + 4 linears and 2 modulations, 38 of 5 and 1; 8 of embedders, 2 at the end
    "diffusion/flux.1-dev-mxfp8": ("none", "a5", 4, {
        "diffusion.mxfp8.online": 19 * 12 + 38 * 5, FLOAT: 19 * 2 + 38 + 10}),
    # 60 blocks of 8 + 4 linears and 2 modulations; 4 of embedders, 2 at the end
    "diffusion/qwen-image": ("none", "a2", 2, {FLOAT: 60 * 14 + 6}),
    # 24 blocks of 8 + 4 linears and 2 modulations, the last without 3 of the text's; 13 with 4 more; embedders, the end
    "diffusion/sd3.5-medium": ("none", "a2", 2, {FLOAT: 24 * 14 - 3 + 13 * 4 + 5 + 2}),
    "diffusion/wan2.1-t2v-1.3b": ("none", "a2", 4, {FLOAT: 30 * 10 + 6}),
    "diffusion/wan2.2-i2v-a14b-mxfp8": ("none", "a5", 4, {"diffusion.mxfp8.online": WAN, FLOAT: WAN_TOP}),
    "diffusion/wan2.2-ti2v-5b-mxfp8": ("none", "a5", 4, {"diffusion.mxfp8.online": 30 * 10, FLOAT: 6}),
    "diffusion/wan2.2-t2v-a14b-mxfp4": ("modelslim", "a5", 2, {"modelslim.mxfp4.linear": WAN, FLOAT: WAN_TOP}),
    "diffusion/wan2.2-t2v-a14b-mxfp8": ("none", "a5", 2, {"diffusion.mxfp8.online": WAN, FLOAT: WAN_TOP}),
    "diffusion/wan2.2-t2v-a14b-mxfp8-offline": (
        "modelslim", "a5", 2, {"diffusion.mxfp8.offline": WAN, FLOAT: WAN_TOP}),
    "diffusion/wan2.2-t2v-a14b-w4a4": ("modelslim", "a2", 2, {"diffusion.w4a4_dynamic.offline": WAN, FLOAT: WAN_TOP}),
    "diffusion/wan2.2-t2v-a14b-w8a8": ("modelslim", "a2", 2, {
        "diffusion.w8a8_dynamic.offline": 2 * 40 * 8, "diffusion.w8a8_static.offline": 2 * 40 * 2, FLOAT: WAN_TOP}),
    "llm/deepseek-r1-w8a8": ("modelslim", "a3", 16, {
        "modelslim.w8a8_static.linear": 61 * 4, "modelslim.w8a8_dynamic.linear": 3 * 3 + 58 * 3,
        "modelslim.w8a8_dynamic.moe": 58 * 256 * 3, FLOAT: 61 + 58 + 1}),
    "llm/llama-3.1-70b": ("none", "a2", 4, {FLOAT: LLAMA70 + HEAD}),
    "llm/llama-3.1-70b-w8a8": (
        "compressed_tensors", "a2", 4, {"compressed_tensors.w8a8_dynamic.linear": LLAMA70, FLOAT: HEAD}),
    "llm/mixtral-8x7b": ("none", "a3", 4, {FLOAT: 32 * 4 + 32 + HEAD, "none.float.moe": 32 * 8 * 3}),
    "llm/qwen2.5-7b-gptq-int4": ("gptq", "a2", 2, {"gptq.w4a16.linear": QWEN25, FLOAT: HEAD}),
    "llm/qwen2.5-7b-gptq-int8": ("gptq", "a2", 2, {"gptq.w8a16.linear": QWEN25, FLOAT: HEAD}),
    "llm/qwen3-14b-q4_k_m": ("gguf", "a2", 2, {"gguf.all.linear": QWEN14 + HEAD}),
    "llm/qwen3-235b-a22b-w8a8": ("modelslim", "a2", 8, {
        "modelslim.w8a8_dynamic.linear": 94 * 4, "modelslim.w8a8_dynamic.moe": 94 * 128 * 3, FLOAT: 94 + HEAD}),
    "llm/qwen3-30b-a3b-autoround-w4a16": ("auto_round", "a2", 2, words("auto_round", 4)),
    "llm/qwen3-30b-a3b-autoround-w8a16": ("auto_round", "a2", 4, words("auto_round", 8)),
    "llm/qwen3-30b-a3b-awq": ("awq", "a2", 2, words("awq", 4)),
    "llm/qwen3-30b-a3b-gptq-int4": ("gptq", "a2", 2, words("gptq", 4)),
    "llm/qwen3-30b-a3b-gptq-int8": ("gptq", "a2", 4, words("gptq", 8)),
    "llm/qwen3-30b-a3b-mxfp8": ("modelslim", "a5", 2, {
        "modelslim.mxfp8.linear": ATTENTION, "modelslim.mxfp8.moe": EXPERTS, FLOAT: ROUTERS + HEAD}),
    "llm/qwen3-30b-a3b-q4_k_m": (
        "gguf", "a2", 2, {"gguf.all.linear": ATTENTION + ROUTERS + HEAD, "gguf.all.moe": EXPERTS}),
    "llm/qwen3-30b-a3b-w4a16-llmcompressor": ("compressed_tensors", "a2", 2, words("compressed_tensors", 4)),
    "llm/qwen3-30b-a3b-w4a4": ("modelslim", "a2", 2, {
        "modelslim.w8a8_dynamic.linear": ATTENTION, "modelslim.w4a4_dynamic.moe": EXPERTS * 2 // 3,
        "modelslim.w8a8_dynamic.moe": EXPERTS // 3, FLOAT: ROUTERS + HEAD}),
    "llm/qwen3-30b-a3b-w4a8": ("modelslim", "a2", 2, {
        "modelslim.w8a8_dynamic.linear": ATTENTION, "modelslim.w4a8_dynamic.moe": EXPERTS, FLOAT: ROUTERS + HEAD}),
    "llm/qwen3-30b-a3b-w4a8-llmcompressor": ("compressed_tensors", "a2", 2, {
        "compressed_tensors.w8a8_dynamic.linear": ATTENTION, "compressed_tensors.w4a8_dynamic.moe": EXPERTS,
        FLOAT: ROUTERS + HEAD}),
    "llm/qwen3-30b-a3b-w8a8": ("modelslim", "a3", 2, {
        "modelslim.w8a8_dynamic.linear": ATTENTION, "modelslim.w8a8_dynamic.moe": EXPERTS, FLOAT: ROUTERS + HEAD}),
    "llm/qwen3-30b-a3b-w8a8-llmcompressor": ("compressed_tensors", "a2", 2, {
        "compressed_tensors.w8a8_dynamic.linear": ATTENTION, "compressed_tensors.w8a8_dynamic.moe": EXPERTS,
        FLOAT: ROUTERS + HEAD}),
    "llm/qwen3-32b-autoround-w4a16": ("auto_round", "a2", 2, {"auto_round.w4a16.linear": QWEN32, FLOAT: HEAD}),
    "llm/qwen3-32b-mxfp4": ("modelslim", "a5", 2, {"modelslim.mxfp4.linear": QWEN32, FLOAT: HEAD}),
    "llm/qwen3-32b-mxfp8": ("modelslim", "a5", 2, {"modelslim.mxfp8.linear": QWEN32, FLOAT: HEAD}),
    "llm/qwen3-32b-w4a4": ("modelslim", "a2", 2, {"modelslim.w4a4_dynamic.linear": QWEN32, FLOAT: HEAD}),
    "llm/qwen3-32b-w8a8": ("modelslim", "a2", 4, {
        "modelslim.w8a8_static.linear": 64 * 4, "modelslim.w8a8_dynamic.linear": 64 * 3, FLOAT: HEAD}),
    "llm/qwen3-8b-autoround-w8a16": ("auto_round", "a2", 2, {"auto_round.w8a16.linear": QWEN8, FLOAT: HEAD}),
    "llm/qwen3-8b-awq": ("awq", "a2", 2, {"awq.w4a16.linear": QWEN8, FLOAT: HEAD}),
    "llm/qwen3-8b-awq-8bit": ("awq", "a2", 2, {"awq.w8a16.linear": QWEN8, FLOAT: HEAD}),
}  # fmt: skip
NOT_SUPPORTED = {"modelslim.mxfp8.moe": "wip", "compressed_tensors.w4a16.linear": "tbd"}
# thousands of experts, each with tensors of its own, take a second
WHOLE = [pytest.param(n, marks=pytest.mark.slow) if max(t[3].values()) > 10_000 else n for n, t in TABLE.items()]
ENOUGH_LAYERS = 5  # of a model with experts, written as files: DeepSeek's first three layers have none


@cache
def planned(name):
    checked = open_checked(compose([f"recipe={name}", "job=plan"]), headers_only=True)
    return checked, make_plan(checked, "npu")


def by_row(checked):
    found = Counter()
    for use in checked.rows:
        found[use.row] += use.modules
    return found


def test_every_recipe_is_in_the_table_and_every_published_row_in_a_recipe():
    assert set(PATHS) == set(TABLE) | WITHOUT_CONFIG
    published = set(typed(PUBLISHED))
    assert len(published) == 31
    assert published - {row for *_, rows in TABLE.values() for row in rows} == set()


@pytest.mark.parametrize("name", WHOLE)
def test_it_checks_and_plans_from_the_published_config(name):
    format_name, tier, ranks, rows = TABLE[name]
    checked, plan = planned(name)
    assert checked.problems == ()
    assert (checked.format, checked.capability.table.name) == (format_name, "default")
    assert by_row(checked) == rows
    for use in checked.rows:
        assert use.status == NOT_SUPPORTED.get(use.row, "supported"), use
        assert use.scheme == ("float" if use.row.startswith("gguf.all") else use.row.split(".")[1]), use
    assert (plan.format, plan.tier, plan.size, len(plan.ranks)) == (format_name, tier, ranks, ranks)
    held = Counter()
    for module in plan.modules:
        if module.row:
            held[module.row] += module.module.experts or 1
            assert module.op and len(module.shards) == plan.tp_size
    assert held == rows
    assert all(rank.fits for rank in plan.ranks)
    assert len(json.dumps(plan.to_json())) < 10_000_000
    online = {module.row for module in plan.modules if module.mode == "online"}
    assert online == {row for row in rows if row.endswith(".online")}


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("name", WHOLE)
def test_no_line_is_wider_than_the_terminal(name, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    checked, plan = planned(name)
    status = {use.row: use.status for use in checked.rows}
    shown = {"seconds": 1.0, "path": "runs/plan.json", "drawn": None, "status": status}
    for text in (check_text(checked.to_json(), facts(checked, 1.0)), plan_text(plan.to_json(), shown)):
        wide = [line for line in text.split("\n") if len(line) > columns or line != line.rstrip()]
        assert wide == []


@pytest.mark.parametrize("name", PATHS)
def test_an_editor_finds_its_schema_and_a_reader_its_command(name):
    first, second, *_ = PATHS[name].read_text(encoding="utf-8").splitlines()
    schema = PATHS[name].parent / first.removeprefix("# yaml-language-server: $schema=")
    jsonschema.Draft7Validator(json.loads(schema.read_text())).validate(yaml.safe_load(PATHS[name].read_text()))
    assert schema.resolve() == ROOT / "schemas" / "recipe.json"
    assert second.startswith(f"# python launch.py recipe={name}")


@pytest.mark.parametrize("name", ["llm/qwen3-8b-awq", "llm/qwen3-14b-q4_k_m", "diffusion/wan2.2-t2v-a14b-w8a8"])
def test_the_command_line_ends_well_and_leaves_the_plan(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([f"recipe={name}", "job=check", "job.format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert cli.main([f"recipe={name}", "job=plan", f"run.dir={tmp_path / 'run'}"]) == 0
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert Plan.from_json(written).modules == planned(name)[1].modules


def shortened(config, folder, layers):
    """Copy a published config, or the configs of a pipeline, with fewer layers (None: all)."""
    shutil.copytree(config if config.is_dir() else config.parent, folder)
    for file in folder.rglob("config.json"):
        held = json.loads(file.read_text())
        key = "num_layers" if "num_layers" in held else "num_hidden_layers"
        file.write_text(json.dumps(held | {key: min(layers or held[key], held[key])}))
    return folder if config.is_dir() else folder / config.name


def gguf_metadata(config):
    """The keys that llama.cpp's converter writes for Qwen3, dense and with experts."""
    arch = "qwen3moe" if "num_experts" in config else "qwen3"
    keys = {
        "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim", "attention.value_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
        "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    }  # fmt: skip
    floats = ("rms_norm_eps", "rope_theta")
    held = {f"{arch}.{key}": float(config[ours]) if ours in floats else config[ours]
            for key, ours in keys.items() if ours in config}  # fmt: skip
    return {
        "general.architecture": arch, "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.add_bos_token": False, **held,
    }  # fmt: skip


def written(indexes, folder):
    """Write the headers of each part as files; return where the model is."""
    folder.mkdir()
    for prefix, index in indexes.items():
        tensors = [(info.name, info.dtype, info.shape) for info in index.tensors.values()]
        if index.container == "gguf":
            write_gguf_headers(folder / "model.gguf", tensors, gguf_metadata(index.config))
            return folder / "model.gguf"
        (folder / prefix.rstrip(".")).mkdir(exist_ok=True)
        documents = {"config.json": index.config, **index.documents}
        write_headers(folder / prefix.rstrip("."), tensors, documents, shard_bytes=1 << 28)
    return folder


@pytest.mark.parametrize("name", TABLE)
def test_files_with_the_same_headers_check_alike(name, tmp_path):
    recipe = compose([f"recipe={name}", "job=plan"])
    assume, kind, rows = recipe.model.assume, recipe.model.kind, TABLE[name][3]
    deep = any(row.endswith(".moe") for row in rows)
    config = shortened(Path(assume.config), tmp_path / "config", ENOUGH_LAYERS if deep else None)
    given = {field: getattr(assume, field) for field in Assume.__slots__} | {"config": str(config)}
    indexes = assumed_indexes(Assume(**given), kind)
    path = written(indexes, tmp_path / "model")
    if kind == "diffusion":
        shutil.copy(config / "model_index.json", path)
    checked = check(recipe, open_indexes(path, kind), read_capability(recipe))
    assert checked.problems == () and checked.ledger.ignored == ()
    count = sum(len(index.tensors) for index in indexes.values())
    assert len(checked.ledger.consumed) == count
    assert set(by_row(checked)) == set(rows) and (deep or by_row(checked) == rows)
    assert checked.format == TABLE[name][0] and "from the config, not from a file" not in checked.notes
    if checked.model.decoder:
        said = describe(indexes[""].config)
        if checked.format == "gguf":  # which keeps it as fp32
            said = replace(said, norm_eps=float(np.float32(said.norm_eps)))
        assert checked.model.decoder == said
