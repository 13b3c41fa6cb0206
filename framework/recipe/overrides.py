"""The command line before Hydra sees it: every key and value checked, all problems in one message."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, Sweep
from hydra.errors import HydraException

from framework.errors import InputError, Problem, nearest
from framework.recipe.fields import Mismatch, Scalar, describe_type, field_of, is_optional_record, keys_below, read
from framework.recipe.job_options import JOBS, WITHOUT_RECIPE
from framework.recipe.locate import find_recipe, recipe_name, recipes_dir, shipped_recipes
from framework.recipe.schema import GROUPS, SECTIONS
from framework.recipe.yaml_file import RecipeFile, group_names, read_recipe_file

PROGRAM = "python launch.py"
WHERE = "command line"


@dataclass
class _Line:
    """The command line while it is read. `corrected` is what would work, None where nobody can tell."""

    given: list[str]
    multirun: bool
    parsed: dict[int, Override] = field(default_factory=dict)
    corrected: dict[int, str | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    files: list[RecipeFile] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)


def prepare(given: Sequence[str], *, multirun: bool = False, running: bool = True, program: str = PROGRAM) -> list[str]:
    """Check overrides; return them as Hydra takes them (recipes as absolute paths, no `+`).

    Args:
        given: overrides as typed.
        multirun: commas sweep.
        running: a job will run, so a recipe may be needed; False for --cfg, --info and --help.
        program: how the corrected command begins.

    Raises:
        InputError: all problems of the command line, or all of the recipes it names.
    """
    line = _Line(list(given), multirun)
    parser = OverridesParser.create()
    if split := _split_by_shell(line.given, parser):
        raise InputError(split)
    for i, text in enumerate(line.given):
        try:
            line.parsed[i] = parser.parse_override(text)
        except HydraException as error:
            _syntax(line, i, parser, str(error))
    for i, override in line.parsed.items():
        if override.is_sweep_override() and not multirun and not _is_hydra(override):
            _ambiguous(line, i, parser)
    _recipes(line)
    _jobs(line)
    mismatches: list[tuple[int, Mismatch]] = []
    for i, override in line.parsed.items():
        if i not in line.corrected and not _is_hydra(override):
            _check(line, i, override, mismatches)
    _report(line, mismatches)
    if line.problems:
        if len(line.corrected) and all(line.corrected.values()):
            line.problems[-1] = _with_command(line, program)
        raise InputError(line.problems)
    if running:
        _recipe_needed(line)
    return [_ready(override, text) for override, text in zip(line.parsed.values(), line.given, strict=True)]


def known_keys(jobs: Iterable[str]) -> list[str]:
    """Return all dotted keys that the command line takes for these jobs."""
    keys = [*GROUPS, "recipe", *SECTIONS]
    for section, cls in SECTIONS.items():
        keys += keys_below(cls, f"{section}.")
    for job in jobs:
        keys += keys_below(JOBS[job], "job.") if job in JOBS else []
    return list(dict.fromkeys(keys))


def _is_hydra(override: Override) -> bool:
    return override.key_or_group == "hydra" or override.key_or_group.startswith(("hydra.", "hydra/"))


def _split_by_shell(given: Sequence[str], parser: OverridesParser) -> Problem | None:
    """Say it once where a list that was typed without quotes has come as its words."""
    for i, text in enumerate(given):
        if "=" not in text or text.count("[") <= text.count("]"):
            continue
        for end in range(i + 1, len(given)):
            whole = " ".join(given[i : end + 1])
            if whole.count("[") <= whole.count("]"):
                key, fixed = text.partition("=")[0], _quoted(whole, parser)
                why = "a value with spaces stands in quotes, else each word is an argument of its own"
                fix = shlex.quote(fixed) if fixed else f"'{key}=[\"...\"]'"
                return Problem("override-syntax", f"the shell has split the value of {key}", WHERE, why, fix)
    return None


def _syntax(line: _Line, i: int, parser: OverridesParser, said: str) -> None:
    text = line.given[i]
    line.corrected[i] = _quoted(text, parser)
    if "=" not in text:
        why, fix = "an override is key=value", f"did you mean recipe={text}?"
        line.corrected[i] = None
    else:
        why = "one of  = , # ( ) [ ] { } ! & | % ~  or a letter beyond ASCII stands in the value without quotes"
        fix = "put the value in quotes of its own:  'key=\"value\"'"
    line.problems.append(Problem("override-syntax", f"the override {text} cannot be read", WHERE, why, fix))


def _quoted(text: str, parser: OverridesParser) -> str | None:
    """Quote the value of an override, keeping a list a list where it can be read as one text."""
    key, _, value = text.partition("=")
    candidates = [f"{key}={quote(value)}"]
    if value.startswith("[") and value.endswith("]"):
        candidates.insert(0, f"{key}=[{quote(value[1:-1].strip())}]")
    for candidate in candidates:
        try:
            parser.parse_override(candidate)
        except HydraException:
            continue
        return candidate
    return None


def quote(text: str) -> str:
    """Quote a text for Hydra's grammar: backslashes are special only in front of a quote."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    trailing = escaped[len(escaped.rstrip("\\")) :]
    return f'"{escaped}{trailing}"'


