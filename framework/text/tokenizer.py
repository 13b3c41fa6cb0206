"""Text to token ids and back, from a Hugging Face folder or the metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.checkpoint.index import Index
from framework.errors import InputError, Problem
from framework.text import gguf_tokenizer

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A model's tokenizer and the special tokens that go with it.

    `bos_token` and `eos_token` are "" where the model has none. `stop_ids` end a generation. `add_bos` and
    `add_eos` None: the tokenizer's own post-processor decides.
    """

    backend: tokenizers.Tokenizer
    bos_token: str = ""
    eos_token: str = ""
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens the tokenizer knows; the model's embedding may have more rows."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Return the ids of text; `add_special` adds bos (and eos) where the model's own tokenizer does.

        Special tokens written in the text become their own ids either way.
        """
        if self.add_bos is None and self.add_eos is None:
            return list(self.backend.encode(text, add_special_tokens=add_special).ids)
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if not add_special:
            return ids
        ends = [(self.bos_token, self.add_bos), (self.eos_token, self.add_eos)]
        before, after = ([] if not add else _ids(self.backend.token_to_id(token)) for token, add in ends)
        return [*before, *ids, *after]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of ids, without special tokens if `skip_special`. Unknown ids give nothing."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special))

    def to_json(self) -> str:
        """Return all of it as one text, for another process."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return json.dumps({"tokenizer": self.backend.to_str(), **fields}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Return the tokenizer of `to_json`."""
        data = json.loads(text)
        fields = {name: data[name] for name in _FIELDS}
        return cls(_backend(data["tokenizer"], "to_json()"), **{**fields, "stop_ids": tuple(fields["stop_ids"])})


_FIELDS = ("bos_token", "eos_token", "stop_ids", "chat_template", "add_bos", "add_eos")


def load_tokenizer(index: Index) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Raises:
        InputError: `tokenizer-missing`, `tokenizer-unreadable`, `tokenizer-unsupported`.
    """
    if index.container == "gguf":
        return _from_gguf(index)
    return _from_folder(index.root if index.root.is_dir() else index.root.parent, index.config or {})


def _from_gguf(index: Index) -> Tokenizer:
    where = str(index.root)
    found = gguf_tokenizer.convert(index.metadata, where)
    return Tokenizer(
        _backend(json.dumps(found.json, ensure_ascii=False), where),
        found.bos_token,
        found.eos_token,
        found.stop_ids,
        found.chat_template,
        found.add_bos,
        found.add_eos,
    )


def _from_folder(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _missing(folder)
    backend = _backend(_read(path), str(path))
    settings = {
        **_read_json(folder / "special_tokens_map.json"),
        **_read_json(folder / "tokenizer_config.json"),
    }
    _add_declared(backend, settings.get("added_tokens_decoder") or {})
    bos_token, eos_token = _content(settings.get("bos_token")), _content(settings.get("eos_token"))
    # what the settings call special is special, even where tokenizer.json does not list it
    backend.add_special_tokens([t for t in (bos_token, eos_token) if t and backend.token_to_id(t) is not None])
    generation = _read_json(folder / "generation_config.json")
    stops = {*_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id"))}
    if eos_token and (eos_id := backend.token_to_id(eos_token)) is not None:
        stops.add(eos_id)
    add_bos, add_eos = settings.get("add_bos_token"), settings.get("add_eos_token")
    return Tokenizer(
        backend,
        bos_token,
        eos_token,
        tuple(sorted(stops)),
        _chat_template(folder, settings),
        None if add_bos is None else bool(add_bos) and backend.token_to_id(bos_token) is not None,
        None if add_eos is None else bool(add_eos) and backend.token_to_id(eos_token) is not None,
    )


def _missing(folder: Path) -> InputError:
    others = [name for name in ("tokenizer.model", "vocab.json", "tiktoken.model") if (folder / name).is_file()]
    return InputError(
        Problem(
            "tokenizer-missing",
            "the checkpoint has no tokenizer.json",
            str(folder),
            f"it has {' and '.join(others)} only" if others else "",
            "copy tokenizer.json and tokenizer_config.json of the original model there   or, once:   "
            'python -c "from transformers import AutoTokenizer as A; '
            "A.from_pretrained('MODEL').save_pretrained('.')\"",
        )
    )


def _backend(text: str, where: str) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        raise InputError(
            Problem("tokenizer-unreadable", "the tokenizer cannot be read", where, str(error), "copy it again")
        ) from error
    # files saved after training may cut or pad every text
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_declared(backend: tokenizers.Tokenizer, declared: Mapping[str, Any]) -> None:
    """Add tokens that only tokenizer_config.json lists, at the ids it gives."""
    import tokenizers

    for i, entry in sorted((int(i), entry) for i, entry in declared.items()):
        if backend.id_to_token(i) is not None or i != backend.get_vocab_size(with_added_tokens=True):
            continue
        flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        backend.add_tokens([tokenizers.AddedToken(entry["content"], special=bool(entry.get("special")), **flags)])


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path)
    template = settings.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template or None


def _content(token: Any) -> str:  # noqa: ANN401 - null, a text or an added-token object
    return str(token["content"] if isinstance(token, Mapping) else token or "")


def _ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            Problem(
                "tokenizer-unreadable",
                "a tokenizer file cannot be read",
                str(path),
                str(error),
                "copy it again",
            )
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in path, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(_read(path))
    except ValueError as error:
        raise InputError(
            Problem("tokenizer-unreadable", "a file is not JSON", str(path), str(error), "copy it again")
        ) from error
    if not isinstance(data, dict):
        raise InputError(Problem("tokenizer-unreadable", "a file holds no JSON object", str(path), fix="copy it again"))
    return data
