"""ModelSlim's own checkpoints: every header that the tool wrote, and models too large to have."""

import json
from time import perf_counter

import pytest

from framework.checkpoint.open import open_index
from framework.checkpoint.write import write_headers
from framework.families.base import modules
from framework.families.config import describe
from framework.formats.modelslim.layout import ModelslimLayout
from tests.formats.headers import CONFIGS, DESCRIPTION, GOLDEN, account, each, folders, headers, model_of, stood_in

WHOLE = [path.parent for path in GOLDEN.glob("tiny-qwen3*/modelslim-*/config.json")]
FOLDERS = sorted(path.relative_to(GOLDEN).as_posix() for path in WHOLE)
LAYOUT = ModelslimLayout()

STATIC8, DYNAMIC8, W4A8 = ("w8a8_static", 0, True), ("w8a8_dynamic", 0, True), ("w4a8_dynamic", 0, True)
# of each folder of the golden README: scheme, group and symmetry of the modules that a part of a name selects, first
# match; all others are float
EXPECTED = {
    "tiny-qwen3/modelslim-w8a8": {"_proj": STATIC8},
    "tiny-qwen3/modelslim-w8a8-quarot": {"_proj": STATIC8},
    "tiny-qwen3/modelslim-w8a8-smooth-asym": {"_proj": STATIC8},
    "tiny-qwen3/modelslim-w8a8-dynamic": {"_proj": DYNAMIC8},
    "tiny-qwen3/modelslim-w8a8-dynamic-c8": {"_proj": DYNAMIC8},
    "tiny-qwen3/modelslim-w4a4-dynamic": {"_proj": ("w4a4_dynamic", 0, True)},
    "tiny-qwen3/modelslim-w4a4-dynamic-packed": {"_proj": ("w4a4_dynamic", 0, True)},
    "tiny-qwen3/modelslim-w4a8-dynamic": {"_proj": W4A8},
    "tiny-qwen3/modelslim-w8a16": {"_proj": ("w8a16", 0, False)},
    "tiny-qwen3/modelslim-w4a16": {"_proj": ("w4a16", 0, False)},
    "tiny-qwen3/modelslim-w4a16-g64": {"_proj": ("w4a16", 64, False)},
    "tiny-qwen3/modelslim-mxfp8": {"_proj": ("mxfp8", 32, True)},
    "tiny-qwen3/modelslim-mxfp4": {"_proj": ("mxfp4", 32, True)},
    "tiny-qwen3/modelslim-mxfp4-dualscale": {"_proj": ("mxfp4_dualscale", 32, True)},
    "tiny-qwen3/modelslim-w4a8-mxfp": {"_proj": ("w4a8_mxfp", 32, True)},
    "tiny-qwen3/modelslim-mixed": {
        "layers.0.self_attn": STATIC8, "layers.0.mlp.down": ("w8a16", 0, False), "layers.0.mlp": DYNAMIC8,
        "layers.1.self_attn": DYNAMIC8, "layers.1.mlp.down": ("float", 0, True), "layers.1.mlp": STATIC8},
    "tiny-qwen3-moe/modelslim-w8a8-dynamic": {"_proj": DYNAMIC8},
    "tiny-qwen3-moe/modelslim-w4a8-dynamic": {".experts.": W4A8, "_proj": DYNAMIC8},
    "tiny-qwen3-moe/modelslim-w4a8-dynamic-g64": {"_proj": ("w4a8_dynamic", 64, True)},
    "tiny-qwen3-moe/modelslim-w4a4-dynamic": {".experts.": ("w4a4_dynamic", 0, True), "_proj": DYNAMIC8},
    "tiny-qwen3-moe/modelslim-mxfp8": {"_proj": ("mxfp8", 32, True)},
    "tiny-qwen3-moe/modelslim-mxfp4": {".experts.": ("mxfp4", 32, True), "_proj": ("mxfp8", 32, True)},
    "tiny-qwen3-moe/modelslim-mixed": {
        "layers.1.self_attn": ("float", 0, True), "self_attn": STATIC8, "down_proj": DYNAMIC8, "_proj": W4A8},
    "tiny-qwen3-moe-wide/modelslim-w4a8-dynamic": {".experts.": W4A8, "_proj": DYNAMIC8},
}  # fmt: skip


def test_every_golden_folder_of_this_format_is_known():
    assert set(EXPECTED) == set(folders("modelslim-"))


@pytest.mark.parametrize("folder", EXPECTED)
def test_what_the_tool_wrote_is_read_and_no_tensor_is_left_over(folder):
    index = headers(folder)
    model = model_of(index)
    held, ledger = account(LAYOUT, model, index)
    assert ledger.problems == () and LAYOUT.faults(model, index) == []
    kept_out = {name for name, _ in ledger.ignored}
    assert {*ledger.consumed, *kept_out} == set(index.tensors)
    assert all(".kv_cache_" in name for name in kept_out) and bool(kept_out) == folder.endswith("-c8")
    for module in each(model):
        known = EXPECTED[folder].items() if module.quantizable else ()
        wanted = next((one for part, one in known if part in module.name), ("float", 0, True))
        one = held[module.name]
        assert (one.scheme, one.group, one.symmetric) == wanted, module.name


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_recorded_headers_are_those_of_the_files(folder):
    opened, kept = open_index(GOLDEN / folder), headers(folder)
    found = ({name: (info.dtype, info.shape) for name, info in index.tensors.items()} for index in (opened, kept))
    assert next(found) == next(found) and opened.documents[DESCRIPTION] == kept.documents[DESCRIPTION]


def test_the_rotation_beside_the_weights_is_none_of_them(tmp_path):
    kept = headers("tiny-qwen3/modelslim-w8a8-quarot")
    assert kept.documents[DESCRIPTION]["optional"]["quarot"]["rotation_map"]["global_rotation"].startswith("optional/")
    entries = [(name, info.dtype, info.shape) for name, info in kept.tensors.items()]
    write_headers(tmp_path, entries, {"config.json": kept.config, **kept.documents})
    (tmp_path / "optional").mkdir()
    write_headers(tmp_path / "optional", [("global_rotation", "F32", (256, 256))], {})
    assert set(open_index(tmp_path).tensors) == set(kept.tensors)


@pytest.mark.parametrize(
    ("scheme", "published"),
    [("w8a8_dynamic", "Qwen3-30B-A3B"), ("w4a8_dynamic", "DeepSeek-R1"), ("mxfp4", "Qwen3-30B-A3B")],
)
def test_a_stand_in_of_a_published_model_closes(scheme, published):
    config = json.loads((CONFIGS / published / "config.json").read_text())
    model = list(modules(describe({key: value for key, value in config.items() if key != "quantization_config"})))
    started = perf_counter()
    index = stood_in(LAYOUT, model, scheme)
    held, ledger = account(LAYOUT, model, index)
    print(f"{published} in {scheme}: {len(index.tensors)} tensors in {perf_counter() - started:.1f} s")
    assert ledger.problems == () and set(ledger.consumed) == set(index.tensors)
    experts = [one.scheme for name, one in held.items() if ".mlp.experts." in name]
    assert set(experts) == {scheme} and len(experts) > 10000
