"""Chat templates: untrusted Jinja from a checkpoint, rendered in a sandbox as transformers renders them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any

from framework.errors import InputError, Problem

if TYPE_CHECKING:
    from jinja2 import Environment, Template

# a template may run this long, make prompts and repeat values up to this size
MAX_S = 5.0
MAX_LINES = 1_000_000
MAX_CHARACTERS = 16 << 20
MAX_REPEATED = 1 << 20
_PADDING = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})  # as wide as the template likes

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

    The template runs in Jinja's immutable sandbox, with bounds on its time and on what it makes.

    Args:
        template: the Jinja source of the checkpoint.
        messages: `role` and `content` of each turn, in order.
        bos_token: text of the token, "" if there is none.
        eos_token: text of the token, "" if there is none.
        add_generation_prompt: end with the beginning of the assistant's turn.
        variables: further names the template knows, e.g. `enable_thinking`.

    Raises:
        InputError: `chat-template`, with the template's own message or the bound that it met.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    names: dict[str, Any] = {"tools": None, "documents": None, **(variables or {})}
    try:
        return _rendered(
            _compiled(template),
            {
                "messages": json.loads(json.dumps(list(messages))),
                "bos_token": bos_token,
                "eos_token": eos_token,
                "add_generation_prompt": add_generation_prompt,
                **names,
            },
        )
    except TemplateSyntaxError as error:
        raise _refusal(f"{error.message} (line {error.lineno})") from error
    except (TemplateError, *_TEMPLATE_FAULTS) as error:
        raise _refusal(str(error) or type(error).__name__) from error


def _rendered(template: Template, names: dict[str, Any]) -> str:
    from jinja2.exceptions import SecurityError

    parts: list[str] = []
    length = 0
    with _watched(template.root_render_func.__code__.co_filename):
        for part in template.generate(names):
            length += len(part)
            if length > MAX_CHARACTERS:
                raise SecurityError(f"the prompt grows beyond {MAX_CHARACTERS} characters")
            parts.append(part)
    return "".join(parts)


@contextmanager
def _watched(template_file: str) -> Iterator[None]:
    """Stop the template's code when it runs too long.

    The sandbox bounds one range, not loops within loops; every loop passes a trace function.
    """
    from jinja2.exceptions import SecurityError

    deadline_s, lines, before = time.monotonic() + MAX_S, 0, sys.gettrace()

    def count(frame: FrameType, event: str, argument: object) -> Any:  # noqa: ANN401 - a trace function
        nonlocal lines
        lines += 1
        if lines > MAX_LINES or time.monotonic() > deadline_s:
            raise SecurityError("the template runs too long")
        return count

    def enter(frame: FrameType, event: str, argument: object) -> Any:  # noqa: ANN401 - a trace function
        return count(frame, event, argument) if frame.f_code.co_filename == template_file else None

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


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

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    environment: Environment = _environment_class()(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=_strftime_now, dict=_dict, namespace=_namespace_class()
    )
    return environment


def _environment_class() -> type[Environment]:
    """The sandbox, with bounds on the operators and methods that make a large value from a small one."""
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
            if _size(operator, left, right) > MAX_REPEATED:
                raise SecurityError(f"{operator} would make a value larger than {MAX_REPEATED}")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ANN401
            return attr not in _PADDING and super().is_safe_attribute(obj, attr, value)

    return BoundedEnvironment


def _size(operator: str, left: Any, right: Any) -> int:  # noqa: ANN401 - any values of a template
    """Items, or bits, that `left operator right` makes."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right) if operator == "**" else 0
    lengths = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
    times = [value for value in (left, right) if isinstance(value, int)]
    return lengths[0] * times[0] if lengths and times else 0


def _tojson(
    value: Any,  # noqa: ANN401 - any JSON value of a message
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
    from jinja2.exceptions import SecurityError
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
