"""Which scheme each module gets: the recipe's ordered patterns over what the file holds. First match wins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate

from framework.checkpoint.index import Index
from framework.errors import Problem, nearest
from framework.formats.base import Held, Layout
from framework.geometry import Kind, Module, Role

_MAX_NAMES = 3
# of 4-bit weights that are quantized at load: the largest that divides K
ONLINE_GROUPS = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of `quantization.layers`, with the place it was written at."""

    pattern: str
    scheme: str
    where: str


@dataclass(frozen=True, slots=True)
class Part:
    """A set of weights with a format of its own: the whole of an LLM, or one transformer of a pipeline.

    `prefix` is what patterns and plans put before its modules' names (`transformer.`; empty for an LLM).
    """

    prefix: str
    index: Index
    format: str
    evidence: str
    layout: Layout
    modules: tuple[Module, ...]


@dataclass(frozen=True, slots=True)
class Assigned:
    """A module, what the file holds of it, the scheme it runs with and the rule that said so (None: the file)."""

    part: Part
    module: Module
    held: Held
    scheme: str
    rule: Rule | None
    mode: str = "offline"

    @property
    def name(self) -> str:
        """The name that patterns and plans use."""
        return self.part.prefix + self.module.name


def hold(part: Part) -> tuple[list[Held], list[Problem]]:
    """Return what the file holds of every module of a part, its experts gathered into one.

    Problems: `experts-differ`, experts of one projection that are not held alike.
    """
    held, problems = [], []
    for module in part.modules:
        if module.kind is not Kind.EXPERTS or part.layout.stacked(module, part.index):
            held.append(part.layout.held(module, part.index))
            continue
        each = [part.layout.held(module.expert(e), part.index) for e in range(module.experts)]
        form = _form(each[0])
        odd = [e for e, other in enumerate(each) if _form(other) != form]
        # what the file lacks whole is the ledger's to say
        if odd := [e for e in odd if any(spec.name in part.index.tensors for spec in each[e].tensors)]:
            problems.append(_differing(part, module, each, odd))
        held.append(each[0]._replace(tensors=tuple(spec for one in each for spec in one.tensors)))
    return held, problems


def assign(
    parts: Sequence[Part], rules: Sequence[Rule], *, online: bool = False
) -> tuple[list[Assigned], list[Problem]]:
    """Give every module of every part a scheme; norms, embeddings and parameters are always float.

    With `online`, float weights are quantized at load to what their rule says; routers and heads stay float.

    Problems: `pattern-syntax`, `pattern-unmatched`, `pattern-shadowed`, `pattern-experts`, `scheme-mismatch`,
    `experts-differ`, `online-auto`, `online-quantized`, `online-float`.
    """
    problems: list[Problem] = []
    matchers = []
    for given in rules:
        try:
            matchers.append((given, compile_pattern(given.pattern)))
        except re.error as error:
            problems.append(
                Problem(
                    "pattern-syntax",
                    f"{given.pattern} is not a regular expression: {error}",
                    given.where,
                    fix="mend the expression   or   write a glob, without re:",
                )
            )
    assigned: list[Assigned] = []
    matched: dict[Rule, list[str]] = {rule: [] for rule, _ in matchers}
    split: dict[tuple[Rule, int], list[str]] = {}
    for part in parts:
        held, found = hold(part)
        problems += found
        for module, holding in zip(part.modules, held, strict=True):
            hits = [(rule, _hits(matches, part.prefix, module)) for rule, matches in matchers]
            for rule, hit in hits:
                if hit and hit is not True:
                    split.setdefault((rule, len(hit)), []).append(part.prefix + module.name)
                if hit:
                    matched[rule].append(part.prefix + module.name)
            chosen = next((rule for rule, hit in hits if hit), None)
            assigned.append(Assigned(part, module, holding, "float", chosen))
    problems += [_splits_experts(rule, names, count) for (rule, count), names in split.items()]
    assigned, found = _online(assigned) if online else _offline(assigned)
    used = {entry.rule for entry in assigned}
    names = [entry.name for entry in assigned if entry.module.quantizable]
    idle = [_unused(rule, hit, names) for rule, hit in matched.items() if rule not in used]
    return assigned, _distinct([*problems, *found, *idle])


def compile_pattern(pattern: str) -> Callable[[str], object]:
    """Return a predicate over module names: a glob, or a regular expression after `re:` (whole name).

    Raises:
        re.error: the regular expression cannot be compiled.
    """
    return re.compile(pattern[3:] if pattern.startswith("re:") else translate(pattern)).fullmatch


def _hits(matches: Callable[[str], object], prefix: str, module: Module) -> bool | list[int]:
    """Say whether a pattern matches a module; of experts, True for all or the numbers of those that it matches.

    A pattern may leave out the prefix of a pipeline's transformer: it then speaks of all of them.
    """

    def one(name: str) -> bool:
        return bool(matches(prefix + name) or (prefix and matches(name)))

    if not module.experts:
        return one(module.name)
    hit = [e for e, name in enumerate(module.names()) if one(name)]
    return len(hit) == module.experts or hit


def _offline(assigned: list[Assigned]) -> tuple[list[Assigned], list[Problem]]:
    settled = []
    mismatches: dict[tuple[Rule, tuple[str, ...], str], list[Assigned]] = {}
    for entry in assigned:
        if not entry.module.quantizable:
            settled.append(entry)
            continue
        rule, served = entry.rule, entry.held.schemes
        scheme = served[0] if rule is None or rule.scheme == "auto" else rule.scheme
        if rule is not None and scheme not in served:
            mismatches.setdefault((rule, served, entry.held.label), []).append(entry)
            scheme = served[0]
        settled.append(replace(entry, scheme="float" if entry.module.absorbed else scheme))
    return settled, [_mismatch(rule, served, label, found) for (rule, served, label), found in mismatches.items()]


