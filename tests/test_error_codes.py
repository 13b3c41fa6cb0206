"""Every code that framework/ can raise is in the table, with the exit statuses it has there, and has a test."""

import ast
import re
from functools import cache
from itertools import chain
from pathlib import Path

from framework.capability.table import STATUSES
from framework.report.codes import CODES, errors_markdown

ROOT = Path(__file__).parents[1]
TABLE = {row.code: row for row in chain.from_iterable(CODES.values())}
# What takes a code, and at which place: problems, and what becomes one later.
TAKES = {"Problem": ("code", 0), "Fault": ("code", 0), "Mismatch": ("kind", 1)}
EXITS = {"InputError": 2, "Refused": 1}


@cache
def sources():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "framework").rglob("*.py"))}


def name_of(call):
    return name_in(getattr(call, "func", None))


def name_in(expression):
    return getattr(expression, "id", None) or getattr(expression, "attr", None)


def code_of(call, keyword, place):
    named = [given.value for given in call.keywords if given.arg == keyword]
    return (call.args[place : place + 1] or named)[0]


@cache
def calls(tree, name):
    return [node for node in nodes(tree) if isinstance(node, ast.Call) and name_of(node) == name]


@cache
def nodes(tree):
    return list(ast.walk(tree))


def values(code, function):
    """The codes that an expression can be; a parameter comes back as itself, a copy of another's code as nothing."""
    match code:
        case ast.Constant(value=str() as value):
            return {value}
        case ast.IfExp(body=one, orelse=other):
            return values(one, function) | values(other, function)
        case ast.JoinedStr(values=[ast.Constant(value="row-"), ast.FormattedValue()]):
            return {f"row-{status}" for status in STATUSES if status != "supported"}
        case ast.Attribute(attr="code" | "kind") | ast.Call(func=ast.Attribute(attr="pop")):
            return set()
        case ast.Name(id=name) if name in [arg.arg for arg in function.args.args]:
            return {code}
        case ast.Name(id=name):
            found = [bound(node, name) for node in ast.walk(function) if isinstance(node, ast.Assign)]
            return set().union(*(values(value, function) for value in found if value is not None))
    raise AssertionError(f"line {code.lineno}: no code can be told from {ast.unparse(code)}")


def bound(assign, name):
    """What an assignment gives to a name, by itself or in a tuple."""
    (target,) = assign.targets
    pairs = zip(target.elts, assign.value.elts, strict=True) if isinstance(target, ast.Tuple) else [
        (target, assign.value)]  # fmt: skip
    return next((value for to, value in pairs if isinstance(to, ast.Name) and to.id == name), None)


def raised():
    """Every code, by the places that name it."""
    found, helpers = {}, {}
    for path, tree in sources().items():
        functions = [node for node in nodes(tree) if isinstance(node, ast.FunctionDef)]
        for taker, (keyword, place) in TAKES.items():
            for call in calls(tree, taker):
                inside = [f for f in functions if f.lineno <= call.lineno <= f.end_lineno]
                for value in values(code_of(call, keyword, place), inside[-1] if inside else None):
                    if isinstance(value, ast.Name):
                        names = [arg.arg for arg in inside[-1].args.args if arg.arg != "self"]
                        helpers[path, inside[-1].name] = (value.id, names.index(value.id))
                    else:
                        found.setdefault(value, []).append(f"{path.name}:{call.lineno}")
    for (path, helper), (keyword, place) in helpers.items():
        for call in calls(sources()[path], helper):
            for value in values(code_of(call, keyword, place), None):
                found.setdefault(value, []).append(f"{path.name}:{call.lineno}")
    return found


def test_the_table_has_every_code_once_and_no_other():
    rows = [row.code for row in chain.from_iterable(CODES.values())]
    assert len(rows) == len(set(rows))
    found = raised()
    assert {code: at for code, at in found.items() if code not in TABLE} == {}, "not in framework/report/codes.py"
    assert set(TABLE) - set(found) == set(), "nothing raises these"


def test_a_code_ends_with_an_exit_status_that_the_table_gives_it():
    for path, tree in sources().items():
        makers = {f.name: f for f in nodes(tree) if isinstance(f, ast.FunctionDef) and name_in(f.returns) == "Problem"}
        for kind, status in EXITS.items():
            for call in calls(tree, kind):
                made = [makers[name_of(inner)] for inner in nodes(call)[1:] if name_of(inner) in makers]
                for problem in chain.from_iterable(calls(part, "Problem") for part in (call, *made)):
                    for code in values(code_of(problem, "code", 0), made[0] if made else None):
                        assert status in TABLE[code].exits, f"{path.name}:{problem.lineno} {code} ends with {status}"


def test_every_row_says_what_it_means_and_what_would_work():
    for code, row in TABLE.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
        assert set(row.exits) <= {1, 2} and row.exits
        assert row.meaning.endswith(".") and row.fix.endswith((".", "?")), code


def test_the_page_is_fresh():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert page == errors_markdown(), "python -m framework.report.codes > docs/errors.md"


def test_every_code_is_checked_for_by_a_test():
    literals = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path != Path(__file__):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            literals |= {word for text in texts if isinstance(text, str) for word in re.findall(r"[a-z0-9-]+", text)}
    assert sorted(set(TABLE) - literals) == []
