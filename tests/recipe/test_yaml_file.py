"""A recipe file is data: what it may hold, and what is said when it holds something else."""

import pytest

from framework.errors import InputError
from framework.recipe.yaml_file import read_recipe_file


def problems_of(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_recipe_file(path)
    assert error.value.exit_status == 2
    return error.value.problems


def only(tmp_path, text):
    (problem,) = problems_of(tmp_path, text)
    return problem


@pytest.mark.parametrize("word", ["yes", "on", "true", "12", "1.5", "12:30:45", "0x10"])
def test_a_bare_word_that_yaml_reads_as_something_else_is_no_text(tmp_path, word):
    problem = only(tmp_path, f"model:\n  path: {word}\n")
    assert problem.code == "yaml-type"
    assert problem.fix == f'path: "{word}"'
    assert problem.where.endswith("r.yaml:2  model.path")


@pytest.mark.parametrize("text", ['"yes"', "'12'", "4e8", "W8A8"])
def test_quoted_words_and_words_that_only_look_like_numbers_are_text(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{path: m}}\ncapability: {{table: {text}}}\n")
    assert read_recipe_file(path).values["capability"]["table"] == text.strip("\"'")


@pytest.mark.parametrize("text", ["abc", "12.0", "1e3", "true", "", "0x10", "12:30:45", "0"])
def test_a_count_takes_whole_numbers_only(tmp_path, text):
    problem = only(tmp_path, f"model: {{path: m}}\nparallel: {{tp_size: {text}}}\n")
    assert problem.code == "wrong-type"
    assert "whole number from 1" in problem.why


def test_all_problems_of_a_file_are_shown_together(tmp_path):
    problems = problems_of(
        tmp_path,
        "model: {path: yes, kind: lm}\nhardware: a4\nparalell: {tp_size: 2}\nparallel: {tp_sise: 2}\n"
        "job: {name: generate, max_tokens: 3}\n",
    )
    assert sorted(p.code for p in problems) == [
        "unknown-key", "unknown-key", "unknown-key", "unknown-value", "unknown-value", "yaml-type",
    ]  # fmt: skip
    fixes = [p.fix for p in problems]
    assert "did you mean parallel?" in fixes
    assert "did you mean tp_size?" in fixes
    assert "did you mean max_new_tokens?" in fixes


def test_a_wrong_key_in_a_list_item_is_named_with_its_index(tmp_path):
    problems = problems_of(
        tmp_path,
        "quantization:\n  layers:\n    - {pattern: a, scheme: float}\n    - {pattern: b, shceme: float}\n",
    )
    assert {p.code for p in problems} == {"unknown-key", "missing-key"}
    assert all("quantization.layers[1]" in p.where and ":4" in p.where for p in problems)


def test_a_duplicate_key_is_refused_with_both_lines(tmp_path):
    problem = only(tmp_path, "model:\n  path: a\n  path: b\n")
    assert problem.code == "duplicate-key"
    assert problem.where.endswith(":3") and problem.why.endswith(":2")


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {run: {dir: x}}",
        "defaults: [a]",
        "model: {_target_: os.system}",
        "job: {name: check, _target_: x}",
    ],
)
def test_keys_that_steer_hydra_have_no_place(tmp_path, text):
    assert "recipe-key" in [p.code for p in problems_of(tmp_path, f"{text}\n")]


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}", "${now:%Y}", "a${oc.env:X}b", "${hydra:runtime.cwd}", "${${model.kind}}"]
)
def test_resolvers_are_refused(tmp_path, text):
    problem = only(tmp_path, f"model:\n  path: '{text}'\n")
    assert problem.code == "interpolation"
    assert problem.where.endswith(":2")


def test_a_reference_outside_the_recipe_is_refused(tmp_path):
    assert only(tmp_path, "model: {path: '${hydra.run.dir}'}\n").code == "interpolation"


@pytest.mark.parametrize(
    "text",
    [
        "model: {path: !!python/object/apply:os.system [ls]}",
        "model: !!python/name:os.system x",
        "model: {path: !secret x}",
    ],
)
def test_tags_are_refused_and_nothing_is_run(tmp_path, text):
    assert problems_of(tmp_path, f"{text}\n")


def test_an_unquoted_pattern_is_explained(tmp_path):
    problem = only(tmp_path, "quantization:\n  layers:\n    - {pattern: *.down_proj, scheme: float}\n")
    assert problem.code == "yaml-syntax"
    assert ":3, column" in problem.where
    assert '"*.down_proj"' in problem.fix


def test_a_syntax_error_names_line_and_column(tmp_path):
    problem = only(tmp_path, "model: {path: m\nparallel: [\n")
    assert problem.code == "yaml-syntax"
    assert "column" in problem.where


def test_aliases_cannot_expand_without_end(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert problems_of(tmp_path, "\n".join(lines) + "\n")
    assert problems_of(tmp_path, "model: &m {path: *m}\n")


def test_what_is_no_mapping_is_no_recipe(tmp_path):
    assert only(tmp_path, "- a\n").code == "yaml-syntax"
    assert "mapping" in only(tmp_path, "parallel: 3\n").why
    assert "mapping" in only(tmp_path, "parallel:\n").why


def test_a_folder_and_binary_data_are_no_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError) as error:
        read_recipe_file(path)
    assert error.value.problems[0].code == "recipe-unreadable"
    path.write_bytes(b"#" * (1 << 21))
    with pytest.raises(InputError):
        read_recipe_file(path)