def _ambiguous(line: _Line, i: int, parser: OverridesParser) -> None:
    text = line.given[i]
    key, _, value = text.partition("=")
    found = next((f for job in JOBS if (f := _field(key.lstrip("+"), [job])) is not None), None)
    takes = describe_type(*found) if found is not None else "text"
    if "list" in takes:
        line.corrected[i] = f"{key}=[{quote(value)}]" if "text" in takes else f"{key}=[{value}]"
    elif "text" in takes:
        line.corrected[i] = _quoted(text, parser)
    else:
        line.corrected[i] = text.split(",")[0]
    line.problems.append(
        Problem("override-syntax", f"the comma in {text} would make a sweep", WHERE,
                "one run takes one value; -m runs once for each", f"{line.corrected[i]!r}   or add -m")
    )  # fmt: skip


def _choices(override: Override) -> list[str]:
    """Return the option names that an override of a group takes; none for a glob."""
    value = override._value
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return [v.text if isinstance(v, QuotedString) else v for v in values if isinstance(v, str | QuotedString)]


def _recipes(line: _Line) -> None:
    problems: list[Problem] = []
    for i, override in line.parsed.items():
        if override.key_or_group != "recipe" or i in line.corrected or override.is_delete():
            continue
        for name in _choices(override):
            try:
                line.files.append(read_recipe_file(find_recipe(name)))
            except InputError as error:
                problems += error.problems
    if problems:
        raise InputError([*line.problems, *problems])


def _jobs(line: _Line) -> None:
    chosen = [name for o in line.parsed.values() if o.key_or_group == "job" for name in _choices(o)]
    line.jobs = chosen or [file.choices["job"] for file in line.files] or ["generate"]


def _check(line: _Line, i: int, override: Override, mismatches: list[tuple[int, Mismatch]]) -> None:
    key = override.key_or_group
    if override.is_delete():
        line.corrected[i] = None
        line.problems.append(
            Problem("override-delete", f"a key of a recipe cannot be deleted: {line.given[i]}", WHERE,
                    "every key has a value", f"{key}=VALUE   or null where the schema allows it")
        )  # fmt: skip
    elif key == "recipe":
        pass
    elif key in GROUPS:
        _check_group(line, i, override)
    elif key.split(".")[0] in GROUPS and key.endswith(".name") and key.count(".") == 1:
        line.corrected[i] = line.given[i].replace(".name=", "=", 1).lstrip("+")
        mismatches.append((i, Mismatch(key, "unknown-key", key, "", key.split(".")[0])))
    else:
        _check_key(line, i, override, mismatches)


def _check_group(line: _Line, i: int, override: Override) -> None:
    key = override.key_or_group
    known = group_names(key)
    names = _choices(override)
    if not names and not isinstance(override._value, Sweep):
        names = ["a mapping" if isinstance(override._value, dict) else str(override.value())]
    for name in names:
        if name in known:
            continue
        near = nearest(name, known)
        line.corrected[i] = line.given[i].replace(name, near[0]) if near else None
        line.problems.append(
            Problem("unknown-value", f"there is no {key} {name}", WHERE,
                    f"known: {', '.join(known)}", f"{key}={near[0]}" if near else f"{key}={'|'.join(known)}")
        )  # fmt: skip


