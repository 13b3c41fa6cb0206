"""The prompts of a generate job: from the recipe or a file, rendered by the chat template, encoded, bounded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.errors import InputError, Problem
from framework.jobs.common import options
from framework.recipe.schema import Recipe
from framework.text.chat import render_chat
from framework.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the user wrote it (`text`) and as the model gets it (`ids`)."""

    text: str
    ids: list[int]


def read_prompts(recipe: Recipe, tokenizer: Tokenizer, context: int) -> list[Prompt]:
    """Return all prompts of the job, in order.

    Raises:
        InputError: `prompts-missing`, `prompt-file`, `prompt-too-long` (all of them at once), `chat-template`.
    """
    chosen = options(recipe)
    given: list[str | list[dict[str, Any]]] = list(chosen["prompts"])
    if chosen["prompt_file"]:
        given += _from_file(Path(chosen["prompt_file"]))
    if not given:
        raise InputError(
            Problem(
                "prompts-missing",
                "there is nothing to generate from",
                "job.prompts and job.prompt_file are empty",
                fix="'job.prompts=[\"The capital of France is\"]'   or   job.prompt_file=prompts.txt",
            )
        )
    chat = chosen["chat"]
    as_chat = tokenizer.chat_template is not None if chat == "auto" else str(chat).lower() == "true"
    if as_chat and tokenizer.chat_template is None:
        raise InputError(Problem("chat-template", "the model has no chat template", "job.chat", fix="job.chat=false"))
    prompts = [_encode(entry, tokenizer, as_chat) for entry in given]
    room = context - 1
    too_long = [
        Problem(
            "prompt-too-long",
            f"prompt {i} has {len(prompt.ids)} tokens, the context holds {context}",
            f"job.prompts[{i}]",
            "at least one token must be left to generate",
            f"shorten it to {room} tokens   or   runtime.context={len(prompt.ids) + int(chosen['max_new_tokens'])}"
            " where the model allows it",
        )
        for i, prompt in enumerate(prompts)
        if len(prompt.ids) > room
    ]
    if too_long:
        raise InputError(too_long)
    return prompts


def _encode(entry: str | list[dict[str, Any]], tokenizer: Tokenizer, as_chat: bool) -> Prompt:
    if isinstance(entry, str) and not as_chat:
        return Prompt(entry, tokenizer.encode(entry, add_special=True))
    if not as_chat or tokenizer.chat_template is None:
        raise InputError(
            Problem(
                "chat-template",
                "messages can only be put together by a chat template",
                "job.prompt_file",
                "the model has none" if tokenizer.chat_template is None else "job.chat is false",
                'give {"prompt": "..."} lines' if tokenizer.chat_template is None else "job.chat=auto",
            )
        )
    messages = [{"role": "user", "content": entry}] if isinstance(entry, str) else entry
    text = render_chat(tokenizer.chat_template, messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    shown = entry if isinstance(entry, str) else str(messages[-1].get("content", ""))
    return Prompt(shown, tokenizer.encode(text, add_special=False))


def _from_file(path: Path) -> list[str | list[dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            Problem("prompt-file", f"the prompt file cannot be read: {error}", str(path), fix="job.prompt_file=FILE")
        ) from error
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    entries: list[str | list[dict[str, Any]]] = []
    problems = []
    for number, line in numbered:
        entry = _entry(line)
        if entry is None:
            problems.append(
                Problem(
                    "prompt-file",
                    "a line is not a JSON object with a prompt or messages",
                    f"{path}:{number}",
                    fix='{"prompt": "..."}   or   {"messages": [{"role": "user", "content": "..."}]}',
                )
            )
        else:
            entries.append(entry)
    if problems:
        raise InputError(problems)
    return entries


def _entry(line: str) -> str | list[dict[str, Any]] | None:
    """Return the prompt or the messages of one JSON line, None if it holds neither."""
    try:
        data = json.loads(line)
    except ValueError:
        return None
    if not isinstance(data, dict):
        return None
    messages = data.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages):
        return messages
    prompt = data.get("prompt")
    return prompt if isinstance(prompt, str) and messages is None else None
