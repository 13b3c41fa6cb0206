"""The schema that editors read: as strict as the program, fresh, and true of every shipped recipe."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from framework.recipe.compose import compose
from framework.recipe.job_options import JOBS
from framework.recipe.json_schema import field_docs, recipe_schema
from framework.recipe.schema import SECTIONS, Assume, Chip, LayerRule

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def validator():
    schema = json.loads((ROOT / "schemas/recipe.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def test_the_committed_schema_is_the_one_the_program_prints(validator):
    assert validator.schema == recipe_schema(), "python launch.py job=schema > schemas/recipe.json"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(validator, path):
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_a_resolved_recipe_is_valid(validator):
    validator.validate(json.loads(json.dumps(compose(["recipe=quickstart"]).resolved)))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{model: {path: m}, zzz: 1}",
        "{model: {path: m, kind: lm}}",
        "{model: {path: 1}}",
        "{model: {path: m}, hardware: a4}",
        "{model: {path: m}, hardware: {hbm_gib: 3}}",
        "{model: {path: m}, parallel: {tp_size: 0}}",
        "{model: {path: m}, quantization: {layers: [{pattern: a}]}}",
        "{model: {path: m}, quantization: {layers: [{pattern: a, scheme: w3a3}]}}",
        "{model: {path: m}, job: {name: check, max_new_tokens: 3}}",
        "{model: {path: m}, job: sing}",
        "{model: {path: m}, runtime: {context: 32g}}",
        "{model: {path: m}, runtime: {memory_fraction: 0}}",
    ],
)
def test_what_the_program_refuses_the_schema_refuses(validator, text):
    assert not validator.is_valid(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "{model: {path: m}}",
        "{model: {path: m}, job: {name: generate, prompts: [a, [{role: user, content: b}]], stop: [x, 2]}}",
        "{model: {path: m}, hardware: {name: a3, hbm_gib: 32}, cluster: {name: attach, address: 'h:1'}}",
        "{model: {path: m}, runtime: {context: 32k, threads: auto, max_batch: 3}}",
    ],
)
def test_what_the_program_takes_the_schema_takes(validator, text):
    validator.validate(yaml.safe_load(text))


def test_every_key_is_described():
    for cls in (*SECTIONS.values(), *JOBS.values(), Assume, Chip, LayerRule):
        for name, text in field_docs(cls).items():
            assert text.endswith("."), (cls, name)
