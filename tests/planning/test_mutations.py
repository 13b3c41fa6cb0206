"""Whatever stands in headers, descriptions and configs: a check ends in a verdict or a UserError, soon and small."""

import json
import resource
import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from math import inf, nan
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framework.checkpoint.open import open_index
from framework.checkpoint.write import header_of
from framework.errors import UserError
from framework.jobs.common import read_capability
from framework.planning.check import check
from framework.planning.parts import open_indexes
from framework.recipe.compose import compose
from tests.checkpoints import GOLDEN, MOE, golden, stand_in

SECONDS, GIB = 10, 1 << 30
# A checkpoint of each format, as its tool wrote it or would write it, dense and with experts.
SEEDS = {
    "modelslim": lambda: golden("tiny-qwen3/modelslim-mixed"),
    "modelslim experts": lambda: stand_in("modelslim", "w4a8_dynamic", MOE),
    "awq": lambda: golden("tiny-qwen3/awq-w4g64-skip"),
    "awq of 8 bits": lambda: golden("tiny-qwen3/awq-w8g128"),
    "gptq": lambda: golden("tiny-qwen3/gptq-dynamic"),
    "gptq experts": lambda: golden("tiny-qwen3-moe/gptq-w4g64-sym"),
    "auto-round": lambda: golden("tiny-qwen3/ar-mixed"),
    "compressed-tensors": lambda: golden("tiny-qwen3/ct-mixed"),
    "compressed-tensors experts": lambda: stand_in("compressed_tensors", "w4a16", MOE),
    "none": lambda: stand_in("none", "float"),
}
GGUFS = ("tiny-qwen3/gguf-q4_k_m", "tiny-qwen3-moe/gguf-q4_k_m-1l")
PIPELINE = GOLDEN / "diffusion" / "tiny-wan2.2"

numbers = st.sampled_from([0, 1, -1, 2, 3, 7, 16, 100, 255, 4096, 1 << 20, 1 << 31, 10**12, 1 << 63, 10**30, 0.5, 1e300,
                           -0.0, nan, inf])  # fmt: skip
words = st.sampled_from(["", "int", "float", "weight", "re:(", "re:.*", "*", "Linear", "0", "-1", "1e9", "W8A8_DYNAMIC",
                         "model.layers.0", "BF16", "I32", "gptq", "awq", "dense", "yarn", "linear", "ü"])  # fmt: skip
leaves = st.one_of(st.none(), st.booleans(), numbers, words, st.text(max_size=4))
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=5
)
# How to come to a place in a document, what to do there, and with which value
mutations = st.tuples(
    st.lists(st.integers(0, 1 << 16), min_size=1, max_size=5),
    st.sampled_from(["put", "put", "drop", "rename", "add", "swap", "wrap"]),
    values,
)


def mutate(tree, mutation):
    """Change one place of a JSON document, in place."""
    path, change, value = mutation
    for i, step in enumerate(path):
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = keys[step % len(keys)]
        if i + 1 < len(path) and isinstance(tree[key], dict | list):
            tree = tree[key]
            continue
        other = keys[(step + 1) % len(keys)]
        match change:
            case "put":
                tree[key] = value
            case "drop":
                del tree[key]
            case "swap":
                tree[key], tree[other] = tree[other], tree[key]
            case "wrap":
                tree[key] = [tree[key]]
            case "rename" if isinstance(tree, dict):
                tree[f"{key}x" if not isinstance(value, str) else value] = tree.pop(key)
            case "add" if isinstance(tree, dict):
                tree[str(value)] = tree[key]
        return