def _field(key: str, jobs: list[str]) -> tuple[Any, Any] | None:
    section, _, rest = key.partition(".")
    if section in SECTIONS and section not in GROUPS and not rest:
        return SECTIONS[section], {}
    if section in SECTIONS:
        return field_of(SECTIONS[section], rest)
    if section == "job" and rest:
        found = [field_of(JOBS[job], rest) for job in jobs if job in JOBS]
        return next((f for f in found if f is not None), None) if all(f is not None for f in found) else None
    return None


def _check_key(line: _Line, i: int, override: Override, mismatches: list[tuple[int, Mismatch]]) -> None:
    key = override.key_or_group
    found = _field(key, line.jobs)
    if found is None and (owners := _owners(key)):
        named = next((n for n, o in line.parsed.items() if o.key_or_group == "job"), None)
        if named is not None:
            line.corrected[named] = f"job={owners[0]}"
        mismatches.append((i, Mismatch(key, "unknown-key", key, "", f"job={owners[0]}")))
        return
    if found is None:
        near = None if _inside_list(key) else _nearest_key(key, line.jobs)
        if near in SECTIONS and not isinstance(override._value, dict):
            near = None  # a section takes a mapping
        line.corrected[i] = line.given[i].lstrip("+").replace(key, near, 1) if near else None
        mismatches.append((i, Mismatch(key, "unknown-key", key, _siblings(key, line.jobs), near or "")))
        return
    value = override._value
    text = line.given[i].partition("=")[2]
    wrong: list[Mismatch] = []
    for one in value.list if isinstance(value, ChoiceSweep) else [] if isinstance(value, Sweep) else [value]:
        single = not isinstance(value, ChoiceSweep)
        read(found[0], _tree(one, text if single else None), key, found[1], wrong)
    if not wrong:
        return
    better = wrong[0].instead if len(wrong) == 1 and wrong[0].key == key else ""
    as_list: list[Mismatch] = []
    read(found[0], [_tree(value, text)], key, found[1], as_list)
    if not better and not isinstance(value, list | dict | Sweep) and not as_list:
        better = f"[{text}]"
    line.corrected[i] = f"{key}={better}" if better else None
    mismatches += [(i, m) for m in wrong]


