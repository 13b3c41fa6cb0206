"""Tokenizers of GGUF metadata against the conversion that transformers makes of the same file."""

import json
from pathlib import Path

import gguf
import pytest

from framework.checkpoint.open import open_index
from framework.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-qwen3" / "gguf-zoo" / "model.gguf"
SENTENCEPIECE = json.loads(Path(__file__).with_name("sentencepiece.json").read_text(encoding="utf-8"))
# composed characters only: transformers leaves out the composition that Qwen's own tokenizer does first
TEXTS = [
    "Hello world, it's WE'LL 123456 o'clock.  x",
    "naïve café 日本語 🙂🙂 Grüße\n\n\t x = {'a': [1, 2]};\r\n",
    "<|im_start|>user\nHi<|im_end|>\n <turn>a<tool> b",
    "CamelCaseWord snake_case_word",
]


def write(path, arch, keys):
    """A GGUF of one tensor and these tokenizer keys."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_vocab_size(len(keys["tokens"]))
    writer.add_tokenizer_model(keys["model"])
    writer.add_token_list(keys["tokens"])
    writer.add_token_types(keys["token_type"])
    if "pre" in keys:
        writer.add_tokenizer_pre(keys["pre"])
        writer.add_token_merges(keys["merges"])
    else:
        writer.add_token_scores(keys["scores"])
        writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_tokenizer(open_index(path))
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.chat_template == theirs.chat_template
    assert ours.eos_token == theirs.eos_token


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35", "deepseek-r1-qwen"])
@pytest.mark.filterwarnings("ignore")
def test_byte_level_ids_are_those_of_transformers(tmp_path, pre):
    metadata = open_index(GOLDEN).metadata
    keys = {name: list(metadata[f"tokenizer.ggml.{name}"]) for name in ("tokens", "merges", "token_type")}
    write(tmp_path / "m.gguf", "qwen3", {**keys, "model": "gpt2", "pre": pre})
    compare(tmp_path / "m.gguf")


@pytest.mark.parametrize(("arch", "name"), [("llama", "llama"), ("gemma3", "gemma"), ("phi3", "llama")])
@pytest.mark.filterwarnings("ignore")
def test_sentencepiece_ids_are_those_of_transformers(tmp_path, arch, name):
    model = SENTENCEPIECE[name]
    keys = {"model": "llama", "tokens": model["tokens"], "scores": model["scores"], "token_type": model["types"]}
    write(tmp_path / "m.gguf", arch, keys)
    compare(tmp_path / "m.gguf")