@contextmanager
def bounded():
    """Fail where the block takes long or much memory."""

    def late(number, frame):
        raise TimeoutError(f"not done after {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIB


@cache
def recipe(kind="llm"):
    """A recipe that asks for everything at once, and what it is judged by."""
    made = compose(["recipe=llm/local", "model.path=/x", f"model.kind={kind}", "job=check", "parallel.tp_size=2",
                    "capability.allow=[tbd,wip]", "hardware=a5"])  # fmt: skip
    return made, read_capability(made)


def judged(indexes, kind="llm"):
    """Check; the verdict, or None where it was refused at once. Anything else is what the tests look for."""
    try:
        return check(recipe(kind)[0], indexes(), recipe(kind)[1]).to_json()
    except UserError as error:
        assert error.problems
        return None


@cache
def documents_of(seed):
    """The header and every document of a seed, as text: a copy is parsed for each example."""
    checkpoint = SEEDS[seed]()
    raw, size = header_of([(name, dtype, tuple(shape)) for name, (dtype, shape) in checkpoint.tensors.items()])
    found = {"model.safetensors": json.loads(raw[8:]), "config.json": checkpoint.config} | checkpoint.documents
    return json.dumps(found), size


def written(folder, documents, size):
    """Write the header and holes for the data, and the documents beside it."""
    for name, content in documents.items():
        text = json.dumps(content).encode()
        with (folder / name).open("wb") as file:
            if name.endswith(".safetensors"):
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + size)
            else:
                file.write(text)


few = settings(max_examples=140, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("seed", SEEDS)
@few
@given(changes=st.lists(st.tuples(st.integers(0, 5), mutations), min_size=1, max_size=4))
def test_a_mutated_safetensors_checkpoint_is_judged(seed, changes):
    text, size = documents_of(seed)
    documents = json.loads(text)
    for which, mutation in changes:
        mutate(documents[list(documents)[which % len(documents)]], mutation)
    with TemporaryDirectory() as folder, bounded():
        written(Path(folder), documents, size)
        judged(lambda: open_indexes(Path(folder), "llm"))


@pytest.mark.parametrize("name", GGUFS)
@few
@given(changes=st.lists(mutations, min_size=1, max_size=3))
def test_mutated_gguf_metadata_are_judged(name, changes):
    index = open_index(GOLDEN / name)
    own = {key: value for key, value in index.metadata.items() if not key.startswith("tokenizer.ggml.")}
    for path, change, value in changes:
        mutate(own, (path[:1], change, value))
    metadata = {key: value for key, value in own.items() if not isinstance(value, dict | None)}
    with bounded():
        judged(lambda: {"": replace(index, metadata=metadata)})


@pytest.mark.parametrize("name", GGUFS)
@few
@given(changes=st.lists(st.tuples(st.integers(-2048, 2048), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_a_gguf_with_other_bytes_is_judged(name, changes, tmp_path_factory):
    content, data = _gguf(name)
    raw = bytearray(content)
    for step, bytes_there in changes:  # of the first keys, or of the table of tensors, which ends before the data
        place = step if step >= 0 else data + step
        raw[place : place + len(bytes_there)] = bytes_there
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(raw)
    with bounded():
        judged(lambda: open_indexes(path, "llm"))


@cache
def _gguf(name):
    index = open_index(GOLDEN / name)
    return index.root.read_bytes(), min(info.offset for info in index.tensors.values())


@few
@given(changes=st.lists(st.tuples(st.integers(0, 2), mutations), min_size=1, max_size=4))
def test_a_mutated_pipeline_is_judged(changes):
    names = ["model_index.json", "transformer/config.json", "transformer_2/config.json"]
    documents = [json.loads((PIPELINE / name).read_text()) for name in names]
    for which, mutation in changes:
        mutate(documents[which], mutation)
    with TemporaryDirectory() as folder, bounded():
        for name, content in zip(names, documents, strict=True):
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        for part in ("transformer", "transformer_2"):
            weights = "diffusion_pytorch_model.safetensors"
            (Path(folder) / part / weights).symlink_to(PIPELINE / part / weights)
        judged(lambda: open_indexes(Path(folder), "diffusion"), "diffusion")