def _tree(value: Any, text: str | None = None) -> Any:  # noqa: ANN401
    """Turn what Hydra's parser made into what `read` takes."""
    if isinstance(value, QuotedString):
        return Scalar(value.text, value.text, bare=False)
    if isinstance(value, dict):
        return {str(_plain(k)): _tree(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_tree(v) for v in value]
    return Scalar(value, str(value) if text is None else text)


def _plain(value: Any) -> Any:  # noqa: ANN401
    return value.text if isinstance(value, QuotedString) else value


def _nearest_key(key: str, jobs: list[str]) -> str | None:
    known = known_keys(jobs)
    last = key.rsplit(".", 1)[-1]
    same = [k for k in known if k.rsplit(".", 1)[-1] == last and k.count(".") >= 1]
    near = nearest(key, same, cutoff=0) or nearest(key, known)
    if not near:
        lasts = {k.rsplit(".", 1)[-1]: k for k in reversed(known) if "." in k}
        near = [lasts[name] for name in nearest(last, lasts, cutoff=0.75)]
    return near[0] if near else None


def _siblings(key: str, jobs: list[str]) -> str:
    above = key.rpartition(".")[0]
    known = known_keys(jobs)
    beside = [k for k in known if k.rpartition(".")[0] == above] if above else []
    return ", ".join(beside or [k for k in known if "." not in k])


def _report(line: _Line, mismatches: list[tuple[int, Mismatch]]) -> None:
    unknown = [(i, m) for i, m in mismatches if m.kind == "unknown-key"]
    wrong = [(i, m) for i, m in mismatches if m.kind != "unknown-key"]
    if unknown:
        many = len(unknown) > 1
        what = f"{len(unknown)} keys are not in the recipe schema" if many else _not_a_key(unknown[0][1].key)
        width = max(len(m.key) for _, m in unknown)
        why = [f"{m.key:<{width}}   {_hint(m)}" for _, m in unknown]
        fix = _fix(line, unknown) or f"{PROGRAM} job=schema   shows all keys"
        line.problems.append(Problem("unknown-key", what, WHERE, "\n".join(why), fix))
    if wrong:
        kinds = {m.kind for _, m in wrong}
        many, first = len(wrong) > 1, wrong[0][1]
        what = f"{len(wrong)} values do not fit" if many else f"`{first.key}` cannot be {first.text}"
        why = [f"{m.key} takes {m.expected}" + (f", not {m.text}" if many else "") for _, m in wrong]
        code = kinds.pop() if len(kinds) == 1 else "wrong-type"
        fix = _fix(line, wrong) or f"{line.parsed[wrong[0][0]].key_or_group}=..."
        line.problems.append(Problem(code, what, WHERE, "\n".join(why), fix))


def _not_a_key(key: str) -> str:
    return f"`{key}` is not a key of a recipe"


def _inside_list(key: str) -> bool:
    return any(part.isdigit() for part in key.split("."))


def _hint(mismatch: Mismatch) -> str:
    if owners := _owners(mismatch.key):
        return f"is an option of job {', '.join(owners)}"
    if _inside_list(mismatch.key):
        return "items of a list have no keys of their own: give the list whole"
    if mismatch.instead:
        return f"did you mean {mismatch.instead}?"
    return f"known keys: {mismatch.expected}" if mismatch.expected else "nothing is called like it"


def _owners(key: str) -> list[str]:
    """The jobs that have an option."""
    return [job for job in JOBS if key.startswith("job.") and _field(key, [job])]


def _fix(line: _Line, mismatches: list[tuple[int, Mismatch]]) -> str:
    better = [text for i in dict.fromkeys(i for i, _ in mismatches) if (text := line.corrected.get(i))]
    if not better and mismatches[0][1].instead:
        return f"write {mismatches[0][1].instead}"
    return " ".join(shlex.quote(text) for text in better)


def _with_command(line: _Line, program: str) -> Problem:
    last = line.problems[-1]
    texts = [line.corrected.get(i) or text for i, text in enumerate(line.given)]
    flags = ["-m"] if line.multirun else []
    command = " ".join([program, *flags, *(shlex.quote(text) for text in texts)])
    fix = f"{command}   or add -m" if "make a sweep" in last.what else command
    return Problem(last.code, last.what, last.where, last.why, fix)


def _recipe_needed(line: _Line) -> None:
    for job in line.jobs:
        if job not in JOBS:  # the default of a kind that is not run yet
            what, fix = f"there is no job {job} yet", "job=check"
            raise InputError(
                Problem("unknown-value", what, "the recipe names no job", f"known: {', '.join(JOBS)}", fix)
            )
    named = any(o.key_or_group == "recipe" for o in line.parsed.values())
    asking = [job for job in line.jobs if job not in WITHOUT_RECIPE]
    if named or not asking:
        return
    raise InputError(
        Problem("recipe-missing", f"job {asking[0]} needs a recipe", WHERE,
                f"shipped: {', '.join(shipped_recipes())}",
                f"{PROGRAM} recipe=quickstart   or   recipe=PATH.yaml")
    )  # fmt: skip


def _ready(override: Override, text: str) -> str:
    """Write an override as Hydra shall see it."""
    if _is_hydra(override):
        return text
    text = text.lstrip("+")
    if _may_be_null(override.key_or_group.rpartition(".")[0]):
        return f"++{text}"  # adds the key to a record that the recipe leaves null
    if override.key_or_group != "recipe" or not (names := _choices(override)):
        return text
    return "recipe=" + ",".join(_hydra_name(name) for name in names)


def _may_be_null(key: str) -> bool:
    """Whether a key leads to a record that a recipe may leave null."""
    section, _, rest = key.partition(".")
    found = field_of(SECTIONS[section], rest) if rest and section in SECTIONS else None
    return found is not None and is_optional_record(found[0])


def _hydra_name(given: str) -> str:
    path = find_recipe(given)
    if recipes_dir() in path.parents:
        return recipe_name(path)
    return quote(str(path))
