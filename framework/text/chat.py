"""Chat templates: untrusted Jinja from a checkpoint, rendered in a sandbox the way transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from framework.errors import InputError, Problem

if TYPE_CHECKING:
    from jinja2 import Environment, Template

# what the Python inside a template may raise: a wrong template or wrong messages, not a bug of ours
_TEMPLATE_FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render messages to the text the model was trained on.

    Args:
        template: the Jinja source of the checkpoint.
        messages: `role` and `content` of each turn, in order.
        bos_token: text of the token, "" if there is none.
        eos_token: text of the token, "" if there is none.
        add_generation_prompt: end with the beginning of the assistant's turn.
        variables: further names the template knows, e.g. `enable_thinking`.

    Raises:
        InputError: `chat-template`, with the template's own message.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    names: dict[str, Any] = {"tools": None, "documents": None, **(variables or {})}
    try:
        return _compiled(template).render(
            messages=json.loads(json.dumps(list(messages))),
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
            **names,
        )
    except TemplateSyntaxError as error:
        raise _refusal(f"{error.message} (line {error.lineno})") from error
    except (TemplateError, *_TEMPLATE_FAULTS) as error:
        raise _refusal(str(error) or type(error).__name__) from error


def _refusal(reason: str) -> InputError:
    return InputError(
        Problem(
            "chat-template",
            "the model's chat template cannot render these messages",
            "chat template of the checkpoint",
            reason,
            "mend the messages   or   job.chat=false to send the prompts as they are",
        )
    )


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=_strftime_now, dict=_dict, namespace=_namespace_class()
    )
    return environment


def _tojson(
    value: Any,  # noqa: ANN401 - any JSON value of a message
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _dict(*args: Any, **values: Any) -> dict[str, Any]:  # noqa: ANN401
    # a function, so that a template cannot reach the attributes of the type
    return dict(*args, **values)


def _generation_tag() -> type:
    """`{% generation %}`: marks the assistant's text for training; here only its body counts."""
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 - Jinja's interface

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return GenerationTag


def _namespace_class() -> type:
    """`namespace()` that stores no underscore names: Jinja's accepts any."""
    from jinja2.sandbox import SecurityError
    from jinja2.utils import Namespace

    def check(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template may not store the name {name!r}")

    class TemplateNamespace(Namespace):
        def __init__(*args: Any, **values: Any) -> None:  # noqa: ANN401 - `self` may be one of values
            self, *rest = args
            attributes = dict(*rest, **values)
            for name in attributes:
                check(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:  # noqa: ANN401
            check(name)
            super().__setitem__(name, value)

    return TemplateNamespace
