"""`job=matrix`: every row in every format, within the terminal; the page in docs/ is the one that it prints."""

import json
from pathlib import Path

import pytest

from framework import cli
from tests.capability.support import TABLES, TIERS

PAGE = Path(__file__).parents[2] / "docs" / "support-matrix.md"
CONTRACT = [
    "row", "format", "scheme", "layer_type", "mode", "a2", "a3", "a5", "diffusion", "origin", "note", "source",
]  # fmt: skip
SHORT = {"supported": "yes", "unsupported": "no", None: "-"}


def printed(capsys, *arguments):
    assert cli.main(["job=matrix", *arguments]) == 0
    return capsys.readouterr().out


def cells(statuses):
    return [SHORT.get(statuses[name], statuses[name]) for name in (*TIERS, "diffusion")]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_text_has_every_row_within_the_terminal(capsys, monkeypatch, columns, name):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = printed(capsys, f"capability.table={name}").splitlines()
    assert max(map(len, lines)) <= columns
    shown = {line.split()[0]: line.split()[1:5] for line in lines if line and not line.startswith(" ")}
    for row, (_, _, _, statuses, _) in TABLES[name].items():
        assert shown[row] == cells(statuses), row
    text = " ".join(" ".join(lines).split())
    assert ("groups are widened at load" in text) == (columns == 120)


@pytest.mark.parametrize("name", TABLES)
def test_json_is_the_contract_and_more_behind_it(capsys, name):
    document = json.loads(printed(capsys, f"capability.table={name}", "job.format=json"))
    assert list(document) == ["table", "rows"] and document["table"] == name
    assert {row["row"]: {key: row[key] for key in (*TIERS, "diffusion")} for row in document["rows"]} == {
        row: statuses for row, (_, _, _, statuses, _) in TABLES[name].items()
    }
    for row in document["rows"]:
        assert list(row)[: len(CONTRACT)] == CONTRACT


def test_markdown_has_every_row_and_the_differences_of_the_other_tables(capsys):
    page = printed(capsys, "job.format=markdown")
    first, second = page.split("## Table `upstream-0.5.23`: differences")
    for row, (format_name, scheme, layer, statuses, mode) in TABLES["default"].items():
        assert " | ".join([f"| `{row}`", format_name, scheme, layer, mode, *cells(statuses)]) in first
    same = {row for row in TABLES["default"] if TABLES["upstream-0.5.23"].get(row) == TABLES["default"][row]}
    for row in same - {"modelslim.mxfp4.linear"}:  # which judges diffusion models only there
        assert f"`{row}`" not in second
    for row in (TABLES["default"].keys() | TABLES["upstream-0.5.23"].keys()) - same:
        assert f"`{row}`" in second


def test_the_page_in_docs_is_up_to_date(capsys):
    page = printed(capsys, "job.format=markdown")
    assert page == PAGE.read_text(encoding="utf-8"), "python launch.py job=matrix job.format=markdown > " + str(PAGE)
