"""A tokenizer.json (the `tokenizers` library's format) from the metadata of a GGUF file.

Models: gpt2 (byte-level BPE), llama (sentencepiece BPE with byte fallback), gemma and gemma4. Split regexes
as in llama.cpp's llama-vocab.cpp; merges and prefix rules as transformers' converter has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from framework.errors import InputError, Problem, nearest
from framework.text.splits import NFC, SPLITS, WHOLE_WORDS_FIRST, pre_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"  # sentencepiece's visible space

# control tokens that end a turn, whatever the file's eos_token_id says (llama.cpp collects the same by name)
_END_OF_TURN = frozenset(
    {
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|endoftext|>",
        "<|end_of_text|>", "<EOT>", "<|return|>", "<|call|>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """What the metadata says: the tokenizer.json as a dict, and what does not belong there."""

    json: dict[str, Any]
    bos_token: str
    eos_token: str
    add_bos: bool
    add_eos: bool
    stop_ids: tuple[int, ...]
    chat_template: str | None


def convert(metadata: Mapping[str, Any], where: str) -> GgufTokenizer:
    """Convert the keys `tokenizer.*`.

    Raises:
        InputError: `tokenizer-missing`, `tokenizer-unsupported`, `tokenizer-unreadable`.
    """

    def key(name: str) -> Any:  # noqa: ANN401 - a metadata value
        return metadata.get(f"tokenizer.ggml.{name}")

    model = key("model")
    if not model or not key("tokens"):
        raise InputError(
            Problem(
                "tokenizer-missing",
                "the GGUF file has no tokenizer",
                where,
                "it holds no tokenizer.ggml.model and tokenizer.ggml.tokens",
                "use a file that was converted with its tokenizer",
            )
        )
    tokens = list(key("tokens"))
    types = list(key("token_type") or [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise _unreadable(where, f"{len(tokens)} tokens, but {len(types)} token types")
    built = _build(metadata, str(model), tokens, where)
    built["added_tokens"] = [
        {
            "id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind != _USER_DEFINED,
        }
        for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip

    def token(name: str) -> str:
        i = key(name)
        if i is None:
            return ""
        if not 0 <= i < len(tokens):
            raise _unreadable(where, f"tokenizer.ggml.{name} is {i}, there are {len(tokens)} tokens")
        return str(tokens[i])

    add_bos = key("add_bos_token")
    if add_bos is None:
        add_bos = model == "llama" or key("pre") in WHOLE_WORDS_FIRST
    if model == "gemma4":
        add_bos = False  # its chat template writes <bos> itself
    bos_token, eos_token = token("bos_token_id"), token("eos_token_id")
    stops = {i for name in ("eos_token_id", "eot_token_id", "eom_token_id") if (i := key(name)) is not None}
    stops |= {i for i, kind in enumerate(types) if kind == _CONTROL and tokens[i] in _END_OF_TURN}
    return GgufTokenizer(
        built,
        bos_token,
        eos_token,
        add_bos=bool(add_bos) and bos_token != "",
        add_eos=bool(key("add_eos_token")) and eos_token != "",
        stop_ids=tuple(sorted(stops)),
        chat_template=metadata.get("tokenizer.chat_template") or None,
    )


def _build(metadata: Mapping[str, Any], model: str, tokens: list[str], where: str) -> dict[str, Any]:
    merges = metadata.get("tokenizer.ggml.merges")
    if model == "gpt2":
        if not merges:
            raise _unreadable(where, "a byte-level tokenizer needs tokenizer.ggml.merges")
        pre = str(metadata.get("tokenizer.ggml.pre") or "gpt-2")
        return _byte_level(tokens, list(merges), pre, where)
    if model not in ("llama", "gemma4"):
        raise InputError(
            Problem(
                "tokenizer-unsupported",
                f"the tokenizer kind {model!r} is not supported",
                f"{where} tokenizer.ggml.model",
                "gpt2, llama and gemma4 are",
                "use the safetensors checkpoint of the model with its tokenizer.json",
            )
        )
    architecture = str(metadata.get("general.architecture", ""))
    gemma = model == "gemma4" or architecture in ("gemma", "gemma2", "gemma3")
    if gemma:
        # runs of spaces are stored as such and looked up as the visible space
        tokens = [_SPACE * len(t) if " " in t and not t.strip() else t for t in tokens]
    if merges:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    else:
        scores = metadata.get("tokenizer.ggml.scores")
        # gemma's scores do not follow its merge order, the order of the tokens does
        ranks = [-float(i) for i in range(len(tokens))] if gemma or not scores else list(scores)
        pairs = _merges_from_scores(tokens, ranks)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not 0 <= unknown < len(tokens):
        raise _unreadable(where, f"tokenizer.ggml.unknown_token_id is {unknown}, there are {len(tokens)} tokens")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True)) and not gemma
    return _sentencepiece(tokens, pairs, tokens[unknown], prefix=prefix, gemma=gemma, legacy=architecture == "phi3")


def _byte_level(tokens: list[str], merges: list[str], pre: str, where: str) -> dict[str, Any]:
    if pre not in SPLITS:
        close = nearest(pre, SPLITS)
        raise InputError(
            Problem(
                "tokenizer-unsupported",
                f"the way to split text {pre!r} is not known, another one would give wrong tokens",
                f"{where} tokenizer.ggml.pre",
                f"nearest known name: {close[0]}" if close else f"known: {', '.join(sorted(SPLITS))}",
                "use the safetensors checkpoint of the model, its tokenizer.json says how to split",
            )
        )
    return _tokenizer_json(
        model=_bpe(tokens, [merge.split(" ", 1) for merge in merges], ignore_merges=pre in WHOLE_WORDS_FIRST),
        normalizer={"type": "NFC"} if pre in NFC else None,
        pre_tokenizer=pre_tokenizer(SPLITS[pre]),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )


def _sentencepiece(
    tokens: list[str], merges: list[Any], unknown: str, *, prefix: bool, gemma: bool, legacy: bool
) -> dict[str, Any]:
    """Sentencepiece BPE. `prefix`: a text gets a leading space; `legacy`: by a normalizer, before a split."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizer: dict[str, Any] | None = replace if gemma else None
    before: dict[str, Any] | None = None
    if legacy:
        prepend = {"type": "Prepend", "prepend": _SPACE}
        normalizer = {"type": "Sequence", "normalizers": [prepend, replace] if prefix else [replace]}
    elif not gemma:
        scheme = "first" if prefix else "never"
        before = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _tokenizer_json(
        model=_bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
        normalizer=normalizer,
        pre_tokenizer=before,
        decoder={"type": "Sequence", "decoders": decoders},
    )


def _bpe(tokens: list[str], merges: list[Any], **options: Any) -> dict[str, Any]:  # noqa: ANN401
    vocab = {token: i for i, token in enumerate(tokens)}
    return {
        "type": "BPE",
        "vocab": vocab,
        "merges": merges,
        "byte_fallback": False,
        "fuse_unk": False,
        **options,
    }


def _tokenizer_json(**parts: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, **parts}


def _merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, best score first.

    Equal scores: longer left part first, then the vocabulary's order, as transformers' converter sorts them.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, i in ids.items():
        pairs = [
            (left, right)
            for cut in range(1, len(token))
            if (left := token[:cut]) in ids and (right := token[cut:]) in ids
        ]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(scores[i], left, right) for left, right in pairs]
    found.sort(key=lambda item: (item[0], len(item[1]), len(item[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _unreadable(where: str, why: str) -> InputError:
    return InputError(
        Problem(
            "tokenizer-unreadable",
            "the GGUF file's tokenizer contradicts itself",
            where,
            why,
            "convert it again",
        )
    )