def _online(assigned: list[Assigned]) -> tuple[list[Assigned], list[Problem]]:
    settled = []
    problems = []
    kept: dict[Rule, list[str]] = {}
    done: set[Rule] = set()
    quantized: dict[str, list[Assigned]] = {}
    for entry in assigned:
        rule, module = entry.rule, entry.module
        if not module.quantizable or rule is None or rule.scheme == "float":
            settled.append(entry)
            continue
        if rule.scheme == "auto":
            problems.append(
                Problem(
                    "online-auto",
                    "scheme: auto takes what the file holds, and quantization.online asks to quantize",
                    f"{rule.where}  pattern {rule.pattern}",
                    "a scheme that is made at load must be named",
                    "scheme: mxfp8 or w8a8_dynamic ...   or   scheme: float   or   quantization.online=false",
                )
            )
            settled.append(entry)
            continue
        if entry.held.scheme != "float" or entry.part.format == "gguf":
            quantized.setdefault(entry.part.format, []).append(entry)
            settled.append(entry)
            continue
        if module.role is not Role.NONE:
            kept.setdefault(rule, []).append(entry.name)
            settled.append(entry)
            continue
        done.add(rule)
        group = online_group(rule.scheme, module.shape[1])
        held = entry.held._replace(group=group, grain=(1, max(group, 1)))
        settled.append(replace(entry, held=held, scheme=rule.scheme, mode="online"))
    for format_name, found in quantized.items():
        problems.append(
            Problem(
                "online-quantized",
                f"{found[0].name}{_more(len(found))} are quantized in the file already",
                "quantization.online=true",
                f"the checkpoint is {format_name}, {found[0].held.label or found[0].held.scheme}; "
                "codes are never quantized again",
                "quantization.online=false   or   a float checkpoint",
            )
        )
    for rule in kept.keys() - done:
        problems.append(
            Problem(
                "online-float",
                f"pattern {rule.pattern} asks to quantize {', '.join(kept[rule][:_MAX_NAMES])}: they stay float",
                rule.where,
                "routers and heads are not quantized at load: a wrong expert or token costs more than the bytes saved",
                "delete the pattern   or   scheme: float",
            )
        )
    return settled, problems


def online_group(scheme: str, k: int) -> int:
    """Return the group that a weight of K input features is quantized in at load; 0: one scale a row."""
    if scheme != "w4a16":
        return 0
    size = next((size for size in ONLINE_GROUPS if k % size == 0), 0)
    return size if size < k else 0


def _form(held: Held) -> tuple[object, ...]:
    return held.scheme, held.label, held.group, held.symmetric, held.variant, held.grain


def _differing(part: Part, module: Module, each: list[Held], odd: list[int]) -> Problem:
    numbers = ", ".join(map(str, odd[:8])) + (f" and {len(odd) - 8} more" if len(odd) > 8 else "")
    other = each[odd[0]]
    return Problem(
        "experts-differ",
        f"experts of {part.prefix}{module.name} are not held alike: expert {numbers} unlike expert 0",
        part.index.root.name,
        f"expert 0 is {each[0].label or each[0].scheme}, expert {odd[0]} is {other.label or other.scheme}; "
        "one grouped matmul runs all experts of a layer",
        "quantize all experts of a layer alike",
    )


def _splits_experts(rule: Rule, names: list[str], count: int) -> Problem:
    return Problem(
        "pattern-experts",
        f"pattern {rule.pattern} takes {count} of the experts of a layer, not all",
        rule.where,
        f"one grouped matmul runs all experts of {names[0]}{_more(len(names))}",
        f'pattern: {names[0]}   or   pattern: "*.mlp.experts.*.{names[0].rsplit(".", 1)[1]}"',
    )


def _mismatch(rule: Rule, served: tuple[str, ...], label: str, found: list[Assigned]) -> Problem:
    index = found[0].part.index
    return Problem(
        "scheme-mismatch",
        f"the file cannot serve scheme {rule.scheme} for {found[0].name}{_more(len(found))}",
        f"{rule.where}  pattern {rule.pattern}",
        f"{index.root.name} holds it{f' as {label},' if label else ''} in a form that serves: {', '.join(served)}",
        f"scheme: auto   or   scheme: {served[0]}",
    )


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def _unused(rule: Rule, matched: list[str], names: list[str]) -> Problem:
    if matched:
        return Problem(
            "pattern-shadowed",
            f"pattern {rule.pattern} never decides: earlier patterns match all of its {len(matched)} modules",
            rule.where,
            "the first matching pattern wins",
            "move it up, or delete it",
        )
    mended, like = _mended(rule.pattern, names), nearest(rule.pattern, names, count=3, cutoff=0.3)
    return Problem(
        "pattern-unmatched",
        f"pattern {rule.pattern} matches no module of this model",
        rule.where,
        "patterns address Hugging Face module names, as globs or re:...",
        f"pattern: {mended}" if mended else f"nearest: {', '.join(like)}" if like else f"for example {names[0]}",
    )


def _mended(pattern: str, names: list[str]) -> str:
    """Return a glob with its words replaced by the model's nearest, if it matches then."""
    words = {word for name in names for word in name.split(".")}
    parts = [part if part in words else next(iter(nearest(part, words)), part) for part in pattern.split(".")]
    mended = ".".join(parts)
    return mended if not pattern.startswith("re:") and any(map(compile_pattern(mended), names)) else ""


def _distinct(problems: Iterable[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
