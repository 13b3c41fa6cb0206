import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from framework.checkpoint.index import Index
from framework.checkpoint.open import open_index
from framework.errors import InputError
from framework.text.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-qwen3"
BOTH = pytest.mark.parametrize("path", [GOLDEN / "base", GOLDEN / "gguf-zoo" / "model.gguf"], ids=["folder", "gguf"])
# pieces and scores of models that sentencepiece 0.2.3 trained on our own source, and what it makes of texts
SENTENCEPIECE = json.loads(Path(__file__).with_name("sentencepiece.json").read_text(encoding="utf-8"))
TEXTS = [
    "Hello world, it's 12345 o'clock.",
    "naïve café 日本語 🙂🙂  \n\n\t x",
    "<|im_start|>user\nHi<|im_end|>\n",
    "",
]


def gguf_index(**keys):
    """An index of a GGUF with these keys; `arch` is its architecture."""
    arch = keys.pop("arch", "llama")
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return Index(Path("model.gguf"), "gguf", {}, {"general.architecture": arch, **metadata})


def folder_without(tmp_path, *names):
    """A copy of the golden folder's small files."""
    shutil.copytree(GOLDEN / "base", tmp_path / "model", ignore=lambda *_: ["model.safetensors", *names])
    return tmp_path / "model"


def refused(index):
    with pytest.raises(InputError) as error:
        load_tokenizer(index)
    (problem,) = error.value.problems
    return problem


@BOTH
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_the_models_own_tokenizer(path, text):
    own = tokenizers.Tokenizer.from_file(str(GOLDEN / "base" / "tokenizer.json"))
    ours = load_tokenizer(open_index(path))
    assert ours.encode(text, add_special=True) == own.encode(text).ids
    assert ours.decode(own.encode(text).ids, skip_special=False) == text
    assert ours.decode(own.encode(text).ids) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert ours.vocab_size == 512


@BOTH
def test_what_a_chat_needs_is_read_and_survives_the_way_to_a_rank(path):
    tokenizer = load_tokenizer(open_index(path))
    again = Tokenizer.from_json(tokenizer.to_json())
    for one in (tokenizer, again):
        assert (one.bos_token, one.eos_token) == ("", "<|im_end|>")
        assert 2 in one.stop_ids
        assert "<|im_start|>" in one.chat_template
    assert again.encode(TEXTS[1], add_special=True) == tokenizer.encode(TEXTS[1], add_special=True)
    assert (again.stop_ids, again.chat_template) == (tokenizer.stop_ids, tokenizer.chat_template)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_sentencepiece_models_give_sentencepieces_ids_and_text(name):
    model = SENTENCEPIECE[name]
    tokenizer = load_tokenizer(
        gguf_index(
            arch={"llama": "llama", "gemma": "gemma3"}[name],
            model="llama",
            tokens=model["tokens"],
            scores=model["scores"],
            token_type=model["types"],
            bos_token_id=1,
            eos_token_id=2,
            unknown_token_id=0,
        )
    )
    for text, ids, decoded in zip(model["texts"], model["ids"], model["decoded"], strict=True):
        if name == "llama" and text.startswith((" ", "<tool>")):
            continue  # sentencepiece puts a space before it, Hugging Face's newer tokenizers do not
        assert tokenizer.encode(text, add_special=False) == ids, text
        assert tokenizer.encode(text, add_special=True) == [1, *ids]
        assert tokenizer.decode(ids) == decoded
    turn = model["tokens"].index("<turn>")
    assert tokenizer.encode("<turn>", add_special=False)[-1] == turn
    assert turn not in tokenizer.stop_ids


DIGITS = {"model": "gpt2", "tokens": ["1", "2", "12", "<s>"], "merges": ["1 2"], "token_type": [1, 1, 1, 3]}


@pytest.mark.parametrize(
    ("pre", "ids"),
    [("gpt-2", [2, 2]), ("smollm", [0, 1, 0, 1]), ("qwen2", [0, 1, 0, 1]), ("llama-bpe", [2, 0, 1])],
)
def test_digits_are_split_as_the_files_pre_tokenizer_says(pre, ids):
    # gpt-2: all digits together; smollm, qwen2: one by one; llama 3: by threes ("121", "2")
    assert load_tokenizer(gguf_index(**DIGITS, pre=pre)).encode("1212", add_special=False) == ids


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({"pre": "gpt-2", "bos_token_id": 3}, [2]),
        ({"pre": "gpt-2", "bos_token_id": 3, "add_bos_token": True}, [3, 2]),
        ({"pre": "llama-bpe", "bos_token_id": 3}, [3, 2]),
        ({"pre": "llama-bpe", "bos_token_id": 3, "add_bos_token": False}, [2]),
        ({"pre": "gpt-2", "eos_token_id": 3, "add_eos_token": True}, [2, 3]),
    ],
)
def test_special_tokens_stand_around_a_text_as_the_file_says(keys, ids):
    tokenizer = load_tokenizer(gguf_index(**DIGITS, **keys))
    assert tokenizer.encode("12", add_special=True) == ids
    assert tokenizer.encode("12", add_special=False) == [2]


def test_every_id_that_ends_a_turn_stops():
    keys = {"eos_token_id": 0, "eot_token_id": 3, "eom_token_id": 1}
    assert load_tokenizer(gguf_index(**DIGITS, pre="gpt-2", **keys)).stop_ids == (0, 1, 3)


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({}, "tokenizer-missing"),
        ({**DIGITS, "model": "rwkv"}, "tokenizer-unsupported"),
        ({**DIGITS, "pre": "llama-bpf"}, "tokenizer-unsupported"),
        ({**DIGITS, "token_type": [1]}, "tokenizer-unreadable"),
        ({**DIGITS, "bos_token_id": 9}, "tokenizer-unreadable"),
        ({**DIGITS, "merges": ["3 4"]}, "tokenizer-unreadable"),
    ],
)
def test_a_gguf_without_a_usable_tokenizer_is_one_clear_problem(keys, code):
    problem = refused(gguf_index(**keys))
    assert problem.code == code
    assert "model.gguf" in problem.where
    assert problem.fix


def folder_index(folder):
    return Index(folder, "safetensors", {}, config={"eos_token_id": 2})


def test_a_folder_without_tokenizer_json_says_what_to_do(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    problem = refused(folder_index(tmp_path))
    assert problem.code == "tokenizer-missing"
    assert "tokenizer.model" in problem.why
    assert "save_pretrained" in problem.fix


@pytest.mark.parametrize("content", ["", "{", "[]", "\udce9"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_file_is_one_clear_problem(tmp_path, name, content):
    folder = folder_without(tmp_path)
    (folder / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    problem = refused(folder_index(folder))
    assert problem.code == "tokenizer-unreadable"
    assert name in problem.where


def test_settings_beside_tokenizer_json_count(tmp_path):
    folder = folder_without(tmp_path, "chat_template.jinja")
    settings = {
        "bos_token": {"content": "<|endoftext|>"},
        "eos_token": "<|im_end|>",
        "add_bos_token": True,
        "added_tokens_decoder": {"512": {"content": "<new>", "special": True}},
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    tokenizer = load_tokenizer(folder_index(folder))
    assert tokenizer.encode("<new>", add_special=True) == [0, 512]
    assert tokenizer.stop_ids == (1, 2)
    assert tokenizer.chat_template == "yes"
    assert tokenizer.vocab_size == 513
